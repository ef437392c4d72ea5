"""Runs one job: rows from its source through an engine into its journal, then the output.

Three threads, and two bounded channels that lead one way each:

    thread    what runs in it                       receives   sends
    reader    Reader: turns rows into requests                 requests; results of bad rows
    caller's  EngineLoop: steps the engine          requests   results
    journal   JournalWriter: owns the journal       results

An error in any of them closes both channels and is raised in the caller's thread, which loads the
model before, and writes the output after.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchrun import machine
from batchrun.allocator.vmm import Refused
from batchrun.engine.core import EngineError, Request
from batchrun.errors import MachineError, StepFailed
from batchrun.estimate.measured import Measured
from batchrun.fleet.fleet import Fleet
from batchrun.fleet.loop import FleetLoop
from batchrun.fleet.opening import open_fleet
from batchrun.grammars.constraint import with_constraint
from batchrun.jobs import folder as folders
from batchrun.jobs.determinism import computing_runs, why_not
from batchrun.jobs.errors import Fenced, JobError, JournalError, OutputTaken, input_changed
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.identity import check_unchanged, grown
from batchrun.jobs.inflight import InFlightRows, ReaderNote
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result
from batchrun.jobs.journal.schema import SETUP
from batchrun.jobs.lease import Lease
from batchrun.jobs.output.destination import Claim
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.rows.row import Source
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.spec import JobSpec
from batchrun.jobs.stats import write_summary
from batchrun.models.resolve import fingerprint
from batchrun.objectstore.paths import location
from batchrun.provenance import setup
from batchrun.runner.channel import Channel, Closed
from batchrun.runner.engine_loop import EngineLoop
from batchrun.runner.figures import RunFigures
from batchrun.runner.live import Progress
from batchrun.runner.opening import open_runtime
from batchrun.runner.overdue import PromptLimit
from batchrun.runner.reader import HANDED_REQUESTS, Reader
from batchrun.runner.reports import Reports
from batchrun.runner.story import Story
from batchrun.runner.watchdog import Watchdog
from batchrun.runner.writer import COMMIT_RESULTS, Item, JournalWriter

if TYPE_CHECKING:  # they import torch
    from batchrun.engine.build import Assembly

    OpenWorkbench = Callable[[JobSpec, Callable[[str], None]], Assembly | Fleet]


class Outcome(StrEnum):
    """How a run ended; also the job's state from then on."""

    DONE = "done"
    DONE_WITH_ERRORS = "done-with-errors"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled"
    FAILED = "failed"


_RECALLED_TOKENS = 200_000  # of earlier answers, from which tokens are guessed: under a second
_DRAINED_SECONDS = 0.05  # between two looks at whether the engine is empty
_PATIENCE = 6  # loading a model, or writing nothing, may take this many times as long as a step


def run_job(
    path: Path,
    *,
    stop: threading.Event,
    on_progress: Callable[[Progress], None] = lambda _: None,
    log: Callable[[str], None] = lambda _: None,
    story: Story | None = None,
    open_workbench: OpenWorkbench | None = None,
    held: bool = False,
    watchdog: Watchdog | None = None,
    prompt_s: float = float("inf"),
    handles: Sequence[int] = (),
) -> Outcome:
    """Run a job to its end, from wherever it is.

    Args:
        path: The job's folder.
        stop: Ends the run early when set; journalled results stay.
        on_progress: Called often, in this thread.
        log: Called with each line that a user should see.
        story: Told each stage of the run.
        open_workbench: Loads the engine; the real one by default.
        held: Whether this process already holds the job's lease, from its supervisor.
        watchdog: Told what the threads are doing.
        prompt_s: Seconds of processor time that a row's prompt may take.
        handles: Locks that processes started for the job hold too.

    Returns:
        How it ended.

    Raises:
        JobError: The job can't go on; the message says why.
        ModelError: The model can't be loaded.
        StepFailed: The engine failed, maybe because of a row; the job's state stays as it is.
    """
    job, watchdog = JobFolder(path), watchdog or Watchdog()
    with nullcontext() if held else Lease(path), closing(ReaderNote(path)) as note:
        limit = PromptLimit(note, prompt_s)
        reading = note.reading
        with watchdog.busy("looking at the inputs", _PATIENCE), reading():
            # A workbench passed in needs no model.
            check_unchanged(job, None if open_workbench else fingerprint)
            spec = job.spec()
            source = open_source(spec.parts, spec.input_format, noted=reading)
            told = story or Story()
            run = _Run(job, spec, source, limit, stop, on_progress, log, watchdog, told)
        with limit:
            if open_workbench is None and spec.runtime.has_fleet:
                return run.run(lambda spec, log: open_fleet(spec, log, path, handles, stop.is_set))
            return run.run(open_workbench or run.open_here)


@dataclass
class _Run:
    """One run of one job: its state before, its parts, and the order in which they work."""

    job: JobFolder
    spec: JobSpec
    source: Source
    limit: PromptLimit
    stop: threading.Event
    on_progress: Callable[[Progress], None]
    log: Callable[[str], None]
    watchdog: Watchdog
    story: Story

    def __post_init__(self) -> None:
        job, spec = self.job, self.spec
        self._figures = RunFigures()
        self._failures: list[BaseException] = []  # of threads
        self._in_flight = InFlightRows(job.path)
        self._in_flight.clear()  # left by the earlier run; the supervisor has read it
        with Journal(job.path, spec.n) as journal:
            total = journal.meta("rows_total")
            if total is None:  # the first run counts them
                total = self.source.count()
                total = total if spec.limit is None else min(total, spec.limit)
                journal.set_meta("rows_total", total)
            self._total = int(total)
            self._number = journal.begin_run()  # from here on, no earlier run can add results
            journal.set_meta(SETUP.format(self._number), setup())
            self._done = journal.done()
            self._begun = journal.partials()
            self._crashes = journal.crash_counts()
            self._condemned = journal.condemned()
            self._earlier = journal.counts()
            self._computing = computing_runs(journal)
        self._writer = JournalWriter(
            *(job, spec, self._number, self._total, self._earlier),
            *(self._figures, self.watchdog, self.log),
        )
        self._reports = Reports(
            *(spec, self._figures, self._writer),
            total=self._total,
            kept=self._earlier.rows,
            earlier=Measured.load(folders.home(), spec),
            tell=self.on_progress,
        )

    def run(self, open_workbench: OpenWorkbench) -> Outcome:
        """Load the model, compute what is missing, write the output."""
        outcome, figures = Outcome.FAILED, self._figures
        failure: Exception | None = None
        self.story.begins(self._number, self._earlier, self._total)
        try:
            if self._writer.missing:
                self._reports.phase("load")
                self._writer.check_room_ahead()
                machine.read_ahead(Path(self.spec.model.path))
                self._writer.check_failures()
                with self.watchdog.busy("loading the model", _PATIENCE):
                    figures.workbench = open_workbench(self.spec, self.log)
                load_s = figures.counted["load_s"] = time.perf_counter() - figures.began
                self.story.loaded(self.spec, figures.workbench.measurements(), load_s)
                if not self.stop.is_set():
                    if self.spec.runtime.deterministic:
                        self._check_arithmetic(figures.workbench)
                    self.story.computes(self._total - self._earlier.rows)
                    self._compute(figures.workbench)
            outcome = self._finish()
        except KeyboardInterrupt:
            outcome = Outcome.INTERRUPTED
            raise
        except Refused as error:
            hint = "finished rows are kept; then: batchrun resume"
            failure = MachineError(str(error), hint=hint)
            raise failure from error
        except Exception as error:
            failure = error
            raise
        finally:
            if figures.workbench is not None:
                figures.workbench.close()
            self._in_flight.close()
            # If the disk fails here too, the error being raised says more.
            with suppress(*(JobError, OSError) if failure is not None else ()):
                self._note_end(outcome, failure)
        write_summary(self.job, str(outcome))
        figures.remember(self.spec)
        return outcome

    def open_here(self, spec: JobSpec, log: Callable[[str], None]) -> Assembly:
        """The engine for this process alone."""
        return open_runtime(spec, log, self._reports.phase)

    def _check_arithmetic(self, workbench: Assembly | Fleet) -> None:
        """Refuse to compute rows by another arithmetic than that of earlier runs."""
        now = {"id": self._number, "stats": workbench.measurements()}
        if (reason := why_not([*self._computing, now])) is not None:
            raise EngineError(
                f"--deterministic can't be guaranteed: {reason}",
                hint="resume it on the machine where it started, or submit it with --again",
            )

    def _finish(self) -> Outcome:
        """Write the output if all rows have results; return how the run ended."""
        if self._writer.missing and not self.stop.is_set():
            raise input_changed(f"the input ended before its {self._total:,} rows were read")
        if self._writer.missing:
            cancelled = self.job.cancel_requested()
            return Outcome.CANCELLED if cancelled else Outcome.INTERRUPTED
        self._reports.phase("export", 0, self._writer.samples)
        self.story.writes("stdout" if self.spec.output.stdout else self.spec.output.path)
        began = time.perf_counter()
        with self.watchdog.busy("writing the output", _PATIENCE, machine.bytes_written):
            self._write_output()
        self._reports.phase("export", self._writer.samples, self._writer.samples)
        self._figures.counted["export_s"] = time.perf_counter() - began
        return Outcome.DONE_WITH_ERRORS if self._writer.failed else Outcome.DONE

    def _write_output(self) -> None:
        job, output, path = self.job, self.spec.output, location(self.spec.output.path)
        with self._writer.journal() as journal:
            try:
                export_job(
                    *(self.spec, journal, path),
                    format=output.format,
                    may_replace=Claim(journal, path, overwrite=output.overwrite),
                    noted=self.limit.note.reading,
                    told=lambda rows: self._reports.phase("export", rows, self._writer.samples),
                )
            except OutputTaken as error:
                error.hint = (
                    f"batchrun export {job.id} --output OTHER, "
                    f"or batchrun resume {job.id} --overwrite to replace it"
                )
                raise
        for line in grown(self.spec):
            self.log(line)

    def _note_end(self, outcome: Outcome, failure: Exception | None) -> None:
        """Note in journal and snapshot how the run ended, and why if it failed."""
        if isinstance(failure, Fenced):
            return  # another worker has the job
        reason = None if failure is None else str(failure)
        if not isinstance(failure, JournalError):  # never write to a journal that failed
            with self._writer.journal() as journal:
                journal.end_run(str(outcome), self._figures.so_far(), reason)
        if not isinstance(failure, StepFailed):  # its supervisor tries again
            self.job.set_state(str(outcome), reason)
        self.story.ends(
            *(str(outcome), self._writer.samples // self.spec.n, self._total),
            failed=self._writer.failed,
            wall_s=time.perf_counter() - self._figures.began,
            reason=reason,
        )

    def _compute(self, workbench: Assembly | Fleet) -> None:
        """Drive the engine until every row has its results, or `stop` is set."""
        requests: Channel[Request] = Channel(HANDED_REQUESTS)
        results: Channel[Item] = Channel(4 * COMMIT_RESULTS)
        reader = self._figures.reader = self._make_reader(workbench, requests)
        if self._earlier.samples:
            with self.job.journal() as journal:
                constraint = with_constraint(self.spec.sampling.given).get("constraint")
                workbench.recall(journal.answers(_RECALLED_TOKENS), constraint)
        loop = self._make_loop(workbench, reader)
        writing = self._thread("journal", self._writer.run, reader.columns, results)
        reading = self._thread("reader", reader.read, requests, results)
        self._figures.engine_began = time.perf_counter()
        try:
            machine.start(writing, reading)
            loop.run(requests, results)
        except Closed:
            pass  # a thread failed; its error is raised below
        finally:
            requests.close(discard=True)
            if reading.ident is not None:  # it was started
                reading.join()
            results.close()
            if writing.ident is not None:
                writing.join()
            self._figures.engine_ended = time.perf_counter()
        if self._failures:
            raise self._failures[0]

    def _make_loop(self, workbench: Assembly | Fleet, reader: Reader) -> EngineLoop | FleetLoop:
        def stopped() -> bool:
            return self.stop.is_set() or bool(self._failures)

        def ended(request: Request, result: Result) -> list[Result]:
            self._reports.ended(request, result)
            return reader.ended(request, result)

        if isinstance(workbench, Fleet):
            return FleetLoop(
                *(workbench, ended, self._crashes, self._figures, stopped),
                lambda rows: self._reports.running(workbench.load(), rows),
            )
        engine = workbench.engine
        return EngineLoop(
            *(engine, ended, self._in_flight, self._crashes, self._figures),
            *(
                self.watchdog,
                stopped,
                lambda: self._reports.running(engine.load(), engine.progress),
            ),
        )

    def _thread(self, name: str, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        """A thread that on an error keeps it and closes its channels."""
        channels = [argument for argument in arguments if isinstance(argument, Channel)]

        def guarded() -> None:
            try:
                work(*arguments)
            except Closed:
                pass
            except BaseException as error:  # raised again in `_compute`
                self._failures.append(error)
                for channel in channels:
                    channel.close(discard=channel is channels[0])

        return threading.Thread(target=guarded, name=name)

    def _make_reader(self, workbench: Assembly | Fleet, requests: Channel[Request]) -> Reader:
        def digests(first: int, count: int) -> Mapping[int, int]:
            with self.job.journal() as journal:
                return journal.digests(first, count)

        def drained() -> None:
            """Return when all rows handed to the engine have ended."""
            while reader.handed > self._figures.counted["completions"]:
                requests.wait(_DRAINED_SECONDS)

        prompts = workbench.prompts if isinstance(workbench, Fleet) else workbench
        reader = Reader(
            replace(self.spec, limit=self._total),  # without rows appended in the meantime
            *(self.source, self._done, prompts, self.log),
            begun=self._begun,
            crashes=self._crashes,
            digests=digests,
            watchdog=self.watchdog,
            limit=self.limit,
            condemned=self._condemned,
            drained=drained,
        )
        return reader
