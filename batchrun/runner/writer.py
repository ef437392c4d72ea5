"""The journal's writer: the only thread of a run that writes results."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from batchrun.jobs.errors import JobError
from batchrun.jobs.files import check_room, disk_of
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.journal.journal import READ, Journal
from batchrun.jobs.journal.results import (
    CopiedResult,
    Counts,
    Crashed,
    DoneSet,
    Partial,
    Result,
    RowDigests,
)
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.spec import JobSpec
from batchrun.objectstore.paths import location
from batchrun.runner.channel import Channel, Closed
from batchrun.runner.failing import SameFailure
from batchrun.runner.figures import RunFigures
from batchrun.runner.watchdog import Watchdog

COMMIT_RESULTS = 1024  # results or other items, after which a transaction is due
_COMMIT_SECONDS = 0.5  # the longest that a finished one waits for it
_ROOM_SECONDS = 5.0  # between two looks at how full the disks are
_RESULT_BYTES = 100  # the least that a result takes in a journal

Item = Result | CopiedResult | RowDigests | Crashed | list[Partial]


@dataclass
class JournalWriter:
    """Commits items in groups, each durable before it counts, and watches the disks.

    Args:
        job: The job.
        spec: Its specification.
        number: Number of the run that writes.
        total: Number of rows of the job.
        earlier: Results of earlier runs.
        figures: Written with each group.
        watchdog: Told when it writes.
        log: Told once that a disk will fill up.

    Attributes:
        samples: Results in the journal, including those of earlier runs.
        failed: Rows among them that have an error.
        reasons: Results with an error, by kind, of this run alone.
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
        self._output = location(self.spec.output.path)
        self.samples, self.failed = self.earlier.samples, self.earlier.failed
        self.reasons: Counter[str] = Counter()
        self._failed_rows = DoneSet(1)
        self._warned, self._look = False, 0.0
        self._failing: SameFailure | None = None

    @property
    def missing(self) -> int:
        """Number of results that are still missing."""
        return self.total * self.spec.n - self.samples

    def run(self, columns: list[str], results: Channel[Item]) -> None:
        """Write items until the channel is closed.

        Args:
            columns: The columns read of each row.
            results: Closed by its senders.

        Raises:
            JournalError: The journal can't be written, or another run has taken it over.
            OutputError: There is no room for more.
            JobError: All rows so far failed the same way; they are in the journal.
        """
        failure: JobError | None = None
        with self.journal() as journal:
            if journal.meta(READ) is None:
                journal.set_meta(READ, columns)
            pending: list[Item] = []
            deadline, open_ = 0.0, True
            while open_ or pending:
                timeout = max(0.001, deadline - time.monotonic()) if pending else None
                try:
                    taken = results.take(COMMIT_RESULTS, timeout)
                except Closed:
                    taken, open_ = [], False
                taken, failure = self._until_all_failed(taken, pending)
                if taken and not pending:
                    deadline = time.monotonic() + _COMMIT_SECONDS
                pending += taken
                due = not open_ or failure is not None or time.monotonic() >= deadline
                if pending and (due or len(pending) >= COMMIT_RESULTS):
                    self._commit(journal, pending)
                    pending = []
                if failure is not None:
                    raise failure

    @contextmanager
    def journal(self) -> Iterator[Journal]:
        """The job's journal, open for writing as this run."""
        with Journal(self.job.path, self.spec.n) as journal:
            journal.resume_run(self.number)
            yield journal

    def check_room_ahead(self) -> None:
        """Refuse a job whose results and output can't fit, even at their smallest.

        Raises:
            OutputError: There is no room.
        """
        spec = self.spec
        copied = 0 if spec.limit else sum(file.size for file in spec.inputs) // 4
        results = self.missing * _RESULT_BYTES
        check_room((disk_of(self.job.path), results), (OUTPUTS.disk(self._output), copied))

    def check_failures(self) -> None:
        """Refuse to go on if all rows of earlier runs failed the same way.

        Raises:
            JobError: They did.
        """
        if self.spec.runtime.keep_going:
            return
        with self.journal() as journal:
            self._failing = SameFailure(self.job.id, lambda: self.figures.requests, journal)
        if (failure := self._failing.error()) is not None:
            raise failure

    def _until_all_failed(
        self, taken: list[Item], pending: list[Item]
    ) -> tuple[list[Item], JobError | None]:
        """The items up to the last that the job needs, and why it ends there; None if it doesn't.

        A job whose last rows they are is done either way.
        """
        if (failing := self._failing) is None:
            return taken, None
        missing = self.missing - sum(isinstance(i, Result | CopiedResult) for i in pending)
        for number, item in enumerate(taken):
            if isinstance(item, Result | CopiedResult):
                missing -= 1
                failing.see(item)
                if missing and (failure := failing.error()) is not None:
                    return taken[: number + 1], failure
        return taken, None

    def _commit(self, journal: Journal, pending: list[Item]) -> None:
        results = [item for item in pending if isinstance(item, Result | CopiedResult)]
        digests = [d for item in pending if isinstance(item, RowDigests) for d in item.digests]
        partials = [p for item in pending if isinstance(item, list) for p in item]
        ended = {(r.row, r.sample) for r in results}
        newest = {(p.row, p.sample): p for p in partials}
        begun = [p for key, p in newest.items() if key not in ended]
        figures = self.figures.observed()
        began = time.perf_counter()
        with self.watchdog.busy("writing the journal"):
            journal.write(results, figures, begun, digests)
            for item in pending:
                if isinstance(item, Crashed):
                    journal.count_crash(item.rows)
        self.figures.counted["journal_s"] += time.perf_counter() - began
        self.samples += len(results)
        for result in results:  # a row has failed when any of its samples has
            if isinstance(result, Result) and result.status == "error":
                self.reasons[result.error_kind or "error"] += 1
                if (result.row, 0) not in self._failed_rows:
                    self._failed_rows.add(result.row)
                    self.failed += 1
        if time.monotonic() >= self._look:
            self._watch_room()
            self._look = time.monotonic() + _ROOM_SECONDS

    def _watch_room(self) -> None:
        """End the run before a disk is full; warn once, early, that one will fill up."""
        path, disk = self.job.path, disk_of(self.job.path)
        check_room((disk, 0), (OUTPUTS.disk(self._output), 0))
        size = sum(file.stat().st_size for file in path.glob("journal.db*"))
        needed = size * self.missing // max(1, self.samples)
        if disk.free < needed and not self._warned and self.samples > COMMIT_RESULTS:
            self._warned = True
            self.log(
                f"the disk of {path} has {disk.free / 2**30:.1f} GiB left, and the job needs about "
                f"{needed / 2**30:.1f} GiB: it will stop before the disk is full and can be resumed"
            )
