"""How long it takes to list 10,000 jobs.

    python -m tests.faults.listing          # the job layer: their folders, and each in a line
    python -m tests.faults.listing --cli    # `batchrun list` too, its process's start included

One small job is run; the others are folders with links to its files. The last line of stdout is
JSON.
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
from pathlib import Path

from batchrun.jobs.folder import JobFolder, list_jobs
from tests.faults.smalljob import Ledger, SmallJob

ROUNDS = 3


def multiply(job: JobFolder, times: int) -> None:
    """Jobs that share the files of one."""
    files = [entry.name for entry in os.scandir(job.path) if entry.is_file()]
    for number in range(1, times):
        copy = job.path.with_name(f"{job.id}-{number:05}")
        copy.mkdir()
        for name in files:
            os.link(job.path / name, copy / name)


def measure_briefs(home: Path, jobs: int) -> tuple[float, float]:
    """Seconds, and those of processor time, to find all jobs and describe each: the least."""
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter(), time.process_time()
        listed = [job.snapshot() for job in list_jobs(home)]
        seconds.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        assert len(listed) == jobs
        assert {snapshot.state for snapshot in listed} == {"done-with-errors"}
    return min(wall for wall, _ in seconds), min(cpu for _, cpu in seconds)


def measure_cli(home: Path, jobs: int) -> float:
    """Seconds of `batchrun list`: the least."""
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "batchrun", "list", "--json"],
            env={**os.environ, "BATCHRUN_HOME": str(home)},
            capture_output=True,
            check=True,
        )
        seconds.append(time.perf_counter() - began)
        listed = json.loads(done.stdout)
        assert len(listed) == jobs
        assert {job["state"] for job in listed} == {"done-with-errors"}
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where to make them")
    parser.add_argument("--cli", action="store_true", help="measure the command too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="listing-", dir=options.folder) as name:
        small = SmallJob(Path(name) / "case", 9)
        small.write_input()
        small.submit_and_run(Ledger(9))
        [job] = small.jobs()
        if not (job.path / "state.json").exists():
            job.set_state(job.state())
        multiply(job, options.jobs)
        wall, cpu = measure_briefs(small.home, options.jobs)
        command = measure_cli(small.home, options.jobs) if options.cli else None
    report = {
        "benchmark": "faults-listing",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jobs": options.jobs,
        "briefs_s": round(wall, 3),
        "briefs_cpu_s": round(cpu, 3),
        "list_command_s": None if command is None else round(command, 3),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
