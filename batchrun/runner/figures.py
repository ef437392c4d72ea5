"""What a run measures, by the names of `batchrun.jobs.metrics`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from batchrun import machine
from batchrun.estimate.measured import Measured, StepSampler
from batchrun.jobs import folder as folders
from batchrun.jobs.errors import JobError
from batchrun.jobs.metrics import Figures, recorded
from batchrun.jobs.spec import JobSpec
from batchrun.runner.reader import Reader


class Measuring(Protocol):
    """An engine, or several."""

    def measurements(self) -> Mapping[str, Any]:
        """Its figures so far, by the names of `batchrun.jobs.metrics`."""

    def close(self) -> None:
        """Release what it holds."""


class RunFigures:
    """A run's figures, assembled from those that its parts count. Any thread may read them.

    Attributes:
        began: When the run began, by `time.perf_counter`.
        engine_began, engine_ended: When the engine's work began and ended.
        counted: Figures that belong to no part; the run itself updates them.
        reader, workbench: Set once they exist.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.counted = recorded({})
        self.reader: Reader | None = None
        self.workbench: Measuring | None = None
        self._steps = StepSampler()
        self.engine_began: float | None = None
        self.engine_ended: float | None = None
        self._last_at: dict[int, float] = {}  # by number of sequences, when that many last ran

    @property
    def requests(self) -> int:
        """Rows and samples that have had a prompt so far."""
        return 0 if self.reader is None else self.reader.made

    def stepped(self, running: int) -> None:
        """Note that a step with this many sequences has ended."""
        self._last_at[running] = time.perf_counter()

    def observed(self) -> Figures:
        """Like `so_far`; also samples how long steps take."""
        figures = self.so_far()
        self._steps.observe(figures, len(figures["devices"]) or 1)
        return figures

    def so_far(self) -> Figures:
        """All figures, as of now."""
        now = time.perf_counter()
        measured = self.counted | {"wall_s": now - self.began}
        measured |= {"rss": machine.rss(), "peak_rss": machine.peak_rss()}
        if self.engine_began is not None:
            measured["engine_s"] = (self.engine_ended or now) - self.engine_began
        if self.workbench is not None:
            measured |= self.workbench.measurements()
            measured["tail_s"] = self._tail(measured)
        if self.reader is not None:
            duplicates, saved = self.reader.duplicates, self.reader.savings.saved()
            measured["tokenise_s"] = self.reader.seconds
            measured["plan_s"] = self.reader.planner.seconds if self.reader.planner else 0.0
            measured["duplicates"] = duplicates.rows
            measured["duplicate_tokens"] = duplicates.tokens
            measured["completions"] += duplicates.rows
            measured["saved_prompt_tokens"] = saved.prompt_tokens
            steps = measured["steps"]
            measured["saved_steps"] = round(saved.steps * steps)
            if saved.tail:  # the same tokens in more steps: count a step's fixed cost
                cost = self._steps.measured.costs()[0] or measured["engine_s"] / max(1, steps)
                measured["saved_tail_s"] = saved.tail * steps * cost
        return recorded(measured)

    def remember(self, spec: JobSpec) -> None:
        """Keep how long steps took, for `batchrun plan`."""
        measured, planner = self._steps.measured, self.reader and self.reader.planner
        if not measured.seconds:
            return
        home, measured.load_s = folders.home(), self.counted["load_s"]
        if planner and self.counted["completion_tokens"]:  # a job that only scores teaches none
            measured.share = planner.share
        with suppress(JobError, OSError):  # the job is done; this only helps later estimates
            measured.after(Measured.load(home, spec)).save(home, spec)

    def _tail(self, measured: Mapping[str, Any]) -> float:
        """Seconds from when half the average number of sequences last ran to the end."""
        seconds = measured["kv_s"]
        if not seconds or self.engine_ended is None:
            return 0.0
        half = measured["sequence_s"] / seconds / 2
        full = [at for running, at in self._last_at.items() if running >= half]
        return self.engine_ended - max(full, default=self.engine_ended)
