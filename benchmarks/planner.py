"""What planning costs, and what it saves.

    python -m benchmarks.planner [--rows 1000000] [--real]

A million rows of 200 tokens, a quarter of them after one of 1,000 prefixes of 100 tokens and one in
ten equal to an earlier one, go through the planner as the reader's thread sends them: packed,
looked up among the rows so far, put in order, unpacked, compared with the file's order. Two sizes
run, each in a process of its own, so that the peaks of memory compare. The time is set against that
of the fastest job there is for such rows: the embedded model, one token each, on the device of
`--tokens-per-s` (the default is what two cores computed in bfloat16: 400 GFLOP/s over 0.27 GFLOP a
token).

`--real ROWS` runs a job with `--reorder` and with `--no-reorder`: 8 questions each to documents of
300 tokens, in random order, with short answers. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from batchrun.engine.core import Request, SamplingParams
from batchrun.estimate.savings import Savings
from batchrun.jobs.journal.results import Result
from batchrun.machine import description, peak_rss
from batchrun.runner.duplicates import Duplicates
from batchrun.runner.planner import Planner, Waiting
from benchmarks.workloads import generate, write

PROMPT, PREFIX, PREFIXES = 200, 100, 1000  # tokens, tokens, prefixes
VOCABULARY = 49_152
TOKENS_PER_S = 1480.0
ALLOWED_SHARE, ALLOWED_RATIO = 0.01, 1.25


def requests(rows: int) -> Iterator[Request]:
    """The rows, drawn block by block so that only the planner's memory counts."""
    rng = np.random.default_rng(0)
    prefixes = rng.integers(VOCABULARY, size=(PREFIXES, PREFIX))
    params = SamplingParams(max_tokens=64)
    for first in range(0, rows, 1000):
        block = rng.integers(VOCABULARY, size=(1000, PROMPT))
        block[::4, :PREFIX] = prefixes[rng.integers(PREFIXES, size=250)]
        block[9::10] = block[rng.integers(0, 9, size=100)]
        for i, ids in enumerate(block.tolist()):
            yield Request(first + i, 0, tuple(ids), params, 0)


def plan(rows: int) -> dict[str, Any]:
    """Seconds a row of planning alone, and the peak of memory."""
    began = time.perf_counter()
    for request in requests(rows):
        assert request
    generated = time.perf_counter() - began
    known, planner, savings = Duplicates(1), Planner(), Savings(256, 1024, share=True)

    def claimed() -> Iterator[Waiting]:
        for request in requests(rows):
            waiting = Waiting.of(request)
            savings.read(waiting, 64)
            if (found := known.claim(waiting)) is True:
                yield waiting
            elif found:
                savings.end(request.row, 0, found.tokens)

    began = time.perf_counter()
    computed = 0
    # Whoever takes them is slow: the most there can be are planned at once, and all twice.
    for waiting in planner.planned(claimed(), lambda: True):
        request = waiting.request()
        savings.put(waiting, 64)
        result = Result(request.row, 0, "ok", completion_tokens=64)
        for ended in (result, *known.settle(request, result)):
            savings.end(ended.row, 0, 64)
        computed += 1
    seconds = time.perf_counter() - began - generated
    assert computed + known.rows == rows
    return {
        "rows": rows,
        "seconds": seconds,
        "us_a_row": 1e6 * seconds / rows,
        "ordering_s": planner.seconds,
        "duplicates": known.rows,
        "saved": savings.saved()._asdict(),
        "peak_rss": peak_rss(),
    }


def real(rows: int) -> dict[str, Any]:
    """One file with a plan and without."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="planner-") as folder:
        source, output = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        short = (replace(r, max_tokens=4 + r.max_tokens % 8) for r in generate("documents", rows))
        write(source, short)
        answers = {}
        for option in ("--reorder", "--no-reorder"):
            command = [sys.executable, "-m", "batchrun", "submit", source, "--output", output]
            command += ["--overwrite", "--again", "--token-ids", option]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            shown = subprocess.run(
                [sys.executable, "-m", "batchrun", "stats", "--json"],
                check=True,
                capture_output=True,
            )
            stats = json.loads(shown.stdout)
            answers[option] = output.read_text()
            found[option.strip("-")] = {
                "engine_s": stats["time"]["engine_s"],
                "prefilled": stats["tokens"]["prefilled"],
                "shared": stats["tokens"]["shared"],
                "steps": stats["batch"]["steps"],
                "tail_s": stats["batch"]["tail_s"],
                "plan_s": stats["time"]["plan_s"],
            }
            print(option, found[option.strip("-")], flush=True)
        found["same_rows"] = sum(
            a == b for a, b in zip(*(text.splitlines() for text in answers.values()), strict=True)
        )
    found["ratio"] = found["no-reorder"]["engine_s"] / found["reorder"]["engine_s"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens-per-s", type=float, default=TOKENS_PER_S)
    parser.add_argument("--real", type=int, metavar="ROWS", help="run a job, planned and not")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(plan(args.one)))
        return 0
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    if args.real is not None:
        found = {
            "benchmark": "planner-real",
            "command": f"python -m benchmarks.planner --real {args.real}",
            "date": time.strftime("%Y-%m-%d"),
            "machine": description(),
            "rows": args.real,
            **real(args.real),
        }
        print(json.dumps(found))
        return 0
    command = [sys.executable, "-m", "benchmarks.planner", "--one"]
    small, large = (
        json.loads(subprocess.run([*command, str(n)], check=True, capture_output=True).stdout)
        for n in (args.rows // 10, args.rows)
    )
    job_s = args.rows * (PROMPT + 1) / args.tokens_per_s
    share, ratio = large["seconds"] / job_s, large["peak_rss"] / small["peak_rss"]
    print(
        f"{large['rows']:,} rows: {large['us_a_row']:.1f} us a row, {share:.4%} of a job of "
        f"{job_s:,.0f} s; peak memory {large['peak_rss'] / 2**20:.0f} MiB, "
        f"{ratio:.3f} times that of {small['rows']:,} rows"
    )
    found = {"small": small, "large": large, "job_s": job_s, "share": share, "ratio": ratio}
    print(json.dumps({"benchmark": "planner", **found}))
    return 0 if share <= ALLOWED_SHARE and ratio <= ALLOWED_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
