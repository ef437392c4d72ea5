"""The job layer alone: Parquet rows through a null engine, the journal and the export.

    python benchmarks/joblayer.py [--rows 1000000] [--small 100000] [--share]

Two sizes run, each in a process of its own, so that the peaks of memory compare: rows that are
streamed leave no trace in it. Every group of 1,000 results is durable before the next begins, as in
a real job. `--share` then runs the demo's job as it is, with the embedded model, and says how much
of its engine time the job layer costs: the time that the main thread spends outside of the engine's
steps, and the processor time of the reader and of the journal's writer, as if each second of it
were taken from the engine. The last line of stdout is one JSON object; the exit code is 1 where the
larger job's peak is more than 1.25 times the smaller one's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from batchrun.jobs.folder import create
from batchrun.jobs.journal.journal import READ, Journal
from batchrun.jobs.journal.results import Result
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.rows.row import Row
from batchrun.jobs.rows.source import expand_inputs, open_source
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.stats import summarise
from batchrun.machine import peak_rss

ALLOWED_RATIO = 1.25
GROUP = 1000  # results in a transaction
TOKENS = 32  # of a completion
SENTENCE = "pack my box with five dozen liquor jugs and then rest "


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=1_000_000)
    arguments.add_argument("--small", type=int, default=100_000)
    arguments.add_argument("--share", action="store_true", help="of the demo's engine time")
    arguments.add_argument("--demo", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.one is not None:
        print(json.dumps(run(options.one)))
        return 0
    if options.demo is not None:
        print(json.dumps(run_demo(options.demo)))
        return 0
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    measured = [measure(rows) for rows in (options.small, options.rows)]
    ratio = measured[1]["peak_rss"] / measured[0]["peak_rss"]
    print(f"peak memory ratio: {ratio:.3f} (at most {ALLOWED_RATIO})")
    small, large = measured
    report = {"benchmark": "joblayer", "small": small, "large": large, "ratio": ratio}
    if options.share:
        with tempfile.TemporaryDirectory(prefix="joblayer-") as folder:
            report["share"] = share = in_process("--demo", folder)
        print(f"job layer: {share['share']:.2%} of {share['engine_s']:.1f} s of engine time")
    print(json.dumps(report))
    return 0 if ratio <= ALLOWED_RATIO else 1


def measure(rows: int) -> dict[str, Any]:
    """Generate an input, then run a job of it in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="joblayer-") as folder:
        generate(Path(folder, "prompts.parquet"), rows)
        result = in_process("--one", folder)
    print(
        f"{rows:>9,} rows: {result['rows_per_s']:>7,.0f} rows/s, "
        f"{result['rows_per_cpu_s']:,.0f} a second of processor time "
        f"(run {result['run_s']:.1f} s, resume scan {result['resume_s']:.2f} s, "
        f"export {result['export_s']:.1f} s, stats {result['stats_s']:.1f} s), "
        f"journal {result['journal_rows_per_s']:,.0f} rows/s "
        f"and {result['journal_bytes'] / result['rows']:,.0f} bytes a row, "
        f"peak memory {result['peak_rss'] / 2**20:.1f} MiB"
    )
    return result


def in_process(option: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, option, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def generate(path: Path, rows: int) -> None:
    """A Parquet file of `rows` prompts of 12 to 56 words, with three more columns."""
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("prompt", pa.string()),
            ("source", pa.dictionary(pa.int32(), pa.string())),
            ("scores", pa.list_(pa.float64())),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, 50_000):
            indices = range(first, min(first + 50_000, rows))
            columns = [
                list(indices),
                [f"{SENTENCE * (1 + i % 5)}{i}" for i in indices],
                [("web", "book", "code")[i % 3] for i in indices],
                [[i / 7, i / 11] for i in indices],
            ]
            arrays = [
                pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def run(folder: Path) -> dict[str, Any]:
    """Submit, run, scan as a resume would, export and summarise one job; timed."""
    path, output = folder / "prompts.parquet", folder / "out.parquet"
    paths, kind = expand_inputs([str(path)])
    source = open_source(paths, kind)
    spec = JobSpec(
        inputs=(InputFile.of(path),),
        input_format=kind,
        prompt=PromptSpec(column="prompt"),
        model=ModelSpec(name="null"),
        sampling=SamplingSpec(),
        output=OutputSpec(path=str(output), format="parquet", token_ids=True),
    )
    job = create(folder, spec)
    began, cpu = time.perf_counter(), time.process_time()
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.set_meta("rows_total", source.num_rows)
        journal.set_meta(READ, ["prompt"])
        journal_s = write_all(journal, source.rows(["prompt"]))
        journal.end_run("done", {})
    ran, ran_cpu = time.perf_counter(), time.process_time()
    with job.journal() as journal:
        done = journal.done()
        missing = same = 0
        for row in source.rows(["prompt"]):
            if row.index % GROUP == 0:
                digests = journal.digests(row.index, GROUP)
            missing += (row.index, 0) not in done
            same += digests[row.index] == row.digest
    scanned, scanned_cpu = time.perf_counter(), time.process_time()
    with job.journal() as journal:
        count = export_job(job.spec(), journal, output, format="parquet").rows
    exported, exported_cpu = time.perf_counter(), time.process_time()
    summary = summarise(job)
    ended = time.perf_counter()
    check(output, count)
    assert (missing, same) == (0, count)
    assert summary["rows"]["done"] == count == source.num_rows
    return {
        "rows": count,
        "rows_per_s": count / (exported - began - (scanned - ran)),
        "rows_per_cpu_s": count / (ran_cpu - cpu + exported_cpu - scanned_cpu),
        "run_s": ran - began,
        "resume_s": scanned - ran,
        "export_s": exported - scanned,
        "stats_s": ended - exported,
        "journal_rows_per_s": count / journal_s,
        "journal_bytes": sum(file.stat().st_size for file in job.path.glob("journal.db*")),
        "peak_rss": peak_rss(),
    }


def run_demo(folder: Path) -> dict[str, Any]:
    """The job of `make demo`, with clocks around the engine's steps and in the threads."""
    from batchrun.models.resolve import DEFAULT_MODEL, resolve  # noqa: PLC0415
    from batchrun.runner import job_run, opening  # noqa: PLC0415 - torch

    prompts = Path(__file__).parents[1] / "examples" / "prompts.parquet"
    model = resolve(DEFAULT_MODEL, folder / "models")
    spec = JobSpec(
        inputs=(InputFile.of(prompts),),
        input_format="parquet",
        prompt=PromptSpec(column="prompt", chat=True),
        model=ModelSpec(name=model.name, path=str(model.path), fingerprint=model.fingerprint),
        sampling=SamplingSpec(max_tokens=64),
        seed=1,
        output=OutputSpec(path=str(folder / "out.parquet"), format="parquet"),
    )
    in_steps = 0.0
    in_threads: dict[str, float] = {}
    run_thread = threading.Thread.run

    def timed_thread(thread: threading.Thread) -> None:
        run_thread(thread)
        in_threads[thread.name] = time.thread_time()

    def open_timed(spec: JobSpec, log: Callable[[str], None]) -> Any:
        runtime = opening.open_runtime(spec, log)
        step = runtime.engine.step

        def timed_step() -> Any:
            nonlocal in_steps
            began = time.perf_counter()
            ended = step()
            in_steps += time.perf_counter() - began
            return ended

        runtime.engine.step = timed_step  # type: ignore[method-assign]
        return runtime

    threading.Thread.run = timed_thread  # type: ignore[method-assign]
    job = create(folder, spec)
    job_run.run_job(job.path, stop=threading.Event(), open_workbench=open_timed)
    with job.journal() as journal:
        engine_s = journal.runs()[-1]["stats"]["engine_s"]
        rows = journal.counts().rows
    reader_s, writer_s = in_threads["reader"], in_threads["journal"]
    outside_s = engine_s - in_steps
    return {
        "rows": rows,
        "engine_s": engine_s,
        "outside_of_steps_s": outside_s,
        "reader_cpu_s": reader_s,
        "journal_cpu_s": writer_s,
        "share": (outside_s + reader_s + writer_s) / engine_s,
    }


def write_all(journal: Journal, rows: Iterator[Row]) -> float:
    """Answer every row with its own index and journal it; the seconds spent in the journal."""
    seconds = 0.0
    while group := list(islice(rows, GROUP)):
        answers, digests = [answer(row) for row in group], [(r.index, r.digest) for r in group]
        began = time.perf_counter()
        journal.write(answers, {"steps": 1}, digests=digests)
        seconds += time.perf_counter() - began
    return seconds


def answer(row: Row) -> Result:
    """What an engine that computes nothing says to a row."""
    text = f"{row.index}: {row.fields['prompt'][:100]}"
    tokens = tuple(range(row.index % 1000, row.index % 1000 + TOKENS))
    return Result(row.index, 0, "ok", text, tokens, "stop", 40, TOKENS, None, None, 0.1, 0.2, 3.0)


def check(output: Path, count: int) -> None:
    """Every row has its own answer: read back in batches."""
    index = 0
    with pq.ParquetFile(output) as file:
        for batch in file.iter_batches(4096, columns=["id", "completion"], use_threads=False):
            for number, text in zip(*(c.to_pylist() for c in batch.columns), strict=True):
                assert number == index
                assert text.startswith(f"{index}: ")
                index += 1
    assert index == count


if __name__ == "__main__":
    sys.exit(main())
