"""SIGKILL to workers, coordinator, both, and Ray's actors, at random moments: 200 trials.

    python -m tests.crash.fleet --trials 200            # null engines in real processes
    python -m tests.crash.fleet --trials 30 --real      # the tiny model
    python -m tests.crash.fleet --trials 100 --ray      # actors of a real cluster on this machine

A job whose coordinator lives goes on by itself; else it is run again. Once it has ended its output
is compared, row by row, and the journal is checked. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.jobs import folder
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.verify import verify
from batchrun.models.resolve import fingerprint
from tests.fleet.nulls import answer, environment
from tests.tiny import write_tiny_model

MAX_TOKENS = 40
_PORT = 26379
_GONE_S = 20.0  # for what a dead coordinator leaves


@dataclass
class Fleet:
    """Jobs over the same prompts, one after the other.

    Args:
        root: A folder for all of them.
        rows: Rows of each.
        real: Whether workers have a real model, a tiny one.
        ray: The cluster's address; None for processes.
    """

    root: Path
    rows: int
    real: bool
    ray: str | None
    jobs: int = 0
    head: int | None = None  # the process that started the cluster
    _coordinator: subprocess.Popen[bytes] | None = None
    _want: pa.Table | None = None

    def __post_init__(self) -> None:
        self._model = write_tiny_model(self.root / "tiny")
        self._prompts = self.root / "prompts.parquet"
        prompts = [f"{'alike ' * (i % 5 * 8)}{i}" for i in range(self.rows - 1)]
        table = {"id": range(self.rows), "prompt": [*prompts, None]}
        pq.write_table(pa.table(table), self._prompts)
        self.environment = environment(self.root / "site", 0.004, null=not self.real)
        self.environment["BATCHRUN_HOME"] = str(self.root)

    def begin(self, *, alone: bool = False) -> None:
        """Make the next job."""
        self.jobs += 1
        where = RuntimeSpec(ray=self.ray, workers=2, gpus_per_worker=0.0)
        where = where if self.ray and not alone else RuntimeSpec(devices="cpu:2")
        where = RuntimeSpec() if alone else where
        spec = JobSpec(
            inputs=(InputFile.of(self._prompts),),
            input_format="parquet",
            prompt=PromptSpec(column="prompt"),
            model=ModelSpec("tiny", str(self._model), fingerprint(self._model), "float32"),
            sampling=SamplingSpec(max_tokens=MAX_TOKENS, temperature=0.8),
            seed=5,
            output=OutputSpec(str(self.root / f"out-{self.jobs}.parquet"), "parquet"),
            runtime=replace(where, max_num_seqs=4, max_num_batched_tokens=64),
        )
        spec = replace(spec, output=replace(spec.output, token_ids=True))
        self.job: JobFolder = folder.create(self.root, spec)

    def start(self) -> None:
        """Run the job in a process of its own."""
        command = [sys.executable, "-m", "tests.fleet.nulls", str(self.job.path)]
        with (self.root / "log").open("ab") as log:
            self._coordinator = subprocess.Popen(
                command + ["--real"] * self.real, env=self.environment, stdout=log, stderr=log
            )

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The live processes, by what they are."""
        found: dict[str, list[psutil.Process]] = {"worker": [], "agent": [], "coordinator": []}
        everybody, mine = [*psutil.process_iter()], str(self.job.path)
        if self.head is not None:  # this cluster's, and no other's
            cluster = psutil.Process(self.head).children(recursive=True)
            everybody, mine = [*psutil.Process().children(), *cluster], "run-worker"
        for process in everybody:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                words = process.cmdline()
                if "run-worker" in words and mine in words:
                    found["worker"].append(process)
                elif words and words[0].startswith("ray::Agent"):
                    found["agent"].append(process)
                elif "tests.fleet.nulls" in words and str(self.job.path) in words:
                    found["coordinator"].append(process)
        return {kind: [*dict.fromkeys(each)] for kind, each in found.items()}

    def results(self) -> int:
        """Rows in the journal."""
        return self.job.counts().samples

    def running(self) -> bool:
        """Whether the coordinator lives."""
        assert self._coordinator is not None
        return self._coordinator.poll() is None

    def reap(self) -> int:
        """Wait for the coordinator's end, and for that of all its workers; its exit code."""
        assert self._coordinator is not None
        code = self._coordinator.wait()
        deadline = time.monotonic() + _GONE_S
        while any(self.processes()[kind] for kind in ("worker", "agent")):
            assert time.monotonic() < deadline, "workers outlive their coordinator"
            time.sleep(0.02)
        return code

    def check(self) -> None:
        """The output has every row once, in order, with its own answer."""
        assert verify(self.job) == []
        found = pq.read_table(self.job.spec().output.path)
        assert found["id"].to_pylist() == list(range(self.rows))
        if self._want is not None:
            assert found.equals(self._want), "the output differs from that without kills"
            return
        if self.real:
            self._want = found
            return
        want = [answer(row, 0, MAX_TOKENS) for row in range(self.rows - 1)]
        assert found["completion_token_ids"].to_pylist() == [*want, []]


@dataclass
class Trials:
    struck: Counter[str] = field(default_factory=Counter)
    runs: int = 0


def series(fleet: Fleet, wanted: int, seed: int) -> Trials:
    """Strike as often as wanted.

    Raises:
        AssertionError: A row was lost, doubled or changed, or a job did not go on.
    """
    rng, trials = random.Random(seed), Trials()
    if fleet.real:
        fleet.begin(alone=True)
        fleet.start()
        assert fleet.reap() == 0, "the job without kills fails"
        fleet.check()
    kinds = ["worker", "worker", "coordinator", "both", "all"]
    kinds += ["agent", "agent"] * bool(fleet.ray)
    while trials.struck.total() < wanted:
        fleet.begin()
        ended = False
        while not ended:
            trials.runs += 1
            fleet.start()
            killed = False
            while not killed and fleet.running():
                how = rng.choice(kinds)
                if trials.struck.total() >= wanted or not _wait(fleet, rng):
                    break
                killed = _strike(fleet, rng, how)
                trials.struck[how] += 1
            code = fleet.reap()
            ended = code == 0
            assert ended or killed, "a run ended that nobody killed"
        fleet.check()
    return trials


def _wait(fleet: Fleet, rng: random.Random) -> bool:
    """Wait for some more results, or a little; False if the run has ended."""
    before, more = fleet.results(), rng.randint(1, fleet.rows // 2)
    until = time.monotonic() + rng.uniform(0.5, 4)
    while fleet.running() and fleet.results() < before + more and time.monotonic() < until:
        time.sleep(0.01)
    return fleet.running()


def _strike(fleet: Fleet, rng: random.Random, how: str) -> bool:
    """Kill; whether the coordinator was among the victims."""
    there = fleet.processes()
    victims = [rng.choice(there[how])] if there.get(how) else []
    if how in ("both", "all"):
        workers = there["worker"]
        victims = there["coordinator"] + (workers if how == "all" else workers[:1])
        rng.shuffle(victims)
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    return any(victim in there["coordinator"] for victim in victims)


def _start_cluster(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a cluster of one node. `ray stop` would stop those of other tests, too."""
    ray = str(Path(sys.executable).parent / "ray")
    options = [f"--port={_PORT}", "--num-cpus=4", "--num-gpus=0", "--include-dashboard=false"]
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--disable-usage-stats", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", _PORT)):
            return head
        assert head.poll() is None, "the cluster can't be started"
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="the tiny model")
    parser.add_argument("--ray", action="store_true", help="a Ray cluster on this machine")
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fleet-") as name:
        address = f"127.0.0.1:{_PORT}" if options.ray else None
        fleet = Fleet(Path(name), options.rows, options.real, address)
        head = _start_cluster(fleet.environment) if options.ray else None
        fleet.head = None if head is None else head.pid
        try:
            trials = series(fleet, options.trials, options.seed)
        except BaseException:
            sys.stderr.write((Path(name) / "log").read_text()[-6000:])
            raise
        finally:
            if head is not None:
                head.terminate()
                head.wait()
    report = {
        "benchmark": "faults-fleet",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "workers": ("Ray's actors" if options.ray else "processes")
        + (", tiny model" if options.real else ", null engines"),
        "rows": options.rows,
        "trials": trials.struck.total(),
        "struck": dict(trials.struck),
        "jobs": fleet.jobs,
        "runs": trials.runs,
        "outputs_equal": True,  # `series` raises otherwise
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
