"""The coordinator's loop: rows in, workers compute them, results out, each exactly once.

It takes the place of `batchrun.runner.engine_loop` where a job has several engines, and runs in the
thread that runs the job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchrun.fleet.dispatch import Dispatch
from batchrun.fleet.fleet import Fleet
from batchrun.fleet.messages import (
    Begun,
    Ended,
    Failed,
    Finish,
    FromWorker,
    Lost,
    Ready,
    Release,
    Returned,
    Stop,
)
from batchrun.jobs.journal.results import Crashed, Result
from batchrun.runner.channel import Channel, Closed, Sender
from batchrun.runner.engine_loop import count_result
from batchrun.runner.figures import RunFigures
from batchrun.runner.planner import Waiting
from batchrun.runner.reader import CRASHED
from batchrun.runner.writer import Item

if TYPE_CHECKING:
    from batchrun.engine.core import Request

_SOON_S, _LATER_S = 0.005, 0.1  # for messages, while rows are about to come, and otherwise
_LOOK_S = 0.1  # between two looks at what all workers do
_END_S = 30.0  # for workers to end by themselves


@dataclass
class FleetLoop:
    """Drives a fleet until every row has ended, or it is told to stop.

    Args:
        fleet: The workers.
        ended: Told when a row ends; returns the results of its duplicates.
        crashes: Rows that were in a crash, and how often: each is computed alone.
        figures: Told of each row.
        stopped: Whether the loop should end.
        report: Called several times a second with `Dispatch.progress`.
    """

    fleet: Fleet
    ended: Callable[[Request, Result], Iterable[Result]]
    crashes: Mapping[int, int]
    figures: RunFigures
    stopped: Callable[[], bool]
    report: Callable[[Callable[[], Sequence[tuple[int, int]]]], None]

    def run(self, requests: Channel[Request], results: Sender[Item]) -> None:
        """Drive the fleet.

        Raises:
            Closed: Nobody takes results any more.
            EngineError, MachineError: All workers were lost.
        """
        fleet, rows = self.fleet, Dispatch(self.crashes)
        self._rows, self._results, self._looked = rows, results, 0.0
        while not self.stopped():
            rows.is_complete = rows.is_complete or not self._read(requests)
            rows.num_coming = fleet.num_coming
            if rows.is_complete and rows.is_empty:
                break
            hungry = not rows.is_complete and rows.wanting
            for said in fleet.poll(_SOON_S if hungry else _LATER_S):
                self._take(*said)
            self._give()
            self._look()
        fleet.begin_to_end(Stop() if self.stopped() else Finish())
        until = time.monotonic() + _END_S
        while fleet.is_open and time.monotonic() < until:
            for said in fleet.poll(_LATER_S):
                self._take(*said)
            self._look()
        fleet.end()
        results.put(rows.partials())

    def _look(self) -> None:
        """Note what all workers do, if that is due."""
        now = time.monotonic()
        if now >= self._looked + _LOOK_S:
            self._looked = now
            self.fleet.note_time(self._rows.is_idle)
            self.figures.stepped(self.fleet.load()[0])
            self.report(self._rows.progress)

    def _read(self, requests: Channel[Request]) -> bool:
        """Take rows for as long as they come and are wanted; False if no more ever come."""
        try:
            while wanting := self._rows.wanting:
                taken = requests.take(wanting)
                if not taken:
                    break
                for request in taken:
                    self._rows.put(Waiting.of(request))
        except Closed:
            return False
        return True

    def _give(self) -> None:
        """Send rows to the workers that have room, or have them release some."""
        rows, fleet = self._rows, self.fleet
        for worker in fleet.ready:
            if (work := rows.take(worker)) is not None:
                fleet.send(worker, work)
        for worker, count in rows.releases():
            fleet.send(worker, Release(count))

    def _take(self, worker: int, message: FromWorker) -> None:
        """Take in what a worker said."""
        rows = self._rows
        if isinstance(message, Ready):
            rows.join(worker, message.limits)
        elif isinstance(message, Ended):
            for result in message.results:
                row = rows.end(worker, (result.row, result.sample))
                if row is not None:
                    self._hand_on(row, result)
            if message.figures is not None:
                rows.note_waiting(worker, message.figures["waiting"])
        elif isinstance(message, Begun):
            rows.note_begun(worker, message.partials)
            self._results.put(list(message.partials))
        elif isinstance(message, Returned):
            rows.take_back(worker, message.rows)
        elif isinstance(message, Lost | Failed):
            self._lose(worker, message.suspects if isinstance(message, Lost) else ())

    def _lose(self, worker: int, suspects: Iterable[int]) -> None:
        """Take back a worker's rows; those that have crashed too many end with an error."""
        lost = self._rows.lose(worker, suspects)
        if lost.crashed:
            self._results.put(Crashed(lost.crashed))
        for row in lost.ended:
            rest = row.rest
            error = Result(rest.row, rest.sample, "error", error=CRASHED, error_kind="crashed")
            self._hand_on(row, error)

    def _hand_on(self, row: Waiting, result: Result) -> None:
        """Hand on a result, and those of its duplicates."""
        self._results.put(result)
        count_result(self.figures, result)
        for same in self.ended(row.request(), result):
            self._results.put(same)
