"""The workers of a job: which there are, which were lost, and what they measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from batchrun import machine
from batchrun.engine.core import EngineError
from batchrun.errors import MachineError, ModelError
from batchrun.fleet.messages import (
    Closed,
    Ended,
    Failed,
    Figures,
    Finish,
    FromWorker,
    Limits,
    Log,
    Lost,
    Ready,
    Recall,
    Setup,
    Stop,
    ToWorker,
)
from batchrun.fleet.processes import Workers
from batchrun.fleet.prompts import model_prompts, read_model
from batchrun.jobs.metrics import across, merged
from batchrun.jobs.spec import JobSpec
from batchrun.runner.overdue import stall_seconds

if TYPE_CHECKING:  # they import torch
    from batchrun.fleet.prompts import ModelPrompts

_RESTARTS = 4  # of a worker, in a row, without a result in between
_POLL_S = 0.1
_STEPS = 2  # times that a worker may be silent for as long as a step may take
_SUSPENDED_S = 5.0  # between two polls
_MEMORY = "batchrun resume with a lower --max-num-seqs N or --kv-budget SIZE"


@dataclass(eq=False)
class Member:
    """A place for a worker, on a device, which the workers that died had before.

    Attributes:
        setup: What its workers are to be.
        worker: The current one's number; None if there is none any more.
        host: The machine that it is on.
        is_ready: Whether it has loaded the model.
        lost: Why the device is given up; None if it isn't.
        rows: Results of its workers.
        idle_s: Seconds without a row, after it was ready.
        past: The last figures of the workers before.
        figures: The current worker's last figures.
    """

    setup: Setup
    worker: int | None = None
    host: str = ""
    is_ready: bool = False
    lost: str | None = None
    rows: int = 0
    idle_s: float = 0.0
    past: list[Figures] = field(default_factory=list)
    figures: Figures = field(default_factory=dict)
    limits: Limits | None = None
    vain: int = 0  # workers in a row that have given no result
    heard: float = 0.0  # when the current one last said something, by `time.monotonic`

    @property
    def total(self) -> Figures:
        """The figures of all its workers."""
        return merged([*self.past, self.figures])


class Fleet:
    """All workers of a job. Stands in for the engine where a run needs its figures.

    Args:
        spec: The job.
        workers: Starts them.
        setups: What they are to be.
        log: Told, once, what a user should know of each.

    Attributes:
        members: One for each setup.
        prompts: Makes prompts; set by `open`.
    """

    prompts: ModelPrompts

    def __init__(
        self,
        spec: JobSpec,
        workers: Workers,
        setups: Iterable[Setup],
        log: Callable[[str], None],
    ) -> None:
        self._spec, self._workers, self._log = spec, workers, log
        self.members = [Member(setup) for setup in setups]
        self._numbers = count()
        self._by_worker: dict[int, Member] = {}
        self._said = set[str]()
        self._recall: Recall | None = None
        self._early: list[tuple[int, FromWorker]] = []  # what came while it was opened
        self._ending = False
        self._looked = 0.0
        self._polled, self._patience = time.monotonic(), _STEPS * stall_seconds()

    def open(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Start all workers, and wait until the first is ready; the others join as they come.

        Args:
            stopped: Whether to wait no longer: then nothing can be computed.

        Raises:
            ModelError: The model can't be used.
            EngineError, MachineError: No worker comes up; the error is the last one's.
        """
        for member in self.members:
            self._start(member)
        loaded = read_model(self._spec)
        early: list[tuple[int, FromWorker]] = []
        while not any(member.is_ready for member in self.members):
            if stopped():
                return
            early += self.poll(_POLL_S)
        self._early = early
        limits = next(member.limits for member in self.members if member.limits is not None)
        self.prompts = model_prompts(loaded, self._spec, limits, len(self.members), self._log)

    def poll(self, timeout: float) -> Sequence[tuple[int, FromWorker]]:
        """What concerns the rows in what workers have said: `Ready`, `Ended` and the like.

        Raises:
            EngineError, MachineError: The last worker was lost.
        """
        early, self._early = self._early, []
        if early:
            return early
        heard = [*self._workers.poll(timeout), *self._silent()]
        return [said for said in heard if self._heard(*said)]

    def send(self, worker: int, message: ToWorker) -> None:
        """Send a message to a worker."""
        self._workers.send(worker, message)

    def recall(self, answers: Iterable[Sequence[int]], constraint: str | None) -> None:
        """Have all workers draft from answers of earlier runs, too."""
        self._recall = Recall(tuple(map(tuple, answers)), constraint)
        for member in self.members:
            if member.is_ready and member.worker is not None:
                self.send(member.worker, self._recall)

    @property
    def ready(self) -> list[int]:
        """The workers that take rows."""
        return [m.worker for m in self.members if m.is_ready and m.worker is not None]

    @property
    def num_coming(self) -> int:
        """Workers that are not ready yet."""
        return sum(m.worker is not None and not m.is_ready for m in self.members)

    def begin_to_end(self, message: Finish | Stop) -> None:
        """Have all workers end; `is_open` says until when `poll` has something."""
        self._ending = True
        for member in self.members:
            if member.worker is None:
                continue
            if member.is_ready:
                self.send(member.worker, message)
            else:  # it can't listen before it has loaded the model
                self._end(member)

    def end(self) -> None:
        """End the workers that are left, whatever they do."""
        for member in self.members:
            if member.worker is not None:
                self._end(member)

    @property
    def is_open(self) -> bool:
        """Whether any worker is left."""
        return any(member.worker is not None for member in self.members)

    def note_time(self, is_idle: Callable[[int], bool]) -> None:
        """Count the time since the last call for those that have no rows."""
        now = time.perf_counter()
        passed, self._looked = now - (self._looked or now), now
        for member in self.members:
            if member.is_ready and member.worker is not None and is_idle(member.worker):
                member.idle_s += passed

    def load(self) -> tuple[int, int, int]:
        """Sequences running, sequences waiting, and tokens generated so far."""
        figures = [each for m in self.members for each in (*m.past, m.figures)]
        running, waiting, generated = (
            sum(f.get(name, 0) for f in figures)
            for name in ("running", "waiting", "generated_tokens")
        )
        return running, waiting, generated

    def measurements(self) -> Figures:
        """The figures of all workers together, named as in `batchrun.jobs.metrics`."""
        figures = across([member.total for member in self.members])
        for name, own in (("rss", machine.rss()), ("peak_rss", machine.peak_rss())):
            figures[name] += own
        if not figures["varies"] and len(kinds := self._arithmetics()) > 1:
            figures["varies"] = f"workers computed with {' and with '.join(kinds)}"
        return {**figures, "devices": list(self._by_device())}

    def close(self) -> None:
        """End all workers at once."""
        self._workers.close()

    def _by_device(self) -> Iterator[dict[str, Any]]:
        for member in self.members:
            total = member.total
            names = ("generated_tokens", "steps", "load_s", "peak_kv_mapped", "weights_bytes")
            yield {
                "device": member.setup.name,
                "host": member.host,
                "rows": member.rows,
                "idle_s": member.idle_s,
                **{name: total[name] for name in (*names, "peak_rss")},
                "lost": member.lost,
            }

    def _arithmetics(self) -> list[str]:
        found = (member.total["arithmetic"] for member in self.members)
        return sorted({name for name in found if name})

    def _silent(self) -> Iterator[tuple[int, FromWorker]]:
        """Workers that have said nothing for longer than a step may take: they are ended."""
        now = time.monotonic()
        if now - self._polled > _SUSPENDED_S:  # this process was
            for member in self.members:
                member.heard += now - self._polled
        self._polled = now
        for member in self.members:
            if (
                member.is_ready
                and member.worker is not None
                and now > member.heard + self._patience
            ):
                worker = member.worker
                self._workers.end(worker, at_once=True)
                yield worker, Lost(f"has not responded for {self._patience:.0f} s")

    def _end(self, member: Member) -> None:
        assert member.worker is not None
        self._workers.end(member.worker, at_once=True)
        self._forget(member)

    def _start(self, member: Member) -> None:
        member.worker, member.is_ready = next(self._numbers), False
        self._by_worker[member.worker] = member
        self._workers.start(member.worker, member.setup)

    def _heard(self, worker: int, message: FromWorker) -> bool:
        """Take in what a worker said; whether it also concerns the rows."""
        member = self._by_worker[worker]
        if member.worker != worker:
            return False  # it is gone, and another one has its place
        member.heard = time.monotonic()
        if isinstance(message, Log):
            self._say(message.text)
        elif isinstance(message, Ready):
            self._is_ready(member, message)
            return member.is_ready
        elif isinstance(message, Ended):
            member.vain = 0 if message.results else member.vain
            member.rows += len(message.results)
            member.figures = message.figures or member.figures
        elif isinstance(message, Closed):
            member.figures = message.figures
            self._workers.end(worker)
            self._forget(member)
        elif isinstance(message, Failed):
            self._workers.end(worker)
            self._give_up(member, str(message.error), message.error)
        elif isinstance(message, Lost):
            self._is_lost(member, message)
        return not isinstance(message, Log | Closed)

    def _is_ready(self, member: Member, message: Ready) -> None:
        member.host, member.figures = message.host, message.figures
        member.limits, member.is_ready = message.limits, True
        member.heard = time.monotonic()
        assert member.worker is not None
        if (problem := self._unlike_the_others(member)) is not None:
            self._workers.end(member.worker, at_once=True)
            member.figures, member.limits = {}, None  # it has computed nothing
            self._give_up(member, problem, EngineError(problem))
        elif self._recall is not None:
            self.send(member.worker, self._recall)

    def _unlike_the_others(self, member: Member) -> str | None:
        """Why a worker's answers might not be those of the others, or None."""
        for other in self.members:
            if other is member or other.limits is None or member.limits is None:
                continue
            mine, theirs = (m.limits.max_model_len for m in (member, other) if m.limits is not None)
            if mine != theirs:
                return f"its context has {mine:,} tokens, and that of {other.setup.name} {theirs:,}"
        kinds = self._arithmetics()
        if self._spec.runtime.deterministic and len(kinds) > 1:
            used = " and with ".join(kinds)
            return f"--deterministic can't be guaranteed: workers compute with {used}"
        return None

    def _is_lost(self, member: Member, message: Lost) -> None:
        member.vain += 1
        if message.for_good or member.vain > _RESTARTS or self._ending:
            times = f", {member.vain} times in a row" * (member.vain > 1)
            hint = _MEMORY if message.for_good else "for details: batchrun logs"
            problem = f"the worker on {member.setup.name} {message.how}{times}"
            self._give_up(member, f"its worker {message.how}{times}", MachineError(problem, hint))
            return
        rows = f", with {len(message.suspects):,} rows running" * message.crashed
        self._log(f"the worker on {member.setup.name} {message.how}{rows}; it restarts")
        self._forget(member)
        self._start(member)

    def _give_up(self, member: Member, reason: str, error: BaseException) -> None:
        """Go on without a device, if there are others."""
        self._forget(member)
        if self._ending:
            return
        member.lost = reason
        left = sum(m.worker is not None for m in self.members)
        was_ready = any(m.limits is not None for m in self.members)
        if not left or (isinstance(error, ModelError) and not was_ready):
            raise error
        of = f"{left} of {len(self.members)} devices"
        self._log(f"{member.setup.name} is lost: {reason}; the job continues with {of}")

    def _forget(self, member: Member) -> None:
        """Close the books of a worker that has ended."""
        if member.figures:
            member.past.append({**member.figures, "running": 0, "waiting": 0})
        member.worker, member.is_ready, member.figures = None, False, {}

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._log(text)
