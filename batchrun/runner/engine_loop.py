"""The engine's loop: requests in, steps, results out. It runs in the thread that runs the job."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchrun.allocator.vmm import AllocatorError
from batchrun.engine.core import Completion, EngineError, FinishReason, Request
from batchrun.errors import MachineError, StepFailed, said_by
from batchrun.jobs.errors import JobError
from batchrun.jobs.inflight import InFlightRows
from batchrun.jobs.journal.results import Partial, Result, Scores
from batchrun.runner.channel import Channel, Closed, Sender
from batchrun.runner.figures import RunFigures
from batchrun.runner.reader import QUEUED_REQUESTS
from batchrun.runner.watchdog import Watchdog
from batchrun.runner.writer import Item

if TYPE_CHECKING:  # imports torch
    from batchrun.engine.engine import Engine

_CHECKPOINT_SECONDS = 5.0  # between two checkpoints of unfinished rows
ENGINE = "a step of the engine"

# Errors of the engine that its rows can't have caused.
_NO_ROWS_FAULT = (EngineError, JobError, AllocatorError, MachineError, OSError, MemoryError)


@dataclass
class EngineLoop:
    """Drives an engine until there are no more requests, or it is told to stop.

    Args:
        engine: The engine.
        ended: Told when a row ends; returns the results of its duplicates.
        in_flight: Told which rows are in the engine.
        crashes: Rows that were in a crash: each gets the engine to itself.
        figures: Told of each step.
        watchdog: Told when the engine is at work.
        stopped: Whether the loop should end.
        report: Called after each step.
    """

    engine: Engine
    ended: Callable[[Request, Result], Iterable[Result]]
    in_flight: InFlightRows
    crashes: Container[int]
    figures: RunFigures
    watchdog: Watchdog
    stopped: Callable[[], bool]
    report: Callable[[], None]

    def run(self, requests: Channel[Request], results: Sender[Item]) -> None:
        """Drive the engine.

        Raises:
            Closed: Nobody takes results any more.
            StepFailed: The engine failed, maybe because of one of its rows.
        """
        engine, more = self.engine, True
        engine.on_admit = lambda request: self.in_flight.add(request.row)
        checkpoint = time.monotonic() + _CHECKPOINT_SECONDS
        while not self.stopped():
            # Bound what waits inside the engine too, or it would end up holding the whole file.
            room = QUEUED_REQUESTS - engine.load()[1]
            try:
                wait = 0 if engine.has_work else 0.1
                for request in requests.take(room, wait) if more and room > 0 else []:
                    self._add(request, results)
            except Closed:
                more = False
            if engine.has_work:
                self._step(results)
            elif not more:
                return
            if time.monotonic() >= checkpoint:
                results.put(self._checkpoint())
                checkpoint = time.monotonic() + _CHECKPOINT_SECONDS
            self.report()
        results.put(self._checkpoint())

    def release(self, count: int) -> list[Request]:
        """Let go of up to so many rows that have not begun, or have far to go."""
        with self.watchdog.busy(ENGINE), self._suspecting():
            released = self.engine.release(count)
        for request, admitted in released:
            if admitted:
                self.in_flight.remove(request.row)
        return [request for request, _ in released]

    def _add(self, request: Request, results: Sender[Item]) -> None:
        """Give the engine a request; one that was in a crash gets the engine to itself."""
        alone = request.row in self.crashes
        if alone:
            self._drain(results)
        with self.watchdog.busy(ENGINE), self._suspecting(request.row):
            self.in_flight.add(request.row)  # setting up a row may hang too
            self.engine.add(request)
            self.in_flight.remove(request.row)
        if alone:
            self._drain(results)

    def _drain(self, results: Sender[Item]) -> None:
        while self.engine.has_work and not self.stopped():
            self._step(results)
            self.report()

    def _step(self, results: Sender[Item]) -> None:
        with self.watchdog.busy(ENGINE), self._suspecting():
            completions = self.engine.step()
        self.figures.stepped(self.engine.load()[0])
        for completion in completions:
            if completion.admitted is not None:
                self.in_flight.remove(completion.request.row)
            self._end_row(completion.request, result_of(completion), results)

    @contextmanager
    def _suspecting(self, *rows: int) -> Iterator[None]:
        """Run the engine; if it fails for no known reason, its rows may be the cause.

        Args:
            rows: The rows being added.

        Raises:
            StepFailed: It failed so.
        """
        try:
            yield
        except _NO_ROWS_FAULT:
            raise
        except Exception as error:
            for row in rows:
                self.in_flight.add(row)
            raise StepFailed(f"{ENGINE} failed: {said_by(error)}") from error

    def _end_row(self, request: Request, result: Result, results: Sender[Item]) -> None:
        """Hand on a result, and those of its duplicates."""
        results.put(result)
        count_result(self.figures, result)
        for same in self.ended(request, result):
            results.put(same)

    def _checkpoint(self) -> list[Partial]:
        """The tokens that unfinished rows have so far."""
        return [
            Partial(
                *(r.row, r.sample, r.generated_ids),
                r.generated_logprob if r.params.scored else None,
                r.generated_logprobs if r.params.logprobs is not None else None,
            )
            for r in self.engine.partials()
        ]


def count_result(figures: RunFigures, result: Result) -> None:
    """Count a computed result."""
    figures.counted["completions"] += 1
    figures.counted["completion_tokens"] += result.completion_tokens


def result_of(done: Completion) -> Result:
    """The journal's record of a sequence that has ended."""
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
        logprob=done.logprob if ok and request.params.scored else None,
        logprobs=done.logprobs if ok and request.params.logprobs is not None else None,
        scores=Scores(*done.scores) if ok and done.scores is not None else None,
    )
