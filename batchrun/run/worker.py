"""Runs one job: rows from its source through an engine into its journal, then the export.

Three threads and two bounded channels:

    reader, tokeniser --requests--> engine (the caller's thread) --results--> journal writer

An error in any of them closes both channels and is raised in the caller's thread.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchrun import machine
from batchrun.allocator.vmm import AllocatorError, Refused
from batchrun.engine.core import Completion, EngineError, FinishReason, Request
from batchrun.errors import MachineError, StepFailed, said_by
from batchrun.estimate.measured import Measured, StepSampler
from batchrun.jobs import folder as folders
from batchrun.jobs.errors import Fenced, JobError, JournalError, OutputTaken, input_changed
from batchrun.jobs.files import check_room, free_bytes
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.identity import grown
from batchrun.jobs.inflight import InFlightRows, ReaderNote
from batchrun.jobs.journal.journal import READ, Journal
from batchrun.jobs.journal.results import CopiedResult, DoneSet, Partial, Result, RowDigests
from batchrun.jobs.lease import Lease
from batchrun.jobs.metrics import Figures, recorded
from batchrun.jobs.output.destination import Claim
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.rows.row import Source
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.spec import JobSpec
from batchrun.jobs.stats import write_summary
from batchrun.models.resolve import fingerprint
from batchrun.run.channel import Channel, Closed
from batchrun.run.live import Progress
from batchrun.run.overdue import PromptLimit
from batchrun.run.reader import (
    HANDED_REQUESTS,
    QUEUED_REQUESTS,
    Reader,
    RowEngine,
    Workbench,
    prompt_options,
)
from batchrun.run.watchdog import Watchdog

if TYPE_CHECKING:
    from batchrun.engine.settings import Settings

_COMMIT_RESULTS = 1024  # results in one transaction at most
_COMMIT_SECONDS = 0.5  # and the longest that a finished one waits for it
_CHECKPOINT_SECONDS = 5.0  # between two notes of what unfinished rows have so far
_ROOM_SECONDS = 5.0  # between two looks at how full the disks are
_DRAINED_SECONDS = 0.05  # between two looks whether the engine has nothing any more
_RESULT_BYTES = 100  # of a journal: no result takes less
_PATIENCE = 6  # times as long as a step may take, for loading a model or writing the output
ENGINE = "a step of the engine"
Checkpoint = list[Partial]
Item = Result | CopiedResult | RowDigests | Checkpoint  # of what goes to the journal


# What the engine raises that has nothing to do with what its rows hold.
_NO_ROWS_FAULT = (EngineError, JobError, AllocatorError, MachineError, OSError, MemoryError)


class Outcome(StrEnum):
    """How a run ended; also the job's state from then on."""

    DONE = "done"
    DONE_WITH_ERRORS = "done-with-errors"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled"
    FAILED = "failed"


def run_job(
    path: Path,
    *,
    stop: threading.Event,
    on_progress: Callable[[Progress], None] = lambda _: None,
    log: Callable[[str], None] = lambda _: None,
    open_workbench: Callable[[JobSpec, Callable[[str], None]], Workbench] | None = None,
    held: bool = False,
    watchdog: Watchdog | None = None,
    prompt_s: float = float("inf"),
) -> Outcome:
    """Run a job to its end, from wherever it is.

    Args:
        path: The job's folder.
        stop: Ends the run early when it is set; what is journalled stays.
        on_progress: Called often, in this thread.
        log: Told, a line each, what a user should know.
        open_workbench: Loads the engine; the real one by default.
        held: Whether this process has the job's lease already, from its supervisor.
        watchdog: Told what the threads are at.
        prompt_s: Seconds of processor time that the prompt of a row may take.

    Returns:
        How it ended.

    Raises:
        JobError: The job can't go on, for a reason that the message names.
        ModelError: The model can't be loaded.
        StepFailed: The engine failed, maybe by one of its rows; the job's state stays as it is.
    """
    job, watchdog = JobFolder(path), watchdog or Watchdog()
    with nullcontext() if held else Lease(path), closing(ReaderNote(path)) as note:
        limit = PromptLimit(note, prompt_s)
        reading = note.reading
        with watchdog.busy("looking at the inputs", _PATIENCE), reading():
            # A workbench that is given needs no model.
            folders.check_unchanged(job, None if open_workbench else fingerprint)
            spec = job.spec()
            parts = [file.part for file in spec.inputs]
            source = open_source(parts, spec.input_format, noted=reading)
            run = _Run(
                job,
                spec,
                source,
                limit,
                stop=stop,
                on_progress=on_progress,
                log=log,
                watchdog=watchdog,
            )
        with limit:
            return run.run(open_workbench or open_runtime)


class _Run:
    """One run of one job."""

    def __init__(
        self,
        job: JobFolder,
        spec: JobSpec,
        source: Source,
        limit: PromptLimit,
        *,
        stop: threading.Event,
        on_progress: Callable[[Progress], None],
        log: Callable[[str], None],
        watchdog: Watchdog,
    ) -> None:
        self.job, self.spec, self.source, self._limit = job, spec, source, limit
        self.stop, self.log, self.watchdog = stop, log, watchdog
        self._on_progress = on_progress
        self._began = time.perf_counter()
        self._counted = recorded({})  # what this class measures itself
        self._engine_began: float | None = None
        self._engine_ended: float | None = None
        self._reader: Reader | None = None
        self._sampler = StepSampler()
        self._last_at: dict[int, float] = {}  # when so many sequences ran last
        self._failures: list[BaseException] = []
        self._workbench: Workbench | None = None
        self._running = InFlightRows(job.path)
        self._running.clear()  # of the run before; its supervisor has taken note
        with Journal(job.path, spec.n) as journal:
            self._total = self._count_rows(journal)
            self.done = journal.done()
            self._begun = journal.partials()
            self._crashes = journal.crash_counts()
            self._condemned = journal.condemned()
            self._earlier = journal.counts()
            self._run_id = journal.begin_run()
        self._samples = self._earlier.samples
        self._failed = self._earlier.failed
        self._failed_rows = DoneSet(1)
        self._warned = False

    def run(self, open_workbench: Callable[[JobSpec, Callable[[str], None]], Workbench]) -> Outcome:
        """Load, compute what is to do, export."""
        outcome = Outcome.FAILED
        self._failure: Exception | None = None
        try:
            if self._samples < self._total * self.spec.n:
                self._report("load")
                self._check_room_ahead()
                with self.watchdog.busy("loading the model", _PATIENCE):
                    self._workbench = open_workbench(self.spec, self.log)
                self._counted["load_s"] = time.perf_counter() - self._began
                self._compute(self._workbench)
                if self._samples < self._total * self.spec.n and not self.stop.is_set():
                    raise input_changed(
                        f"the input ended before its {self._total:,} rows were read"
                    )
            if self._samples < self._total * self.spec.n:
                cancelled = self.job.cancel_requested()
                outcome = Outcome.CANCELLED if cancelled else Outcome.INTERRUPTED
            else:
                with self.watchdog.busy("writing the output", _PATIENCE):
                    self._export()
                outcome = Outcome.DONE_WITH_ERRORS if self._failed else Outcome.DONE
        except KeyboardInterrupt:
            outcome = Outcome.INTERRUPTED
            raise
        except Refused as error:
            hint = "what is done is kept; then: batchrun resume"
            self._failure = MachineError(str(error), hint=hint)
            raise self._failure from error
        except Exception as error:
            self._failure = error
            raise
        finally:
            if self._workbench is not None:
                self._workbench.close()
            self._running.close()
            # Where the disk fails here too, the error that is on its way says more.
            with suppress(*(JobError, OSError) if self._failure is not None else ()):
                self._end(outcome)
        write_summary(self.job, str(outcome))
        self._remember()
        return outcome

    def _remember(self) -> None:
        """Keep how long steps took, for `batchrun plan`."""
        measured, planner = self._sampler.measured, self._reader and self._reader.planner
        if not measured.seconds:
            return
        home, measured.load_s = folders.home(), self._counted["load_s"]
        if planner:
            measured.share = planner.share
        with suppress(JobError, OSError):  # the job is done, and this a hint for others
            measured.after(Measured.load(home, self.spec)).save(home, self.spec)

    def _count_rows(self, journal: Journal) -> int:
        total = journal.meta("rows_total")
        if total is None:
            total = self.source.num_rows
            if total is None:
                total = self.source.count()
            if self.spec.limit is not None:
                total = min(total, self.spec.limit)
            journal.set_meta("rows_total", total)
        return int(total)

    def _compute(self, workbench: Workbench) -> None:
        """Drive the engine until every row has its results, or `stop` is set."""
        requests: Channel[Request] = Channel(HANDED_REQUESTS)
        results: Channel[Item] = Channel(4 * _COMMIT_RESULTS)
        self._reader = Reader(
            replace(self.spec, limit=self._total),  # not what a file has got in the meantime
            self.source,
            self.done,
            workbench,
            self.log,
            begun=self._begun,
            crashes=self._crashes,
            digests=self._digests,
            watchdog=self.watchdog,
            limit=self._limit,
            condemned=self._condemned,
            drained=lambda: self._drained(requests),
        )

        def guarded(work: Callable[..., None], *channels: Channel[Any]) -> None:
            try:
                work(*channels)
            except Closed:
                pass
            except BaseException as error:  # raised again below
                self._failures.append(error)
                for channel in channels:
                    channel.close(discard=channel is channels[0])

        writer = threading.Thread(target=guarded, args=(self._write, results), name="journal")
        feeder = threading.Thread(
            target=guarded, args=(self._reader.read, requests, results), name="reader"
        )
        self._engine_began = time.perf_counter()
        try:
            machine.start(writer, feeder)
            self._drive(workbench.engine, requests, results)
        except Closed:
            pass  # a thread failed; its error is raised below
        finally:
            requests.close(discard=True)
            if feeder.ident is not None:  # it was started
                feeder.join()
            results.close()
            if writer.ident is not None:
                writer.join()
            self._engine_ended = time.perf_counter()
        if self._failures:
            raise self._failures[0]

    def _drained(self, requests: Channel[Request]) -> None:
        """Return when all rows that were handed to the engine have ended, in the reader's thread.

        Raises:
            Closed: They will not.
        """
        assert self._reader is not None
        while self._reader.handed > self._counted["completions"]:
            requests.wait(_DRAINED_SECONDS)

    def _digests(self, first: int, count: int) -> Mapping[int, int]:
        with self.job.journal() as journal:
            return journal.digests(first, count)

    def _drive(self, engine: RowEngine, requests: Channel[Request], results: Channel[Item]) -> None:
        more = True
        engine.on_admit = lambda request: self._running.add(request.row)
        checkpoint = time.monotonic() + _CHECKPOINT_SECONDS
        while not self.stop.is_set() and not self._failures:
            # What waits inside the engine is bounded too, or it would come to hold the whole file.
            room = QUEUED_REQUESTS - engine.load()[1]
            try:
                wait = 0 if engine.has_work else 0.1
                for request in requests.take(room, wait) if more and room > 0 else []:
                    self._add(engine, request, results)
            except Closed:
                more = False
            if engine.has_work:
                self._step(engine, results)
            elif not more:
                return
            if time.monotonic() >= checkpoint:
                results.put(_checkpoint(engine))
                checkpoint = time.monotonic() + _CHECKPOINT_SECONDS
            self._report("run", engine)
        results.put(_checkpoint(engine))

    def _add(self, engine: RowEngine, request: Request, results: Channel[Item]) -> None:
        """Give the engine a request; one that was in a crash gets the engine to itself."""
        alone = request.row in self._crashes
        while alone and engine.has_work and not self.stop.is_set():
            self._step(engine, results)
        with self.watchdog.busy(ENGINE), self._suspecting(request.row):
            self._running.add(request.row)  # what is set up for a row may hang, too
            engine.add(request)
            self._running.remove(request.row)
        while alone and engine.has_work and not self.stop.is_set():
            self._step(engine, results)

    def _step(self, engine: RowEngine, results: Channel[Item]) -> None:
        with self.watchdog.busy(ENGINE), self._suspecting():
            completions = engine.step()
        self._last_at[engine.load()[0]] = time.perf_counter()
        for completion in completions:
            if completion.admitted is not None:
                self._running.remove(completion.request.row)
            self._end_row(completion.request, result_of(completion), results)

    @contextmanager
    def _suspecting(self, *rows: int) -> Iterator[None]:
        """The engine's work: where it fails for no known reason, its rows may be the cause.

        Args:
            rows: What it is given just now.

        Raises:
            StepFailed: It did.
        """
        try:
            yield
        except _NO_ROWS_FAULT:
            raise
        except Exception as error:
            for row in rows:
                self._running.add(row)
            raise StepFailed(f"{ENGINE} failed: {said_by(error)}") from error

    def _end_row(self, request: Request, result: Result, results: Channel[Item]) -> None:
        """Hand a result on, and those of rows that ask the same."""
        results.put(result)
        self._counted["completions"] += 1
        self._counted["completion_tokens"] += result.completion_tokens
        assert self._reader is not None
        if self._reader.planner is not None:
            self._reader.planner.learn(request, result.completion_tokens)
            for same in self._reader.settle(request, result):
                results.put(same)

    def _write(self, results: Channel[Item]) -> None:
        """The journal writer's thread: the only one that writes results."""
        with Journal(self.job.path, self.spec.n) as journal:
            journal.resume_run(self._run_id)
            if journal.meta(READ) is None:
                assert self._reader is not None
                journal.set_meta(READ, self._reader.columns)
            pending: list[Result | CopiedResult] = []
            partials: Checkpoint = []
            digests: list[tuple[int, int]] = []
            deadline = look = 0.0
            open_ = True
            while open_ or pending or partials or digests:
                waiting = pending or partials or digests
                timeout = max(0.001, deadline - time.monotonic()) if waiting else None
                try:
                    taken = results.take(_COMMIT_RESULTS - len(pending), timeout)
                except Closed:
                    taken, open_ = [], False
                if taken and not waiting:
                    deadline = time.monotonic() + _COMMIT_SECONDS
                for item in taken:
                    if isinstance(item, Result | CopiedResult):
                        pending.append(item)
                    elif isinstance(item, RowDigests):
                        digests += item.digests
                    else:
                        partials = item
                due = not open_ or time.monotonic() >= deadline
                if (pending or partials or digests) and (due or len(pending) >= _COMMIT_RESULTS):
                    ended = {(r.row, r.sample) for r in pending}
                    begun = [p for p in partials if (p.row, p.sample) not in ended]
                    figures = self._figures()
                    self._sampler.observe(figures)
                    began = time.perf_counter()
                    with self.watchdog.busy("writing the journal"):
                        journal.write(pending, figures, begun, digests)
                    self._counted["journal_s"] += time.perf_counter() - began
                    self._samples += len(pending)
                    self._count_failures(pending)
                    pending, partials, digests = [], [], []
                    if time.monotonic() >= look:
                        self._watch_room()
                        look = time.monotonic() + _ROOM_SECONDS

    def _check_room_ahead(self) -> None:
        """Refuse what can't fit: of results and output the least that they can take."""
        left = self._total * self.spec.n - self._samples
        copied = 0 if self.spec.limit else sum(file.size for file in self.spec.inputs) // 4
        check_room((self.job.path, left * _RESULT_BYTES), (Path(self.spec.output.path), copied))

    def _watch_room(self) -> None:
        """End the run before a disk is full; say once, early, that one will be.

        Raises:
            OutputError: There is no room for more.
        """
        output = Path(self.spec.output.path)
        check_room((self.job.path, 0), (output, 0))
        size = sum(file.stat().st_size for file in self.job.path.glob("journal.db*"))
        done = max(1, self._samples)
        needed = size * (self._total * self.spec.n - done) // done
        free = free_bytes(self.job.path)
        if free < needed and not self._warned and done > _COMMIT_RESULTS:
            self._warned = True
            self.log(
                f"the disk of {self.job.path} has {free / 2**30:.1f} GiB left and the job will "
                f"need about {needed / 2**30:.1f} GiB: it will stop, and can be resumed"
            )

    def _count_failures(self, results: list[Result | CopiedResult]) -> None:
        """A row has failed when any of its samples has; what is copied has not."""
        for result in results:
            failed = isinstance(result, Result) and result.status == "error"
            if failed and (result.row, 0) not in self._failed_rows:
                self._failed_rows.add(result.row)
                self._failed += 1

    def _export(self) -> None:
        self._report("export")
        began = time.perf_counter()
        spec, path = self.spec, Path(self.spec.output.path)
        with Journal(self.job.path, spec.n) as journal:
            journal.resume_run(self._run_id)
            try:
                export_job(
                    spec,
                    journal,
                    path,
                    format=spec.output.format,
                    may_replace=Claim(journal, path, overwrite=spec.output.overwrite),
                    noted=self._limit.note.reading,
                )
            except OutputTaken as error:
                error.hint = (
                    f"batchrun export {self.job.id} --output OTHER, "
                    f"or batchrun resume {self.job.id} --overwrite to replace it"
                )
                raise
        for line in grown(spec):
            self.log(line)
        self._counted["export_s"] = time.perf_counter() - began

    def _end(self, outcome: Outcome) -> None:
        """Note how the run ended."""
        failure = self._failure
        if isinstance(failure, Fenced):
            return  # the job is another worker's
        reason = None if failure is None else str(failure)
        if not isinstance(failure, JournalError):  # a journal that failed is not written again
            with Journal(self.job.path, self.spec.n) as journal:
                journal.resume_run(self._run_id)
                journal.end_run(str(outcome), self._figures(), reason)
        if not isinstance(failure, StepFailed):  # its supervisor tries again
            self.job.set_state(str(outcome), reason)

    def _figures(self) -> Figures:
        """The run's figures so far."""
        now = time.perf_counter()
        measured = self._counted | {"wall_s": now - self._began}
        measured |= {"rss": machine.rss(), "peak_rss": machine.peak_rss()}
        if self._engine_began is not None:
            measured["engine_s"] = (self._engine_ended or now) - self._engine_began
        if self._workbench is not None:
            measured |= self._workbench.measurements()
            measured["tail_s"] = self._tail(measured)
        if self._reader is not None:
            duplicates, saved = self._reader.duplicates, self._reader.saved()
            measured["tokenise_s"] = self._reader.seconds
            measured["plan_s"] = self._reader.planner.seconds if self._reader.planner else 0.0
            measured["duplicates"] = duplicates.rows
            measured["duplicate_tokens"] = duplicates.tokens
            measured["completions"] += duplicates.rows
            measured["saved_prompt_tokens"] = saved.prompt_tokens
            steps = measured["steps"]
            measured["saved_steps"] = round(saved.steps * steps)
            if saved.tail:  # as many tokens in more steps: what a step costs beside them
                cost = self._sampler.measured.costs()[0] or measured["engine_s"] / max(1, steps)
                measured["saved_tail_s"] = saved.tail * steps * cost
        return recorded(measured)

    def _tail(self, measured: Mapping[str, Any]) -> float:
        """Seconds since half as many sequences ran last as ran on average, once all have ended."""
        seconds = measured["kv_s"]
        if not seconds or self._engine_ended is None:
            return 0.0
        half = measured["sequence_s"] / seconds / 2
        full = [at for running, at in self._last_at.items() if running >= half]
        return self._engine_ended - max(full, default=self._engine_ended)

    def _report(self, phase: str, engine: RowEngine | None = None) -> None:
        running, waiting, generated = (0, 0, self._counted["completion_tokens"])
        if engine is not None:
            running, waiting, generated = engine.load()
        self._on_progress(
            Progress(
                rows_total=self._total,
                rows_done=self._samples // self.spec.n,
                rows_failed=self._failed,
                rows_resumed=self._earlier.rows,
                completion_tokens=generated,
                running=running,
                waiting=waiting,
                elapsed_s=time.perf_counter() - self._began,
                phase=phase,
            )
        )


def _checkpoint(engine: RowEngine) -> Checkpoint:
    return [
        Partial(
            *(r.row, r.sample, r.generated_ids),
            r.generated_logprob if r.params.logprobs else None,
        )
        for r in engine.partials()
    ]


def result_of(done: Completion) -> Result:
    """What a journal holds of a sequence that ended."""
    request = done.request
    ok = done.finish_reason is not FinishReason.ERROR

    def between(begin: float | None, end: float | None) -> float | None:
        return None if begin is None or end is None else end - begin

    return Result(
        row=request.row,
        sample=request.sample,
        status="ok" if ok else "error",
        text=done.text,
        token_ids=done.token_ids if ok else (),
        finish_reason=str(done.finish_reason) if ok else None,
        prompt_tokens=len(request.prompt_ids),
        completion_tokens=len(done.token_ids) if ok else 0,
        error=done.error,
        error_kind=done.error_kind,
        queue_s=between(done.arrived, done.admitted),
        prefill_s=between(done.admitted, done.first_token),
        decode_s=between(done.first_token, done.finished),
        logprob=done.logprob if ok and request.params.logprobs else None,
    )


def open_runtime(spec: JobSpec, log: Callable[[str], None]) -> Workbench:
    """The real engine for a job."""
    with machine.importing():
        from batchrun.engine.build import build  # noqa: PLC0415 - imports torch
        from batchrun.engine.shortage import device_errors  # noqa: PLC0415

    measured = Measured.load(folders.home(), spec)
    settings = engine_settings(spec, measured.step_cost if measured else None)
    with device_errors("the model", "--max-num-seqs N"):
        opened = build(settings, prompt_options(spec), log)
    gc.freeze()  # or each collection would go through all of torch and the model again
    return opened


def engine_settings(spec: JobSpec, step_cost: float | None) -> Settings:
    """How a job's model is to run.

    Args:
        spec: The job.
        step_cost: What a step takes beside its tokens, in the time of one; None where unknown.
    """
    from batchrun.engine.settings import Settings  # noqa: PLC0415 - imports torch

    model, not_engine = spec.model, {"plan", "param_columns"}
    runtime = {k: v for k, v in vars(spec.runtime).items() if k not in not_engine}
    return Settings(
        model_path=model.path,
        model_name=model.name,
        fingerprint=model.fingerprint,
        cache=folders.home() / "verdicts",
        dtype=model.dtype,
        quantize=model.quantize,
        trust_remote_code=model.trust_remote_code,
        max_model_len=model.max_model_len,
        step_cost=step_cost,
        **runtime,
    )
