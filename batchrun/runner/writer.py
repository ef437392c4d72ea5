"""The journal's writer: the only thread of a run that writes results."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from batchrun.jobs.files import check_room, disk_of
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.journal.journal import READ, Journal
from batchrun.jobs.journal.results import (
    CopiedResult,
    Counts,
    DoneSet,
    Partial,
    Result,
    RowDigests,
)
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.spec import JobSpec
from batchrun.runner.channel import Channel, Closed
from batchrun.runner.figures import RunFigures
from batchrun.runner.watchdog import Watchdog

COMMIT_RESULTS = 1024  # results in one transaction at most
_COMMIT_SECONDS = 0.5  # and the longest that a finished one waits for it
_ROOM_SECONDS = 5.0  # between two looks at how full the disks are
_RESULT_BYTES = 100  # of a journal: no result takes less

Item = Result | CopiedResult | RowDigests | list[Partial]  # what unfinished rows have replaces it


@dataclass(slots=True)
class _Pending:
    """What the next transaction writes."""

    results: list[Result | CopiedResult] = field(default_factory=list)
    partials: list[Partial] = field(default_factory=list)
    digests: list[tuple[int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.results or self.partials or self.digests)

    def add(self, item: Item) -> None:
        if isinstance(item, Result | CopiedResult):
            self.results.append(item)
        elif isinstance(item, RowDigests):
            self.digests += item.digests
        else:
            self.partials = item


@dataclass
class JournalWriter:
    """Commits what comes in groups, each durable before it counts, and watches the disks.

    Args:
        job: Whose journal.
        spec: Its specification.
        number: Of the run that writes.
        total: Rows of the job.
        earlier: What earlier runs did.
        figures: Written with each group.
        watchdog: Told when it writes.
        log: Told once that a disk will be full.

    Attributes:
        samples: Results in the journal, those of earlier runs included.
        failed: Rows among them that have an error.
    """

    job: JobFolder
    spec: JobSpec
    number: int
    total: int
    earlier: Counts
    figures: RunFigures
    watchdog: Watchdog
    log: Callable[[str], None]

    def __post_init__(self) -> None:
        self._output = Path(self.spec.output.path)
        self.samples, self.failed = self.earlier.samples, self.earlier.failed
        self._failed_rows = DoneSet(1)
        self._warned, self._look = False, 0.0

    @property
    def missing(self) -> int:
        """Results that the job has not yet."""
        return self.total * self.spec.n - self.samples

    def run(self, columns: list[str], results: Channel[Item]) -> None:
        """Write what comes until nothing more does.

        Args:
            columns: What is read of each row.
            results: Closed by those who send.

        Raises:
            JournalError: The journal can't be written, or is another run's by now.
            OutputError: There is no room for more.
        """
        with Journal(self.job.path, self.spec.n) as journal:
            journal.resume_run(self.number)
            if journal.meta(READ) is None:
                journal.set_meta(READ, columns)
            pending, deadline, open_ = _Pending(), 0.0, True
            while open_ or pending:
                timeout = max(0.001, deadline - time.monotonic()) if pending else None
                try:
                    taken = results.take(COMMIT_RESULTS - len(pending.results), timeout)
                except Closed:
                    taken, open_ = [], False
                if taken and not pending:
                    deadline = time.monotonic() + _COMMIT_SECONDS
                for item in taken:
                    pending.add(item)
                due = not open_ or time.monotonic() >= deadline
                if pending and (due or len(pending.results) >= COMMIT_RESULTS):
                    self._commit(journal, pending)
                    pending = _Pending()

    def check_room_ahead(self) -> None:
        """Refuse what can't fit: of results and output the least that they can take.

        Raises:
            OutputError: There is no room.
        """
        spec = self.spec
        copied = 0 if spec.limit else sum(file.size for file in spec.inputs) // 4
        results = self.missing * _RESULT_BYTES
        check_room((disk_of(self.job.path), results), (OUTPUTS.disk(self._output), copied))

    def _commit(self, journal: Journal, pending: _Pending) -> None:
        ended = {(r.row, r.sample) for r in pending.results}
        begun = [p for p in pending.partials if (p.row, p.sample) not in ended]
        figures = self.figures.observed()
        began = time.perf_counter()
        with self.watchdog.busy("writing the journal"):
            journal.write(pending.results, figures, begun, pending.digests)
        self.figures.counted["journal_s"] += time.perf_counter() - began
        self.samples += len(pending.results)
        self._count_failures(pending.results)
        if time.monotonic() >= self._look:
            self._watch_room()
            self._look = time.monotonic() + _ROOM_SECONDS

    def _count_failures(self, results: list[Result | CopiedResult]) -> None:
        """A row has failed when any of its samples has; what is copied has not."""
        for result in results:
            failed = isinstance(result, Result) and result.status == "error"
            if failed and (result.row, 0) not in self._failed_rows:
                self._failed_rows.add(result.row)
                self.failed += 1

    def _watch_room(self) -> None:
        """End the run before a disk is full; say once, early, that one will be."""
        path, disk = self.job.path, disk_of(self.job.path)
        check_room((disk, 0), (OUTPUTS.disk(self._output), 0))
        size = sum(file.stat().st_size for file in path.glob("journal.db*"))
        needed = size * self.missing // max(1, self.samples)
        if disk.free < needed and not self._warned and self.samples > COMMIT_RESULTS:
            self._warned = True
            self.log(
                f"the disk of {path} has {disk.free / 2**30:.1f} GiB left and the job will "
                f"need about {needed / 2**30:.1f} GiB: it will stop, and can be resumed"
            )
