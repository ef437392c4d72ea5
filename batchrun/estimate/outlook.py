"""How long a run will still take, from the rows in flight, the rows to come, and what steps cost.

The lengths of answers are estimated as Kaplan and Meier (1958) estimate lifetimes: a row in flight
counts too, as a life of which the beginning is known. Rows that have ended say too little alone,
since short answers end first. Lengths drawn from that estimate are played through the places of the
batch, which gives the steps that remain. Their time follows from the model of `batchrun plan` (see
`batchrun.estimate.measured`), corrected by how it did of late.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from batchrun.estimate.measured import Measured, StepSampler, amounts_of

Floats = npt.NDArray[np.float64]

_PER_OCTAVE, _OCTAVES = 16, 13  # of the grid of lengths: 4% apart, down to 1/8192
_PRIOR_ROWS = 2.0  # that the guess before any row has ended counts for
_GUESS = 0.5  # of `max_tokens`, where no earlier job has taught better
_PRIOR_GONE = 4.0  # rows that have ended halve that
_PLAYED = 4  # rows to come that are played, for each place; more take the average time
_BOUNDS = 1.28  # standard deviations: 8 of 10 cases are within
_LEAST_ERROR, _MOST_ERROR = 0.1, 0.8  # of any estimate
_PAST_S, _PAST_SHARE = 10.0, 0.25  # speed is that of these last seconds, or this share of all
_STEP_TOKENS = 16  # what a step costs, in tokens, before anything tells
_MADE_UP_S = 1.0  # of steps that say so
_FIGURES = (
    *("engine_s", "steps", "prefill_tokens", "decode_tokens", "drafted_tokens", "accepted_tokens"),
    *("generated_tokens", "shared_tokens", "sequence_s", "kv_s", "kv_live_s"),
)
_MOST_OFF = 3.0  # that a prediction of the past may have been; more was no steady state
_STEADY = 0.06  # of what is left: smaller changes are not shown
_FOLLOWS_S = 5.0  # in which larger ones are


class Left(NamedTuple):
    """Seconds that a run still takes, and two bounds that hold in 8 of 10 cases."""

    seconds: float
    least: float
    most: float


class _Work(NamedTuple):
    """Steps, and tokens of prompts and answers, to compute; and the relative error of these."""

    steps: float
    prompts: float
    answered: float
    error: float


class Lengths:
    """How long answers are, as shares of what they may be at most.

    Args:
        expected: The share expected before any row has ended, above 0.

    Attributes:
        num_ended: Number of rows that have.
    """

    def __init__(self, expected: float) -> None:
        last = _PER_OCTAVE * _OCTAVES
        self._grid: Floats = 2.0 ** (np.arange(-last, 1) / _PER_OCTAVE)  # the upper end of each bin
        self._ended = np.zeros(last + 1)
        gone = np.zeros(last + 1)
        if expected < 1:  # an exponential distribution, cut off at the most an answer may be
            gone = 1 - np.exp(-self._grid / max(expected, 1e-3))
        gone[-1] = 1.0
        self._prior = _PRIOR_ROWS * np.diff(gone, prepend=0.0)
        self.num_ended = 0

    def add(self, tokens: int, allowed: int) -> None:
        """Note that an answer that may have `allowed` tokens, at least 1, has ended."""
        self._ended[self._bins(np.array([tokens / allowed]))] += 1
        self.num_ended += 1

    def ended_by(self, running: Floats) -> Floats:
        """The share of answers that end by each length of the grid.

        Args:
            running: How far each row in flight is.
        """
        ended = self._ended + self._prior / (1 + self.num_ended / _PRIOR_GONE)
        begun = np.bincount(self._bins(running), minlength=len(ended))
        at_risk = np.cumsum((ended + begun)[::-1])[::-1]
        return np.asarray(1 - np.cumprod(1 - ended / np.maximum(at_risk, 1e-9)))

    def draw(self, ended_by: Floats, running: Floats) -> Floats:
        """What each row has still to go: one even draw of all lengths beyond where it is.

        Args:
            ended_by: See there.
            running: How far each row is.
        """
        count = len(running)
        even = (np.random.default_rng(count).permutation(count) + 0.5) / max(1, count)
        before = np.concatenate([[0.0], ended_by])[self._bins(running)]
        at = np.searchsorted(ended_by, before + (1 - before) * even)
        return np.maximum(0.0, self._grid[np.minimum(at, len(self._grid) - 1)] - running)

    def moments(self, ended_by: Floats) -> tuple[float, float]:
        """Mean and standard deviation of all answers' lengths."""
        weights = np.diff(ended_by, prepend=0.0)
        mean = float(weights @ self._grid)
        return mean, math.sqrt(max(0.0, float(weights @ self._grid**2) - mean**2))

    def _bins(self, shares: Floats) -> npt.NDArray[np.int64]:
        last = len(self._grid) - 1
        at = np.ceil(np.log2(np.maximum(shares, 1e-9)) * _PER_OCTAVE - 1e-6) + last
        bins: npt.NDArray[np.int64] = np.clip(at, 0, last).astype(np.int64)
        return bins


@dataclass(frozen=True)
class InFlight:
    """The rows that a run still has to compute.

    Args:
        generated: Tokens that each running row has.
        allowed: How many it may have, at least 1 each.
        coming: Rows that do not run yet; an estimate as long as not all were read.
        prompt_tokens: Of an average one of them.
        most_tokens: That an average one of them may generate.
    """

    generated: Sequence[int]
    allowed: Sequence[int]
    coming: float
    prompt_tokens: float
    most_tokens: float


class Outlook:
    """Says, again and again, how long a run will still take.

    Args:
        earlier: What earlier runs taught; None if there were none.
        places: Maximum sequences that run at once, in all engines together.
        stops: Whether answers may end before they reach their maximum.
        alike: Answers of one row, which are of like length: they tell as much as one.

    Attributes:
        lengths: To be told of each answer that ends.
    """

    def __init__(
        self, earlier: Measured | None, places: int, *, stops: bool = True, alike: int = 1
    ) -> None:
        earlier = earlier if earlier is not None and earlier.runs else None
        expected = _GUESS if earlier is None else earlier.share
        self.lengths = Lengths(expected if stops else 1.0)
        self._earlier, self._places, self._alike = earlier, places, alike
        self._sampler = StepSampler()
        self._most_running = 0
        self._past: deque[dict[str, float]] = deque([dict.fromkeys(_FIGURES, 0.0)])

    def left(self, figures: Mapping[str, Any], rows: InFlight, engines: int = 1) -> Left | None:
        """What remains; None as long as nothing is known of the speed.

        Args:
            figures: The run's, by the names of `batchrun.jobs.metrics`.
            rows: What it still has to compute.
            engines: How many compute at the same time.
        """
        self._sampler.observe(figures, engines)
        now = {name: float(figures[name]) for name in _FIGURES}
        always, recent = now, self._recent(now)
        costs = self._costs(always, engines)
        if not any(costs):
            return None
        work = self._work(always, recent, rows)
        *_, answered, held = amounts_of(always, engines)
        held *= work.answered / engines / max(1.0, answered)
        amounts = (work.steps, work.prompts / engines, work.answered / engines, held)
        ratios = []
        for passed in (recent, always):
            said = float(np.dot(costs, amounts_of(passed, engines)))
            ratios.append((passed["engine_s"] + _MADE_UP_S) / (said + _MADE_UP_S))
        found = float(np.dot(costs, amounts)) * min(_MOST_OFF, max(1 / _MOST_OFF, ratios[0]))
        off = abs(ratios[0] / ratios[1] - 1) / 2
        error = min(_MOST_ERROR, math.hypot(work.error, off, _LEAST_ERROR))
        return Left(found, found * (1 - error), found * (1 + error))

    def _recent(self, now: dict[str, float]) -> dict[str, float]:
        """What the figures have grown by of late."""
        past, seconds = self._past, now["engine_s"]
        since = seconds - max(_PAST_S, _PAST_SHARE * seconds)
        while len(past) > 1 and past[1]["engine_s"] <= since:
            past.popleft()
        grown = {name: now[name] - past[0][name] for name in now}
        if seconds > past[-1]["engine_s"]:
            past.append(now)
        return grown

    def _costs(self, always: Mapping[str, float], engines: int) -> list[float]:
        """Seconds per step, token of a prompt, token of an answer, and byte held in a step.

        Steps that are all alike can't tell these apart. Without earlier runs, one of each kind is
        made up, so that a step costs as much as some tokens until more is known.
        """
        measured = self._sampler.measured
        if self._earlier is not None:
            return measured.after(self._earlier).costs()
        steps, prompts, answered, _ = amounts_of(always, engines)
        if not steps or not measured.seconds:
            return []
        each = measured.seconds / (steps * _STEP_TOKENS + prompts + answered)
        scale = _MADE_UP_S / measured.seconds
        made_up = Measured()
        made_up.add((steps * scale, 0.0, 0.0, 0.0), steps * scale * _STEP_TOKENS * each)
        made_up.add((0.0, prompts * scale, 0.0, 0.0), prompts * scale * each)
        made_up.add((0.0, 0.0, answered * scale, 0.0), answered * scale * each)
        return measured.after(made_up).costs()

    def _work(
        self, always: Mapping[str, float], recent: Mapping[str, float], rows: InFlight
    ) -> _Work:
        """What remains to compute, in all engines together."""
        allowed = np.array(rows.allowed, dtype=float)
        running = np.minimum(1.0, np.array(rows.generated, dtype=float) / np.maximum(1.0, allowed))
        ended_by = self.lengths.ended_by(running)
        mean, deviation = self.lengths.moments(ended_by)
        places = self._num_places(len(running), rows.coming)
        played = math.ceil(min(rows.coming, _PLAYED * places))
        begun = self.lengths.draw(ended_by, running) * allowed
        new = self.lengths.draw(ended_by, np.zeros(played)) * rows.most_tokens
        more = max(0.0, rows.coming - played) * mean * rows.most_tokens
        generated = float(begun.sum() + new.sum()) + more

        ends = [*begun.tolist(), *[0.0] * (places - len(begun))]
        heapify(ends)
        for length in new.tolist():
            heapreplace(ends, ends[0] + length)
        # A row's tokens of one step: more than one where draft tokens are accepted.
        row_steps = recent["steps"] * recent["sequence_s"] / max(1e-9, recent["kv_s"])
        each = max(1.0, recent["generated_tokens"] / row_steps) if row_steps else 1.0
        rejected = recent["drafted_tokens"] - recent["accepted_tokens"]
        rejected /= max(1.0, recent["decode_tokens"])
        shared, prefilled = always["shared_tokens"], always["prefill_tokens"]
        prompts = rows.coming * rows.prompt_tokens * (prefilled + 1) / (shared + prefilled + 1)
        known = self.lengths.num_ended / self._alike + _PRIOR_ROWS
        left = max(1.0, (len(running) + rows.coming) / self._alike)
        error = _BOUNDS * deviation / max(mean, 1e-9) * math.sqrt(1 / known + 1 / left)
        return _Work(
            (max(ends) + more / places) / each,
            prompts,
            generated * (1 + rejected),
            error * generated / max(1.0, generated + prompts),
        )

    def _num_places(self, running: int, coming: float) -> int:
        """Rows that run at once from now on: as many as ever did, if rows have to wait."""
        self._most_running = max(self._most_running, running)
        crowded = coming >= 1 and self._most_running >= self._places // 2
        wanted = math.ceil(min(running + coming, self._places))
        return max(1, running, self._most_running if crowded else wanted)


class Countdown:
    """Keeps what is shown from swinging: it counts down, and changes when there is a reason to."""

    def __init__(self) -> None:
        self._end = self._at = 0.0

    def shown(self, now: float, left: Left) -> Left:
        """What to show at `now`, in seconds of a steady clock."""
        end, passed = now + left.seconds, now - self._at
        if not self._at:
            self._end = end
        elif abs(end - self._end) > _STEADY * left.seconds:
            self._end += (end - self._end) * min(1.0, passed / _FOLLOWS_S)
        self._at = now
        return self.at(now, left)

    def at(self, now: float, left: Left) -> Left:
        """What to show at `now`, if nothing more is known."""
        shown = max(0.0, self._end - now)
        scale = shown / left.seconds if left.seconds else 1.0
        return Left(shown, left.least * scale, left.most * scale)
