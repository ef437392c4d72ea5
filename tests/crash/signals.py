"""Signals to worker, viewer, both, their group, and a worker that sleeps: 200 random trials.

    python -m tests.crash.signals --trials 200          # run_job in forked processes, null engine
    python -m tests.crash.signals --trials 20 --real    # batchrun itself, the tiny model

A trial starts a job, or goes on with it, strikes at a random moment and looks: the journal opens
and has every acknowledged row. Once a job has ended its output is compared, row by row. How many
tokens were generated more than once is reported. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pyarrow.parquet as pq

from batchrun.jobs.errors import JobError
from batchrun.jobs.holders import holders
from batchrun.jobs.lease import LOCK, held_by
from batchrun.jobs.verify import verify
from batchrun.runner.live import read_progress
from tests.faults.liveness import cancel_all, check_goes_on
from tests.faults.smalljob import (
    BUG,
    DONE,
    REFUSED,
    Ledger,
    SmallJob,
    forked,
    outcome_of,
)

STRIKES = ("worker", "viewer", "both", "group", "stop", "cancel", "cancel stopped")
SPARING = ("viewer", "stop", "supervisor")  # the job goes on
ENDED = {"done", "done-with-errors"}


class Launcher(Protocol):
    """What a trial needs of a way to run jobs.

    Attributes:
        strikes: What can be struck.
    """

    strikes: tuple[str, ...]

    def home(self) -> Path:
        """Where the jobs are."""

    def begin(self) -> None:
        """A fresh job."""

    def start(self) -> None:
        """Go on with it, in processes of its own."""

    def wait_for_work(self) -> None:
        """Return when rows are being computed, or the job has ended."""

    def victims(self, how: str) -> list[int]:
        """The processes to strike, groups by minus their number; none where all have ended."""

    def contend(self) -> int:
        """Run it here while another has it; the exit code."""

    def reap(self) -> None:
        """Wait until its processes have ended, whatever ended them."""

    def ended(self) -> bool:
        """Whether the job is done; raises where something acknowledged is lost."""

    def check(self) -> None:
        """Raises unless the output is what it must be."""

    def again(self) -> int:
        """Tokens of the job that were generated more than once."""


class Forked:
    """`run_job` over an engine that computes nothing; the viewer asks for the counts."""

    strikes = STRIKES

    def __init__(self, root: Path, rows: int) -> None:
        self._root, self._rows = root, rows
        self._number = self._worker = self._viewer = 0
        self._ledger = Ledger(rows)

    def home(self) -> Path:
        return self._small.home

    def begin(self) -> None:
        self._number += 1
        self._small = SmallJob(self._root / str(self._number), self._rows)
        self._small.write_input()
        self._ledger.clear()

    def _run(self) -> int:
        return outcome_of(lambda: self._small.submit_and_run(self._ledger))

    def _look(self, worker: int) -> int:
        while Path(f"/proc/{worker}").exists():
            for job in self._small.jobs():
                job.counts()
            time.sleep(0.005)
        return DONE

    def start(self) -> None:
        self._worker = worker = spawn(self._run, 0)
        self._viewer = spawn(lambda: self._look(worker), worker)

    def wait_for_work(self) -> None:
        pass  # there is little before it

    def victims(self, how: str) -> list[int]:
        both = [self._worker, self._viewer]
        named = {"viewer": [self._viewer], "both": both, "group": [-self._worker]}
        return named.get(how, [self._worker])

    def contend(self) -> int:
        if not (jobs := self._small.jobs()) or held_by(jobs[0].path) is None:
            return REFUSED  # stopped before it had the job
        return forked(self._run)

    def reap(self) -> None:
        _, code = os.waitpid(self._worker, 0)
        _, seen = os.waitpid(self._viewer, 0)
        for status in (code, seen):
            how = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
            killed = how in (signal.SIGKILL, signal.SIGTERM)  # which `cancel` asks with
            assert killed or os.WEXITSTATUS(status) == DONE, f"a process ended with {status}"

    def ended(self) -> bool:
        for job in self._small.jobs():
            self._small.check_journal(job, self._ledger.acknowledged())
            return job.state() in ENDED
        assert not self._ledger.submitted
        return False

    def check(self) -> None:
        self._small.check_output()

    def again(self) -> int:
        return sum(max(0, count - 1) for count in self._ledger.generated())


class CommandLine:
    """`batchrun` itself with the tiny model: a viewer, a supervisor, the run that it started."""

    strikes = (*STRIKES, "supervisor")

    def __init__(self, root: Path, rows: int) -> None:
        from batchrun.models.resolve import resolve  # noqa: PLC0415
        from tests.crash.harness import make_job, write_prompts  # noqa: PLC0415
        from tests.tiny import write_tiny_model  # noqa: PLC0415

        self._root, self._number = root, 0
        self._prompts = root / "prompts.parquet"
        write_prompts(self._prompts, rows)
        ref = resolve(str(write_tiny_model(root / "tiny")), root / "models")
        self._make = lambda output: make_job(root, self._prompts, ref, output, 64)
        self.begin()
        self._reference = self._output
        self.start()
        self.reap()

    def begin(self) -> None:
        self._number += 1
        self._output = self._root / f"out-{self._number}.parquet"
        self._job = self._make(self._output)
        self._again = 0

    def start(self) -> None:
        (self._job.path / "progress.json").unlink(missing_ok=True)
        self._before = self._kept()
        self._viewer = self._command()
        while held_by(self._job.path) is None and self._viewer.poll() is None:
            time.sleep(0.005)

    def wait_for_work(self) -> None:
        while held_by(self._job.path) is not None:
            seen = read_progress(self._job.path)
            if seen is not None and seen.phase == "run":
                break
            time.sleep(0.01)

    def home(self) -> Path:
        return self._root

    def victims(self, how: str) -> list[int]:
        supervisor, *runs = [one.pid for one in holders(self._job.path / LOCK)] or [0]
        if not runs:
            return []
        viewer = self._viewer.pid
        named = {"viewer": [viewer], "both": [*runs, viewer], "supervisor": [supervisor]}
        return named.get(how, [-supervisor] if how == "group" else runs)

    def _command(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "batchrun", "resume", self._job.id],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "BATCHRUN_HOME": str(self._root), "HF_HUB_OFFLINE": "1"},
        )

    def contend(self) -> int:
        return REFUSED if self._command().wait() else DONE

    def reap(self) -> None:
        self._viewer.wait()
        while held_by(self._job.path) is not None:
            time.sleep(0.02)
        seen = read_progress(self._job.path)  # what the run said last, at most 0.25 s before
        if seen is not None and seen.phase == "run":
            self._again += max(0, self._before + seen.completion_tokens - self._kept())

    def _kept(self) -> int:
        """Tokens that are in the journal, of results and of rows that are not done."""
        with self._job.journal() as journal:
            begun = sum(len(p.token_ids) for p in journal.partials().values())
            return journal.counts().completion_tokens + begun

    def ended(self) -> bool:
        with self._job.journal() as journal:
            journal.check()
        problems = verify(self._job)
        assert not problems, problems
        return self._job.state() in ENDED

    def check(self) -> None:
        assert pq.read_table(self._output).equals(pq.read_table(self._reference))

    def again(self) -> int:
        return self._again


@dataclass
class Trials:
    """What a series came to."""

    struck: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    again: list[int] = field(default_factory=list)
    refused: int = 0


def spawn(work: Callable[[], int], group: int) -> int:
    """Fork; the child joins a process group, or leads one of its own where it is 0."""
    pid = os.fork()
    if pid == 0:
        status = BUG
        try:
            os.setpgid(0, group)
            status = work()
        finally:
            os._exit(status)
    with suppress(ProcessLookupError, PermissionError):  # it did so itself, and may have ended
        os.setpgid(pid, group)
    return pid


def strike(launcher: Launcher, how: str, trials: Trials) -> bool:
    """Send what the trial's name says; whether there was anybody to send it to."""

    def send(number: int) -> bool:
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(victims)

    victims = launcher.victims("stop" if how.startswith("cancel") else how)
    if how.startswith("cancel"):
        if how == "cancel stopped":
            send(signal.SIGSTOP)
        said = cancel_all(launcher.home(), lambda: send(signal.SIGCONT))
        send(signal.SIGCONT)  # where it was stopped before it had the job
        return bool(said)
    if how != "stop":
        return send(signal.SIGKILL)
    if send(signal.SIGSTOP):
        assert launcher.contend() == REFUSED, "two workers have one job"
        trials.refused += 1
        send(signal.SIGCONT)
    return bool(victims)


def series(launcher: Launcher, trials_wanted: int, seed: int) -> Trials:
    """Trials until there were as many; each job goes on until it ends.

    Raises:
        AssertionError: A row was lost, doubled or changed, or two workers had one job.
    """
    rng, trials = random.Random(seed), Trials()
    launcher.begin()
    launcher.start()
    began = time.monotonic()
    launcher.wait_for_work()
    loaded = time.monotonic() - began
    launcher.reap()
    full = time.monotonic() - began
    launcher.check()
    while trials.struck.total() < trials_wanted:
        launcher.begin()
        trials.jobs += 1
        while True:
            how = rng.choice(launcher.strikes)
            last = trials.struck.total() >= trials_wanted
            struck = False
            launcher.start()
            if not last:
                if rng.random() < 0.8:  # loading has fewer moments that differ
                    launcher.wait_for_work()
                    time.sleep(rng.uniform(0, full - loaded))
                else:
                    time.sleep(rng.uniform(0, full))
                struck = strike(launcher, how, trials)
                trials.struck[how] += struck
            launcher.reap()
            try:
                check_goes_on(launcher.home(), next_job=trials.struck.total() % 5 == 0)
                ended = launcher.ended()
            except JobError as error:
                raise AssertionError(f"after a signal to {how}: {error}") from error
            if ended:
                break
            assert struck, "a run that nothing struck did not end"
            assert how not in SPARING, f"the job did not go on after a signal to {how}"
        launcher.check()
        trials.again.append(launcher.again())
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--rows", type=int, help="60, or 600 of the tiny model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="batchrun, with the tiny model")
    options = parser.parse_args()
    rows = options.rows or (600 if options.real else 60)
    with tempfile.TemporaryDirectory(prefix="signals-") as name:
        kind = CommandLine if options.real else Forked
        launcher: Launcher = kind(Path(name), rows)
        began = time.perf_counter()
        trials = series(launcher, options.trials, options.seed)
    report = {
        "benchmark": "faults-signals",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "workers": "batchrun, tiny model" if options.real else "run_job, null engine",
        "rows": rows,
        "trials": trials.struck.total(),
        "struck": dict(trials.struck),
        "jobs": trials.jobs,
        "contenders_refused": trials.refused,
        "outputs_equal": True,  # `series` raises otherwise
        "tokens_generated_again": sum(trials.again),
        "tokens_generated_again_at_most_in_a_job": max(trials.again),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
