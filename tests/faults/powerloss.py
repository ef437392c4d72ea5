"""The power goes after every file operation of a small job: what was acknowledged is there.

    python -m tests.faults.powerloss              # every operation, eight draws of each
    python -m tests.faults.powerloss --stride 9   # after every ninth: a sample
    python -m tests.faults.powerloss --failed-syncs --stride 9    # each sync failed once before

A job is submitted, stopped halfway, resumed and exported while the library of shim.c records every
operation on its files. Each prefix of the record is then replayed onto an empty folder three ways:
without anything that was not synced, with all of it (the process died, the machine did not), and
with a random part of it, writes torn (tests/faults/disk.py). In each image the job must be there if
`submit` had returned, its journal must open and have every acknowledged row, the output must be
whole or absent; and a clean process must finish the job. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import platform
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from batchrun.jobs.output.destination import resuming
from tests.faults import shim
from tests.faults.disk import Disk, write_image
from tests.faults.shim import Fault, Kind, Operation
from tests.faults.smalljob import (
    DONE,
    ENDED_WITH_ERROR,
    INTERRUPTED,
    Ledger,
    SmallJob,
    forked,
    outcome_of,
)

ROWS = 9


@dataclass
class Acknowledged:
    """What the job's user was told so far."""

    submitted: bool = False
    finished: bool = False
    rows: set[int] = field(default_factory=set)

    def read(self, note: str) -> None:
        self.submitted = True  # the first thing to be noted
        self.finished |= note == "finished"
        if note.startswith("rows"):
            self.rows |= set(map(int, re.findall(r"\d+", note)))


def record_run(small: SmallJob, rows_first: int, fail_at: int = 0) -> list[Operation]:
    """Submit, stop after some rows, resume to the end; the operations on the job's files.

    Args:
        small: The job.
        rows_first: Acknowledged rows after which the first run is stopped.
        fail_at: The sync of the first process that fails; 0 for none.
    """
    ledger, record = Ledger(small.rows), small.root / "record"

    def work(stop_at: int | None) -> int:
        handle = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        shim.watch(small.home, handle)
        if stop_at is not None and fail_at:
            shim.arm(Fault.FAIL, {Kind.SYNC}, fail_at, errno.EIO)
        stop = threading.Event()

        def told(rows: list[int]) -> None:
            shim.note(f"rows {rows}")
            if stop_at is not None and len(ledger.acknowledged()) >= stop_at:
                stop.set()

        def no_further(ended: int) -> None:  # than a few rows ahead of the journal
            if stop_at is not None and ended > stop_at + 1:
                stop.wait(30)

        status = outcome_of(
            lambda: small.submit_and_run(
                ledger,
                on_submitted=lambda: shim.note("submitted"),
                on_acknowledged=told,
                before_step=no_further,
                stop=stop,
                slots=2,
            )
        )
        if status == DONE:
            shim.note("finished")
        return status

    first = forked(lambda: work(rows_first))
    assert first in ((ENDED_WITH_ERROR, INTERRUPTED) if fail_at else (INTERRUPTED,)), first
    assert forked(lambda: work(None)) == DONE
    return list(shim.read_record(record))


class Replay:
    """Images of one recorded run, each checked once."""

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        self.runs = 0
        self.seen: set[str] = set()
        self.images: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(
        self,
        small: SmallJob,
        operations: list[Operation],
        options: argparse.Namespace,
    ) -> None:
        """Check images of every `stride`-th prefix."""
        self.runs += 1
        self.operations.update(operation.kind.name.lower() for operation in operations)
        failed = any(o.kind == Kind.SYNC and o.offset for o in operations)
        struck = not failed  # before the failed sync all is as in a run without
        disk, told = Disk(str(small.home)), Acknowledged()
        for i, operation in enumerate(operations):
            struck |= operation.kind == Kind.SYNC and operation.offset > 0
            if not (options.lying_disk and operation.kind == Kind.SYNC):
                disk.apply(operation)
            if operation.kind == Kind.NOTE:
                told.read(operation.path)
            if not struck or (i % options.stride and i + 1 < len(operations)):
                continue
            images = {"nothing unsynced": disk.image(None)}
            if not failed:
                images["everything"] = disk.image(None, everything=True)
            for number in range(options.draws):
                draw = random.Random(f"{options.seed} {self.runs} {i} {number}")
                images[f"draw {number}"] = disk.image(draw)
            for name, image in images.items():
                self._check(f"after {i + 1} operations, {name}", name, image, small, told)

    def _check(
        self, where: str, name: str, image: dict[str, bytes], small: SmallJob, told: Acknowledged
    ) -> None:
        key = hashlib.blake2b(
            repr((sorted(image.items()), told.submitted, told.finished, told.rows)).encode()
        ).hexdigest()
        if key in self.seen:
            return
        self.seen.add(key)
        self.images[name.split(maxsplit=1)[0]] += 1
        shutil.rmtree(small.home)
        small.home.mkdir()
        write_image(image, small.home)
        try:
            verify(small, told)
        except Exception as error:
            self.problems.append(f"{where}: {type(error).__name__}: {error}")
            print(f"PROBLEM {self.problems[-1]}", file=sys.stderr)


def verify(small: SmallJob, told: Acknowledged) -> None:
    """Raises what is wrong with the folder, and with what a clean process makes of it."""
    jobs = small.jobs()
    assert len(jobs) == 1 or not (jobs or told.submitted), f"{len(jobs)} jobs"
    had = small.check_journal(jobs[0], told.rows) if jobs else set()
    assert small.output.exists() or not told.finished, "the output is lost"
    if small.output.exists():
        small.check_output()
        if jobs:  # in an image it is another file than the one that the job wrote
            with resuming(small.home, jobs[0], overwrite=True):
                pass
    ledger = Ledger(small.rows)
    for row in had:
        ledger.acknowledge(row)  # computing one of them again is refused
    status = forked(lambda: outcome_of(lambda: small.submit_and_run(ledger)))
    ledger.close()
    assert status == DONE, f"the resumed run ended with {status}"
    assert small.check_journal(small.jobs()[0], told.rows) == set(range(small.rows))
    small.check_output()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--stride", type=int, default=1, help="after every so many operations")
    parser.add_argument("--draws", type=int, default=8, help="random images of each prefix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--lying-disk", action="store_true", help="syncs do nothing: losses must be found"
    )
    parser.add_argument(
        "--failed-syncs", action="store_true", help="one sync after the other fails before"
    )
    options = parser.parse_args()
    if missing := shim.unsupported_reason():
        print(f"left out: {missing}")
        return 0
    scratch = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="powerloss-", dir=scratch) as name:
        if not shim.loaded():
            return shim.run_preloaded(Path(name), "tests.faults.powerloss", sys.argv[1:])
        began = time.perf_counter()
        replay = Replay()
        for fail_at in count(1) if options.failed_syncs else [0]:
            small = SmallJob(Path(name) / str(fail_at), ROWS)
            small.write_input()
            operations = record_run(small, ROWS // 2, fail_at)
            if fail_at and not any(o.kind == Kind.SYNC and o.offset for o in operations):
                break
            replay.run(small, operations, options)
            shutil.rmtree(small.root)
    total = replay.images.total()
    print(f"{replay.operations.total():,} operations, {total:,} different images")
    report = {
        "benchmark": "faults-powerloss",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rows": ROWS,
        "stride": options.stride,
        "draws": options.draws,
        "failed_syncs": replay.runs if options.failed_syncs else 0,
        "operations": dict(replay.operations),
        "images": dict(replay.images),
        "total": total,
        "problems": replay.problems,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(report))
    return 1 if replay.problems else 0


if __name__ == "__main__":
    sys.exit(main())
