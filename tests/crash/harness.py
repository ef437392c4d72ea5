"""Kills a real job at random moments and rows, again and again, and compares what comes out.

    python -m tests.crash.harness --kills 50              # the embedded model, as users run it
    python -m tests.crash.harness --kills 50 --tiny       # a tiny model: quick

Workers are forked from a process that has torch loaded, so that a kill costs no import; each runs
`run_job` as the command line does, and dies by SIGKILL.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.engine.core import Request
from batchrun.jobs import folder
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.models.resolve import DEFAULT_MODEL, ModelRef, resolve
from batchrun.runner import job_run, opening, writer
from batchrun.runner.live import Progress

COLUMNS = ["completion", "completion_token_ids", "finish_reason", "prompt_tokens", "error"]


@dataclass
class Trial:
    """What a series of kills came to."""

    kills: int = 0
    runs: int = 0
    requests: int = 0
    rows_after_each: tuple[int, ...] = ()


def write_prompts(path: Path, rows: int) -> None:
    rng = random.Random(3)
    words = ["river", "stone", "lamp", "seven", "copper", "garden", "slow", "window", "north"]
    prompts: list[str | None] = [
        " ".join(rng.choices(words, k=rng.choice([3, 8, 20, 60]))) for _ in range(rows)
    ]
    prompts[rows // 2] = None
    table = pa.table({"id": list(range(rows)), "prompt": prompts})
    pq.write_table(table, path, row_group_size=7)


def make_job(home: Path, prompts: Path, ref: ModelRef, output: Path, max_tokens: int) -> JobFolder:
    spec = JobSpec(
        inputs=(InputFile.of(prompts),),
        input_format="parquet",
        prompt=PromptSpec(column="prompt"),
        model=ModelSpec(
            name=ref.name, path=str(ref.path), fingerprint=ref.fingerprint, dtype="float32"
        ),
        sampling=SamplingSpec(max_tokens=max_tokens, temperature=0.8, top_p=0.95),
        seed=5,
        output=OutputSpec(path=str(output), format="parquet", token_ids=True),
        runtime=RuntimeSpec(max_num_seqs=8, max_num_batched_tokens=64, kv_budget=64 << 20),
    )
    return folder.create(home, spec)


def in_child(work: Callable[[], None], kill_after: float | None = None) -> tuple[bool, float]:
    """Run `work` in a forked process; returns whether it was killed, and how long it lived."""
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if kill_after is not None:
                suicide = threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL))
                suicide.daemon = True
                suicide.start()
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, code = os.waitpid(pid, 0)
    lived = time.perf_counter() - began
    if os.WIFSIGNALED(code):
        assert os.WTERMSIG(code) == signal.SIGKILL, f"a worker died by signal {os.WTERMSIG(code)}"
        return True, lived
    assert os.WEXITSTATUS(code) == 0, "a worker failed; its traceback is above"
    return False, lived


def run_noting(job: JobFolder, notes: Path, last_row: int | None = None) -> None:
    """Run the job, appending the row of every request that reaches the engine to `notes`.

    Args:
        job: The job.
        notes: A file.
        last_row: So many rows are journalled when the process kills itself.
    """
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    handle = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def open_noting(spec: JobSpec, log: Callable[[str], None]) -> Any:
        runtime = opening.open_runtime(spec, log)
        add = runtime.engine.add

        def noting(request: Request) -> None:
            os.write(handle, f"{request.row}\n".encode())
            add(request)

        runtime.engine.add = noting  # type: ignore[method-assign]
        return runtime

    def die(progress: Progress) -> None:
        if last_row is not None and progress.rows_done >= last_row:
            os.kill(os.getpid(), signal.SIGKILL)

    job_run.run_job(job.path, stop=threading.Event(), on_progress=die, open_workbench=open_noting)


def journalled(job: JobFolder) -> set[int]:
    with job.journal() as journal:
        return {result.row for result in journal.results()}


def columns(path: Path) -> pa.Table:
    return pq.read_table(path)


def kill_series(
    root: Path, ref: ModelRef, *, rows: int, max_tokens: int, kills: int, seed: int
) -> Trial:
    """Kill jobs over the same prompts `kills` times, each until it ends, and check each.

    Raises:
        AssertionError: A row was lost, doubled, changed, or computed again.
    """
    rng = random.Random(seed)
    prompts = root / "prompts.parquet"
    write_prompts(prompts, rows)
    reference = make_job(root, prompts, ref, root / "reference.parquet", max_tokens)
    killed, full = in_child(lambda: run_noting(reference, root / "reference.notes"))
    assert not killed
    want = columns(root / "reference.parquet")
    assert want.num_rows == rows
    trial = Trial()
    number = 0
    while trial.kills < kills:
        number += 1
        output = root / f"out-{number}.parquet"
        job = make_job(root, prompts, ref, output, max_tokens)
        state = ""
        while state != "done-with-errors":  # one prompt is null
            before = journalled(job)
            notes = root / f"notes-{number}-{trial.runs}"
            after, row = None, None
            if trial.kills < kills and trial.kills % 2:
                after = rng.uniform(0, full)
            elif trial.kills < kills:  # not by the clock, or a busy machine would choose
                row = len(before) + rng.randint(1, max(1, (rows - len(before)) // 2))
            killed, _ = in_child(
                lambda j=job, n=notes, r=row: run_noting(j, n, r),  # type: ignore[misc]
                after,
            )
            trial.runs += 1
            trial.kills += killed
            asked = notes.read_text().split() if notes.exists() else []
            trial.requests += len(asked)
            again = before & {int(row) for row in asked}
            assert not again, f"rows {sorted(again)} were journalled and computed again"
            now = journalled(job)
            assert before <= now, f"rows {sorted(before - now)} left the journal"
            trial.rows_after_each += (len(now),)
            state = job.state()
            assert output.exists() or state != "done-with-errors"
        got = columns(output)
        assert got.schema.equals(want.schema)
        for name in want.column_names:
            assert got[name].equals(want[name]), f"the column {name} differs after kills"
        with job.journal() as journal:
            journal.check()
        assert not [p for p in root.iterdir() if p.name.endswith(".tmp")]
    return trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["BATCHRUN_HOME"] = name
        if args.tiny:
            from tests.tiny import write_tiny_model  # noqa: PLC0415

            writer._COMMIT_SECONDS = 0.0  # or the whole job would be one transaction
            ref = resolve(str(write_tiny_model(root / "tiny")), root / "models")
        else:
            ref = resolve(DEFAULT_MODEL, folder.home({}) / "models")
        trial = kill_series(
            root,
            ref,
            rows=args.rows,
            max_tokens=args.max_tokens,
            kills=args.kills,
            seed=args.seed,
        )
    partial = [n for n in trial.rows_after_each if 0 < n < args.rows]
    print(f"rows journalled after each run: {trial.rows_after_each}", file=sys.stderr)
    print(
        json.dumps(
            {
                "benchmark": "sigkill",
                "model": ref.name,
                "kills": trial.kills,
                "runs": trial.runs,
                "rows": args.rows,
                "runs_that_left_part_of_the_rows": len(partial),
                "requests": trial.requests,
                "journalled_rows_computed_again": 0,  # kill_series raises otherwise
                "outputs_equal": True,
            }
        )
    )


if __name__ == "__main__":
    main()
