"""How many rows and tokens a second one coordinator keeps up with.

    python -m benchmarks.coordinator [--rows 40000] [--workers 1 4 16 64] [--real-prompts]

The whole of a run but the engines: Parquet in, reader, planner, dispatcher, messages over sockets,
journal on disk, Parquet out. Simulated workers answer at once; all of them are in one process, so
that what is measured is the coordinator. Prompts are made by a null tokenizer, or with
`--real-prompts` by the embedded model's. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.fleet import fleet as fleets
from batchrun.fleet.fleet import Fleet
from batchrun.fleet.messages import (
    Closed,
    Ended,
    Finish,
    FromWorker,
    Limits,
    Ready,
    Recall,
    Release,
    Returned,
    Setup,
    ToWorker,
    Work,
)
from batchrun.fleet.processes import Workers
from batchrun.jobs import folder
from batchrun.jobs.journal.results import Result
from batchrun.jobs.metrics import recorded
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.stats import summarise
from batchrun.machine import description
from batchrun.models.resolve import DEFAULT_MODEL, resolve
from batchrun.runner.job_run import run_job
from tests.fleet.nulls import NullPrompts

TOKENS = 200  # of an answer
SENTENCE = "pack my box with five dozen liquor jugs and then rest "  # 11 tokens
LIMITS = Limits(8192, 256, 8192)


class Simulated(Workers):
    """Workers that answer at once."""

    def __init__(self, count: int) -> None:
        pairs = [Pipe() for _ in range(count)]
        self._ours = [ours for ours, _ in pairs]
        self._pid = os.fork()
        if self._pid == 0:
            for ours in self._ours:
                ours.close()
            try:
                _answer([theirs for _, theirs in pairs])
            finally:
                os._exit(0)
        for _, theirs in pairs:
            theirs.close()
        self._number = {connection: i for i, connection in enumerate(self._ours)}
        self._outboxes: list[deque[ToWorker]] = [deque() for _ in pairs]
        self.sent = threading.Condition()
        threading.Thread(target=self._send, daemon=True).start()

    def start(self, worker: int, setup: Setup) -> None:
        """See `Workers`."""
        self.send(worker, setup)

    def send(self, worker: int, message: ToWorker) -> None:
        """See `Workers`."""
        with self.sent:
            self._outboxes[worker].append(message)
            self.sent.notify()

    def _send(self) -> None:
        while True:
            with self.sent:
                self.sent.wait_for(lambda: any(self._outboxes))
                found = [(i, box.popleft()) for i, box in enumerate(self._outboxes) if box]
            for worker, message in found:
                self._ours[worker].send(message)

    def poll(self, timeout: float) -> Sequence[tuple[int, FromWorker]]:
        """See `Workers`."""
        ready = wait(self._ours, timeout)
        return [(self._number[c], c.recv()) for c in ready if isinstance(c, Connection)]

    def end(self, worker: int, *, at_once: bool = False) -> None:
        """See `Workers`."""

    def close(self) -> None:
        """See `Workers`."""
        for ours in self._ours:
            ours.close()
        os.waitpid(self._pid, 0)


def _answer(connections: list[Connection]) -> None:
    """Be all workers, until the coordinator is gone."""
    done = dict.fromkeys(connections, 0)
    while connections:
        for connection in wait(connections):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except EOFError:
                connections.remove(connection)
                continue
            if isinstance(message, Setup):
                connection.send(Ready(LIMITS, recorded({"max_num_seqs": 256})))
            elif isinstance(message, Work):
                done[connection] += len(message.rows)
                figures = recorded({"generated_tokens": TOKENS * done[connection]})
                connection.send(Ended(tuple(map(_result, message.rows)), figures))
            elif isinstance(message, Release):
                connection.send(Returned(()))
            elif isinstance(message, Finish):
                figures = recorded({"generated_tokens": TOKENS * done[connection]})
                connection.send(Closed(figures))
            else:
                assert isinstance(message, Recall)


def _result(row: Any) -> Result:
    request = row.request()
    ids = tuple(range(request.row, request.row + TOKENS))
    many = len(request.prompt_ids)
    return Result(
        *(request.row, request.sample, "ok", SENTENCE * 18, ids, "length", many, TOKENS),
        queue_s=0.0,
        prefill_s=0.0,
        decode_s=0.0,
    )


def measured(root: Path, rows: int, workers: int) -> dict[str, float]:
    """One job's rows and tokens a second, in the time of its engines, and in all of its time."""
    ref = resolve(DEFAULT_MODEL, folder.home() / "models")
    source = root / "prompts.parquet"
    spec = JobSpec(
        inputs=(InputFile.of(source),),
        input_format="parquet",
        prompt=PromptSpec(column="prompt"),
        model=ModelSpec(ref.name, str(ref.path), ref.fingerprint),
        sampling=SamplingSpec(max_tokens=TOKENS),
        output=OutputSpec(str(root / f"out-{workers}-{rows}.parquet"), "parquet"),
        runtime=RuntimeSpec(devices="cpu:1"),
    )
    job = folder.create(root, spec)
    setups = [Setup(spec, "null", f"null:{i}") for i in range(workers)]

    used = 0.0

    def opened(spec: JobSpec, log: Callable[[str], None]) -> Fleet:
        nonlocal used
        found = Fleet(spec, Simulated(workers), setups, log)
        found.open()
        used = time.process_time()
        return found

    began = time.perf_counter()
    outcome = run_job(job.path, stop=threading.Event(), open_workbench=opened)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    assert outcome == "done", outcome
    stats = summarise(job)
    assert stats["rows"]["done"] == rows
    engine = stats["time"]["engine_s"]
    return {
        "workers": workers,
        "rows_per_s": rows / engine,
        "tokens_per_s": rows * TOKENS / engine,
        "rows_per_s_in_all": rows / seconds,
        "coordinator_us_per_row": used / rows * 1e6,  # of processor time, the export included
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--real-prompts", action="store_true", help="the embedded tokenizer")
    options = parser.parse_args()
    if not options.real_prompts:
        fleets.read_model = lambda spec: None  # type: ignore[assignment,return-value]
        fleets.model_prompts = lambda *_: NullPrompts()  # type: ignore[assignment,return-value]
    found = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        prompts = [f"{SENTENCE * 4}{i}" for i in range(options.rows)]
        pq.write_table(pa.table({"prompt": prompts}), root / "prompts.parquet")
        for workers in options.workers:
            rates = measured(root, options.rows, workers)
            print(
                f"{workers:3} workers: {rates['rows_per_s']:8,.0f} rows/s, "
                f"{rates['tokens_per_s']:11,.0f} tokens/s; "
                f"{rates['rows_per_s_in_all']:8,.0f} rows/s with loading and export; "
                f"{rates['coordinator_us_per_row']:.0f} us of processor time a row",
                file=sys.stderr,
            )
            found.append({key: round(value) for key, value in rates.items()})
    report = {
        "benchmark": "coordinator",
        "machine": description(),
        "rows": options.rows,
        "answer_tokens": TOKENS,
        "prompts": "the embedded tokenizer" if options.real_prompts else "null tokenizer",
        "ceiling": found,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
