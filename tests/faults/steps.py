"""A fault at every step: the n-th write, sync, rename of a small job fails or is its last.

    python -m tests.faults.steps              # every n, until a run ends unharmed
    python -m tests.faults.steps --stride 9   # every ninth: a sample

SIGKILL, EIO and ENOSPC are injected by strace into the thread that submits, computes and exports,
then into the one that writes the journal. Writes that do half, writes that do half before
SIGKILL, and syncs that fail are injected by the library of shim.c, counted over all threads. After
each fault the journal must open and have every acknowledged row, and a clean process must finish
the job: no row lost, doubled, changed or computed again. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import shim
from tests.faults.liveness import check_goes_on
from tests.faults.shim import Fault, Kind, Operation
from tests.faults.smalljob import BUG, DONE, Ledger, SmallJob, forked, outcome_of

ROWS = 7
SYSCALLS = ("write", "pwrite64", "fsync", "fdatasync", "rename", "link", "ftruncate", "unlink")
THREADS = ("MainThread", "journal")
STRACE = {"SIGKILL": "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC"}
LIBRARY = {
    "short write": (Fault.SHORT, Kind.WRITE),
    "torn write": (Fault.TORN, Kind.WRITE),
    "failed sync": (Fault.FAIL, Kind.SYNC),
}
MOST = 2000  # no run has as many steps
NEXT_JOB = 16  # after one in so many faults another job is run too


@dataclass
class Tally:
    """What the cases came to."""

    cases: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    syncs_after_failure: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, fault: str, status: int, found: list[str]) -> None:
        self.cases[fault] += 1
        ended = "killed" if status < 0 else "went on" if status == DONE else "failed with a message"
        self.outcomes["internal error" if status == BUG else ended] += 1
        for problem in found:
            self.problems.append(f"{name}: {problem}")
            print(f"PROBLEM {self.problems[-1]}", file=sys.stderr)


class Case:
    """A fresh job for each fault, in one place."""

    def __init__(self, root: Path, rows: int = ROWS) -> None:
        self.small = SmallJob(root, rows)
        self.ledger = Ledger(rows)
        self._verified = 0

    def prepare(self) -> None:
        shutil.rmtree(self.small.root, ignore_errors=True)
        self.small.write_input()
        self.ledger.clear()

    def verify(self) -> list[str]:
        """What is wrong after the fault, and after a clean process has gone on; best nothing."""
        try:
            self._verify()
        except AssertionError as error:
            return [str(error) or repr(error)]
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
        return []

    def _verify(self) -> None:
        small, ledger = self.small, self.ledger
        jobs = small.jobs()
        assert len(jobs) <= 1
        assert jobs or not ledger.submitted, "the job is lost"
        if jobs:
            small.check_journal(jobs[0], ledger.acknowledged())
        assert small.output.exists() or not ledger.finished, "the output is lost"
        if small.output.exists():
            small.check_output()
        self._verified += 1
        check_goes_on(small.home, next_job=self._verified % NEXT_JOB == 1)
        status = forked(lambda: outcome_of(lambda: small.submit_and_run(ledger)))
        assert status == DONE, f"the resumed run ended with {status}"
        [job] = small.jobs()
        assert small.check_journal(job, ledger.acknowledged()) == set(range(small.rows))
        assert job.state() == "done-with-errors", job.state()
        small.check_output()
        left = [p for folder in (small.home, job.path) for p in folder.glob(".*.tmp")]
        assert not left, f"left behind: {left}"


def strace_case(case: Case, thread: str, syscall: str, fault: str, n: int) -> tuple[str, int]:
    """The call that the fault struck, empty if it struck none, and how the process ended."""
    ready, go = os.pipe(), os.pipe()
    log = case.small.root / "strace.log"
    waited = False

    def gate(ended: int) -> None:
        nonlocal waited
        if waited:
            return
        waited = True
        ids = {t.name: t.native_id for t in threading.enumerate()}
        ids["MainThread"] = os.getpid()  # Python keeps the parent's after a fork
        os.write(ready[1], json.dumps(ids).encode())
        os.read(go[0], 1)

    def work() -> int:
        os.close(ready[0])
        if thread == "MainThread":  # from the beginning; others once they are there
            gate(0)
        return outcome_of(lambda: case.small.submit_and_run(case.ledger, before_step=gate))

    def attach(pid: int) -> None:
        os.close(ready[1])
        told = os.read(ready[0], 4096)
        if told and (target := json.loads(told).get(thread)):
            inject = f"inject={syscall}:{STRACE[fault]}:when={n}"
            command = ["strace", "-y", "-e", f"trace={syscall}", "-e", inject, "-o", str(log)]
            with subprocess.Popen(
                [*command, "-p", str(target)], stderr=subprocess.PIPE, text=True
            ) as tracer:
                assert tracer.stderr is not None
                said = tracer.stderr.readline()
                assert "attached" in said, said
                os.write(go[1], b".")
        else:
            os.write(go[1], b".")

    try:
        status = forked(work, attach)
    finally:
        for handle in (ready[0], *go):
            os.close(handle)
    if status < 0:
        return "SIGKILL", status
    lines = log.read_text().splitlines() if log.exists() else []
    struck = next((line for line in lines if "INJECTED" in line), "")
    assert str(case.small.root) in struck or not struck, f"not an operation on the job: {struck}"
    return struck, status


def library_case(case: Case, fault: str, n: int) -> tuple[bool, int, list[str], Counter[str]]:
    """The same by the library of shim.c; and what is wrong, and syncs after a failed one."""
    what, kind = LIBRARY[fault]
    record = case.small.root / "record"

    def work() -> int:
        handle = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        shim.watch(case.small.home, handle)
        shim.arm(what, {kind}, n, errno.EIO)
        status = outcome_of(
            lambda: case.small.submit_and_run(
                case.ledger, on_acknowledged=lambda rows: shim.note(f"acknowledged {rows}")
            )
        )
        shim.note("struck" if shim.was_hit() else "unharmed")
        return status

    status = forked(work)
    operations = list(shim.read_record(record))
    struck = status < 0 or operations[-1].path == "struck"
    problems: list[str] = []
    later: Counter[str] = Counter()
    for i, bad in enumerate(operations):
        if bad.kind == Kind.SYNC and bad.offset:
            after = operations[i + 1 :]
            again = [o for o in after if o.kind == Kind.SYNC and o.file == bad.file]
            later.update(["directory" if bad.other else Path(bad.path).name] * len(again))
            problems = _relied_on(bad, after, status)
    return struck, status, problems, later


def _relied_on(bad: Operation, after: list[Operation], status: int) -> list[str]:
    """What was acknowledged though a sync had failed.

    SQLite does not say that it could not sync a directory: then the next sync of it counts.
    """
    name = Path(bad.path).name
    found = []
    for operation in after:
        if operation.kind == Kind.SYNC and operation.file == bad.file and bad.other:
            return []
        if operation.kind == Kind.NOTE and operation.path.startswith("acknowledged"):
            found = [f"{operation.path} after a failed sync of {name}"]
            break
    if status == DONE and not bad.other:
        found.append(f"the run went on after a failed sync of {name}")
    return found


def steps(stride: int) -> Iterator[int]:
    yield from range(1, MOST, stride)
    raise AssertionError(f"a run has {MOST} steps: the fault never passed it by")


def run_strace(case: Case, tally: Tally, stride: int) -> None:
    for thread in THREADS:
        for syscall in SYSCALLS:
            for fault in STRACE:
                for n in steps(stride):
                    case.prepare()
                    struck, status = strace_case(case, thread, syscall, fault, n)
                    name = f"{fault} at {syscall} {n} of {thread}"
                    found = case.verify()
                    if not struck:
                        assert status == DONE, f"{name} did not strike, and ended with {status}"
                        assert not found, f"{name} did not strike: {found}"
                        break
                    if status == BUG:
                        found.append("an internal error, not a message")
                    # A directory's that SQLite makes: see `_relied_on`, by the library.
                    if "sync" in syscall and status == DONE and "journal.db" in struck:
                        found.append(f"the run went on after {struck}")
                    tally.add(name, fault, status, found)


def run_library(case: Case, tally: Tally, stride: int) -> None:
    for fault in LIBRARY:
        for n in steps(stride):
            case.prepare()
            struck, status, found, later = library_case(case, fault, n)
            found += case.verify()
            if not struck:
                assert status == DONE
                assert not found, found
                break
            if status == BUG:
                found.append("an internal error, not a message")
            tally.syncs_after_failure.update(later)
            tally.add(f"{fault} {n}", fault, status, found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--stride", type=int, default=1, help="every so many steps")
    parser.add_argument("--only", choices=["strace", "library"])
    options = parser.parse_args()
    scratch = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="steps-", dir=scratch) as name:
        if not shim.loaded() and shim.unsupported_reason() is None:
            return shim.run_preloaded(Path(name), "tests.faults.steps", sys.argv[1:])
        case, tally, began = Case(Path(name) / "case"), Tally(), time.perf_counter()
        parts: list[tuple[str, str | None, Callable[[Case, Tally, int], None]]] = [
            ("strace", None if shutil.which("strace") else "no strace", run_strace),
            ("library", shim.unsupported_reason(), run_library),
        ]
        for part, missing, run in parts:
            if options.only not in (None, part):
                continue
            if missing:
                print(f"{part}: left out, {missing}")
                continue
            run(case, tally, options.stride)
    for fault, count in tally.cases.items():
        print(f"{fault:12} {count:5,} cases")
    report = {
        "benchmark": "faults-steps",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rows": ROWS,
        "stride": options.stride,
        "cases": dict(tally.cases),
        "total": tally.cases.total(),
        "outcomes": dict(tally.outcomes),
        "syncs_of_the_same_file_after_a_failed_one": dict(tally.syncs_after_failure),
        "problems": tally.problems,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(report))
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
