"""A fault at every step of what is done to jobs between runs: make, move, retry, remove.

    python -m tests.faults.operations              # every step, until one ends unharmed
    python -m tests.faults.operations --stride 9   # every ninth: a sample

Each operation is done to the same prepared job in a process of its own, and the n-th step of it is
its last, fails, or does half (shim.c). It must have been done wholly or not at all, say so unless
it was killed, and a clean process that does it again and goes on must bring the job to its right
end. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from batchrun.jobs import folder
from batchrun.jobs.identity import move
from batchrun.runner.job_run import Outcome
from tests.faults import shim
from tests.faults.liveness import check_goes_on
from tests.faults.shim import Fault, Kind
from tests.faults.smalljob import BUG, DONE, INTERRUPTED, Ledger, SmallJob, forked, outcome_of
from tests.faults.steps import NEXT_JOB, steps

ROWS = 7
CHANGES = set(Kind) - {Kind.NOTE, Kind.SYNC}
FAULTS = {
    "SIGKILL": (Fault.KILL, CHANGES | {Kind.SYNC}, 0),
    "EIO": (Fault.FAIL, CHANGES, errno.EIO),
    "ENOSPC": (Fault.FAIL, {Kind.WRITE, Kind.CREATE, Kind.MKDIR}, errno.ENOSPC),
    "short write": (Fault.SHORT, {Kind.WRITE}, 0),
    "torn write": (Fault.TORN, {Kind.WRITE}, 0),
    "failed sync": (Fault.FAIL, {Kind.SYNC}, errno.EIO),
}


class Scene:
    """A job, its state before the operation, and what is known of its rows."""

    def __init__(self, root: Path) -> None:
        self.small = SmallJob(root, ROWS)
        self.small.write_input()
        self.ledger = Ledger(ROWS)
        self.moved = root / "elsewhere" / "prompts.parquet"
        self._kept = root / "kept"
        self._faults = 0

    def run(self, stop_at: int = ROWS) -> int:
        """Run the job in a process, to its end or until so many rows are acknowledged."""

        def work() -> Outcome:
            def die(rows: list[int]) -> None:
                if len(self.ledger.acknowledged()) >= stop_at:
                    os._exit(INTERRUPTED)

            return self.small.submit_and_run(self.ledger, on_acknowledged=die)

        def whole() -> Outcome:
            return self.small.submit_and_run(self.ledger)

        return forked(lambda: outcome_of(work if stop_at < ROWS else whole))

    def keep(self) -> None:
        """What there is now is what each case begins with."""
        self._copy(self.small.home, self._kept)
        self._acknowledged = self.ledger.acknowledged()

    def restore(self) -> None:
        shutil.rmtree(self.small.home)
        self._copy(self._kept, self.small.home)
        self.ledger.clear()
        for row in self._acknowledged:
            self.ledger.acknowledge(row)

    def _copy(self, old: Path, new: Path) -> None:
        """The output is the very file: nothing writes into it, and the job knows it again."""

        def copy(source: str, target: str) -> None:
            output = Path(source).name == self.small.output.name
            os.link(source, target) if output else shutil.copy2(source, target)

        shutil.copytree(old, new, copy_function=copy)

    def is_due(self) -> bool:
        """Whether another job is to be run too, after this fault."""
        self._faults += 1
        return self._faults % NEXT_JOB == 1

    @property
    def answered(self) -> set[int]:
        """Rows that must stay answered; the last one's answer is an error."""
        return self.ledger.acknowledged() - {ROWS - 1}


@dataclass(frozen=True)
class Operation:
    """What is done to a job.

    Args:
        prepare: Makes what is there before.
        do: Does it.
        done: Whether it was done; raises where it was done by half.
    """

    prepare: Callable[[Scene], object]
    do: Callable[[Scene], object]
    done: Callable[[Scene], bool]


def _halfway(scene: Scene) -> None:
    assert scene.run(stop_at=ROWS // 2) == INTERRUPTED


def _move_input(scene: Scene) -> None:
    _halfway(scene)
    scene.moved.parent.mkdir()
    scene.small.prompts.rename(scene.moved)


def _relocate(scene: Scene) -> None:
    move(scene.small.jobs()[0], str(scene.small.prompts.parent), str(scene.moved.parent))


OPERATIONS = {
    "create": Operation(
        prepare=lambda scene: None,
        do=lambda scene: folder.create(scene.small.home, scene.small.spec()),
        done=lambda scene: bool(scene.small.jobs()),
    ),
    "relocate": Operation(
        prepare=_move_input,
        do=_relocate,
        done=lambda scene: scene.small.jobs()[0].spec().inputs[0].path == str(scene.moved),
    ),
    "retry": Operation(
        prepare=lambda scene: scene.run(),
        do=lambda scene: scene.small.jobs()[0].retry_failed(),
        done=lambda scene: scene.small.jobs()[0].counts().samples == ROWS - 1,
    ),
    "remove": Operation(
        prepare=_halfway,
        do=lambda scene: scene.small.jobs()[0].remove(),
        done=lambda scene: not scene.small.jobs(),
    ),
}


def cut(scene: Scene, operation: Operation, fault: str, n: int) -> tuple[bool, int]:
    """Do it with a fault at its n-th step: whether that struck, and how the process ended."""
    what, kinds, error = FAULTS[fault]
    record = scene.small.root / "record"

    def work() -> int:
        shim.watch(scene.small.home, os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
        shim.arm(what, kinds, n, error)

        def do() -> Outcome:
            operation.do(scene)
            return Outcome.DONE

        status = outcome_of(do)
        shim.note("struck" if shim.was_hit() else "unharmed")
        return status

    status = forked(work)
    return status < 0 or list(shim.read_record(record))[-1].path == "struck", status


def check(scene: Scene, operation: Operation, name: str, status: int) -> None:
    """Raises unless it was done or not, and the job can be brought to its right end.

    Raises:
        AssertionError: Something is lost, or done by half.
    """
    small = scene.small
    assert status != BUG, "an internal error, not a message"
    done = operation.done(scene)
    assert done or status != DONE, "it is not done, and said that it was"
    for job in small.jobs() if name != "relocate" or done else []:  # its input is gone till then
        rows = small.check_journal(job, scene.answered)
        assert name != "retry" or done == (ROWS - 1 not in rows)
    if status >= 0:
        left = [*small.home.glob("jobs/.*"), *small.home.glob("jobs/*/.*.tmp")]
        assert not left or name == "remove", f"left behind: {left}"
    check_goes_on(small.home, next_job=scene.is_due())
    if name == "remove" and not small.jobs():
        return

    def again() -> Outcome:
        if small.jobs() and not (name == "retry" and done):
            operation.do(scene)
        return Outcome.DONE

    if name != "create":
        assert forked(lambda: outcome_of(again)) == DONE, "it can't be done again"
    if name == "remove":
        assert not small.jobs()
        return
    assert scene.run() == DONE, "the job can't go on"
    [job] = small.jobs()
    assert small.check_journal(job, scene.answered) == set(range(ROWS))
    small.check_output()


def run(root: Path, stride: int, cases: dict[str, Counter[str]]) -> list[str]:
    """Every operation with every fault; what is wrong."""
    problems = []
    for name, operation in OPERATIONS.items():
        scene = Scene(root / name)
        operation.prepare(scene)
        scene.keep()
        counted = cases.setdefault(name, Counter())
        for fault in FAULTS:
            for n in steps(stride):
                scene.restore()
                struck, status = cut(scene, operation, fault, n)
                assert struck or status == DONE, f"{name} ended with {status}, unharmed"
                try:
                    check(scene, operation, name, status)
                except Exception as error:
                    problems.append(f"{name}, {fault} {n}: {type(error).__name__}: {error}")
                    print(f"PROBLEM {problems[-1]}", file=sys.stderr)
                if not struck:
                    break
                counted[fault] += 1
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--stride", type=int, default=1, help="every so many steps")
    options = parser.parse_args()
    if missing := shim.unsupported_reason():
        print(f"left out: {missing}")
        return 0
    scratch = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="operations-", dir=scratch) as name:
        if not shim.loaded():
            return shim.run_preloaded(Path(name), "tests.faults.operations", sys.argv[1:])
        cases: dict[str, Counter[str]] = {}
        began = time.perf_counter()
        problems = run(Path(name), options.stride, cases)
    for operation, counted in cases.items():
        print(f"{operation:10} {counted.total():5,} cases")
    report = {
        "benchmark": "faults-operations",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rows": ROWS,
        "stride": options.stride,
        "cases": {operation: dict(counted) for operation, counted in cases.items()},
        "total": sum(counted.total() for counted in cases.values()),
        "problems": problems,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(report))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
