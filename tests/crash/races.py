"""Two workers for one job, a hundred times: one writes, the other leaves with a message.

    python -m tests.crash.races --races 100

Three kinds, at a different step each time. *start*: both are let go at once; who has the job waits
until the other has left. *late*: the second comes when the first is at work. *fence*: the first
sleeps, the file system loses its lock, the second does the whole job, then the first wakes: it may
write nothing. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from batchrun.jobs import folder
from batchrun.jobs.errors import Fenced, LeaseHeld
from tests.faults.liveness import check_goes_on
from tests.faults.smalljob import DONE, Ledger, SmallJob, outcome_of

ROWS = 30
KINDS = ("start", "late", "fence")


class Worker:
    """A forked `run_job` that says when it is at a step, and there waits to be let go."""

    def __init__(self, small: SmallJob, ledger: Ledger, step: int | None) -> None:
        self._message, told = os.pipe()
        self._at_step, reached = os.pipe()
        goes, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._go)
                status = self._work(small, ledger, step, told, (reached, goes))
            finally:
                os._exit(status)
        for handle in (told, reached, goes):
            os.close(handle)

    def _work(
        self, small: SmallJob, ledger: Ledger, step: int | None, told: int, gate: tuple[int, int]
    ) -> int:
        reached, go = gate
        steps = 0

        def before_step(ended: int) -> None:
            nonlocal steps
            steps += 1
            if steps == step:
                os.write(reached, b".")
                os.read(go, 1)

        def run() -> object:
            try:
                return small.submit_and_run(ledger, before_step=before_step)
            except (LeaseHeld, Fenced) as error:
                os.write(told, f"{type(error).__name__}: {error}".encode())
                raise

        return outcome_of(run)  # type: ignore[arg-type]

    def at_step(self) -> bool:
        """Wait until it is at its step; False where it ended before."""
        return bool(os.read(self._at_step, 1))

    def let_go(self) -> None:
        os.write(self._go, b".")

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        _, code = os.waitpid(self.pid, 0)
        message = os.read(self._message, 4096).decode()
        for handle in (self._message, self._at_step, self._go):
            os.close(handle)
        return os.waitstatus_to_exitcode(code), message


def race(small: SmallJob, kind: str, step: int) -> str:
    """One race; what the one that left said.

    Raises:
        AssertionError: Both wrote, none did, or a row is not what it must be.
    """
    ledger = Ledger(small.rows)
    job = folder.create(small.home, small.spec())
    first = Worker(small, ledger, step)
    if kind == "start":
        second = Worker(small, ledger, step)
        ready, left = (first, second) if first.at_step() else (second, first)
        if ready is second:
            assert second.at_step()
        status, message = left.end()
        ready.let_go()
        done = ready.end()
    else:
        assert first.at_step()
        if kind == "fence":
            (job.path / "lock").unlink()
            done = Worker(small, ledger, None).end()
            results = small.check_journal(job, ledger.acknowledged())
            assert results == set(range(small.rows))
            first.let_go()
            status, message = first.end()
        else:
            status, message = Worker(small, ledger, None).end()
            first.let_go()
            done = first.end()
    assert done == (DONE, ""), done
    assert status != DONE, "two workers finished one job"
    assert message.startswith("Fenced" if kind == "fence" else "LeaseHeld"), message
    assert small.check_journal(job, ledger.acknowledged()) == set(range(small.rows))
    assert job.state() == "done-with-errors", job.state()
    small.check_output()
    check_goes_on(small.home)
    ledger.close()
    return message


def run_races(root: Path, races: int, on_race: Callable[[str, str], None]) -> None:
    """Races of each kind in turn, each at another step."""
    for number in range(races):
        small = SmallJob(root / str(number), ROWS)
        small.write_input()
        kind = KINDS[number % len(KINDS)]
        on_race(kind, race(small, kind, 1 + number // len(KINDS) % 25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--races", type=int, default=100)
    options = parser.parse_args()
    kinds: Counter[str] = Counter()
    said: Counter[str] = Counter()

    def note(kind: str, message: str) -> None:
        kinds[kind] += 1
        said[message.split(":", maxsplit=1)[0]] += 1
        print(f"{kind}: {message}", file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="races-") as name:
        began = time.perf_counter()
        run_races(Path(name), options.races, note)
    report = {
        "benchmark": "faults-races",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "races": dict(kinds),
        "total": kinds.total(),
        "left_with": dict(said),
        "outputs_right": True,  # `race` raises otherwise
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
