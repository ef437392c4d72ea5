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
_GUESSED_ROWS = 2.0  # that the guess before any row has ended counts for
_GUESS = 0.5  # of `max_tokens`, where no earlier job has taught better
_USUAL_ROWS = 8.0  # that the rate of all rows counts for, at each length
_PLAYED = 4  # rows to come that are played, for each place; more take the average time
_BOUNDS = 1.28  # standard deviations: 8 of 10 cases are within
_LEAST_ERROR, _MOST_ERROR = 0.1, 0.8  # of any estimate
_PAST_S, _PAST_SHARE = 10.0, 0.25  # speed is that of these last seconds, or this share of all
_KEPT_SHARE = 0.005  # of the time so far, between two figures that are kept: some dozens are
_STEP_TOKENS = 16  # what a step costs, in tokens, before anything tells
_EARLIER_S = 5.0  # of earlier runs' steps that count beside this one's
_MADE_UP_S = 1.0  # of steps that say so
_FIGURES = (
    *("engine_s", "steps", "prefill_tokens", "decode_tokens", "drafted_tokens", "accepted_tokens"),
    *("generated_tokens", "shared_tokens", "sequence_s", "kv_s", "kv_live_s"),
)
_MOST_OFF = 3.0  # that a prediction of the past may have been; more was no steady state
_DRAFTS_S = 3.0  # how good draft tokens are changes quickly
_STEADY = 0.06  # of what is left: smaller changes are not shown
_FOLLOWS_S, _FOLLOWS_SHARE = 5.0, 0.2  # in which larger ones are; less at the beginning


class Left(NamedTuple):
    """Seconds that a run still takes, and two bounds that hold in 8 of 10 cases."""

    seconds: float
    least: float
    most: float


class _Work(NamedTuple):
    """What is still to compute.

    Attributes:
        steps: Of all engines, which step at the same time.
        prompts, answered: Tokens of prompts and of answers.
        held: Bytes of KV cache times steps.
        error: The relative error of all that.
    """

    steps: float
    prompts: float
    answered: float
    held: float
    error: float


def _rate_of(expected: float) -> float:
    """The rate of an exponential distribution, cut off at 1, with this mean; 0 for a mean of 1."""
    low, high = 0.0, 1e4
    for _ in range(60):
        rate = (low + high) / 2
        if (1 - math.exp(-rate)) / rate > expected:
            low = rate
        else:
            high = rate
    return low if expected < 1 else 0.0


class Lengths:
    """How long answers are, as shares of what they may be at most.

    Where few rows tell, they are taken to end at the rate at which all rows did (an exponential
    distribution); where many do, those are believed.

    Args:
        expected: The share expected before any row has ended, above 0.

    Attributes:
        num_ended: Number of rows that have.
    """

    def __init__(self, expected: float) -> None:
        last = _PER_OCTAVE * _OCTAVES
        self._grid: Floats = 2.0 ** (np.arange(-last, 1) / _PER_OCTAVE)  # the upper end of each bin
        self._widths = np.diff(self._grid, prepend=0.0)
        self._ended = np.zeros(last + 1)
        self._rate = _rate_of(expected)
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
        ended = self._ended
        begun = np.bincount(self._bins(running), minlength=len(ended))
        at_risk = np.cumsum((ended + begun)[::-1])[::-1]
        lived = float(ended @ self._grid + running.sum())
        guessed = _GUESSED_ROWS if self._rate else 0.0
        rate = (ended[:-1].sum() + guessed) / max(1e-9, lived + guessed / max(1e-9, self._rate))
        usual = 1 - np.exp(-rate * self._widths)
        hazard = (ended + _USUAL_ROWS * usual) / (at_risk + _USUAL_ROWS)
        hazard[-1] = 1.0
        return np.asarray(1 - np.cumprod(1 - hazard))

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
        always, recent = now, self._since(now, max(_PAST_S, _PAST_SHARE * now["engine_s"]))
        costs = self._costs(always, engines)
        if not any(costs):
            return None
        work = self._work(always, rows)
        amounts = (work.steps, *(each / engines for each in work[1:4]))
        ratios = []
        for passed in (recent, always):
            said = float(np.dot(costs, amounts_of(passed, engines)))
            ratios.append((passed["engine_s"] + _MADE_UP_S) / (said + _MADE_UP_S))
        found = float(np.dot(costs, amounts)) * min(_MOST_OFF, max(1 / _MOST_OFF, ratios[0]))
        off = abs(ratios[0] / ratios[1] - 1) / 2
        error = min(_MOST_ERROR, math.hypot(work.error, off, _LEAST_ERROR))
        return Left(found, found * (1 - error), found * (1 + error))

    def _since(self, now: dict[str, float], seconds: float) -> dict[str, float]:
        """What the figures have grown by in about the last seconds."""
        past = self._past
        while len(past) > 1 and past[1]["engine_s"] <= now["engine_s"] - seconds:
            past.popleft()
        passed = now["engine_s"] - past[-1]["engine_s"]
        if passed > _KEPT_SHARE * now["engine_s"]:
            past.append(now)
        return {name: now[name] - past[0][name] for name in now}

    def _last(self, seconds: float) -> dict[str, float]:
        """What the figures had last grown by, in at least so many seconds."""
        *earlier, now = self._past
        old = [was for was in earlier if was["engine_s"] <= now["engine_s"] - seconds]
        was = old[-1] if old else (earlier or [now])[0]
        return {name: now[name] - was[name] for name in now}

    def _costs(self, always: Mapping[str, float], engines: int) -> list[float]:
        """Seconds per step, token of a prompt, token of an answer, and byte held in a step.

        Steps that are all alike can't tell these apart. Without earlier runs, one of each kind is
        made up, so that a step costs as much as some tokens until more is known.
        """
        measured, earlier = self._sampler.measured, self._earlier
        if earlier is not None:
            weight = min(1.0, _EARLIER_S / max(1e-9, earlier.seconds))
            moments = (weight * np.array(earlier.moments)).tolist()
            products = (weight * np.array(earlier.products)).tolist()
            return measured.after(Measured(moments, products)).costs()
        steps, prompts, answered, held = amounts_of(always, engines)
        if not steps or not measured.seconds:
            return []
        each = measured.seconds / (steps * _STEP_TOKENS + prompts + answered)
        scale = _MADE_UP_S / measured.seconds
        made_up = Measured()
        made_up.add((steps * scale, 0.0, 0.0, 0.0), steps * scale * _STEP_TOKENS * each)
        made_up.add((0.0, prompts * scale, 0.0, 0.0), prompts * scale * each)
        made_up.add((0.0, 0.0, answered * scale, 0.0), answered * scale * each)
        made_up.add((0.0, 0.0, 0.0, held * scale), 0.0)
        return measured.after(made_up).costs()

    def _work(self, always: Mapping[str, float], rows: InFlight) -> _Work:
        """What remains to compute, in all engines together."""
        lengths, now = self.lengths, self._last(_DRAFTS_S)
        allowed, generated = (np.array(n, dtype=float) for n in (rows.allowed, rows.generated))
        running = np.minimum(1.0, generated / np.maximum(1.0, allowed))
        ended_by = lengths.ended_by(running)
        mean, deviation = lengths.moments(ended_by)
        places = self._num_places(len(running), rows.coming)
        played = math.ceil(min(rows.coming, _PLAYED * places))
        begun = lengths.draw(ended_by, running) * allowed
        new = lengths.draw(ended_by, np.zeros(played)) * rows.most_tokens
        like_new = rows.coming / max(1, played)  # rows to come for each that is played
        tokens = float(begun.sum() + like_new * new.sum())

        ends = [*begun.tolist(), *[0.0] * (places - len(begun))]
        heapify(ends)
        for length in new.tolist():
            heapreplace(ends, ends[0] + length)
        # A row's tokens of one step: more than one where draft tokens are accepted.
        row_steps = now["steps"] * now["sequence_s"] / max(1e-9, now["kv_s"])
        each = max(1.0, now["generated_tokens"] / row_steps) if row_steps else 1.0
        rejected = now["drafted_tokens"] - now["accepted_tokens"]
        rejected /= max(1.0, now["decode_tokens"])
        steps = (max(ends) + (like_new - 1) * float(new.sum()) / places) / each

        shared, prefilled = always["shared_tokens"], always["prefill_tokens"]
        prompts = rows.coming * rows.prompt_tokens * (prefilled + 1) / (shared + prefilled + 1)
        context = rows.prompt_tokens + generated
        live = now["kv_live_s"] / max(1e-9, now["kv_s"]) / max(1.0, context.sum())  # a token's
        held = float(begun @ (context + begun / 2))
        held += like_new * float(new @ (rows.prompt_tokens + new / 2))

        known = lengths.num_ended / self._alike + _GUESSED_ROWS
        left = max(1.0, (len(running) + rows.coming) / self._alike)
        error = _BOUNDS * deviation / max(mean, 1e-9) * math.sqrt(1 / known + 1 / left)
        error *= tokens / max(1.0, tokens + prompts)
        return _Work(steps, prompts, tokens * (1 + rejected), held * live / each, error)

    def _num_places(self, running: int, coming: float) -> int:
        """Rows that run at once from now on: as many as ever did, if rows have to wait."""
        self._most_running = max(self._most_running, running)
        crowded = coming >= 1 and self._most_running >= self._places // 2
        wanted = math.ceil(min(running + coming, self._places))
        return max(1, running, self._most_running if crowded else wanted)


class Countdown:
    """Keeps what is shown from swinging: it counts down, and changes when there is a reason to."""

    def __init__(self) -> None:
        self._began = self._end = self._at = 0.0

    def shown(self, now: float, left: Left) -> Left:
        """What to show at `now`, in seconds of a steady clock."""
        end, passed = now + left.seconds, now - self._at
        if not self._at:
            self._began, self._end = now, end
        elif abs(end - self._end) > _STEADY * left.seconds:
            slow = min(_FOLLOWS_S, _FOLLOWS_SHARE * (now - self._began))
            self._end += (end - self._end) * (min(1.0, passed / slow) if slow else 1.0)
        self._at = now
        return self.at(now, left)

    def at(self, now: float, left: Left) -> Left:
        """What to show at `now`, if nothing more is known."""
        shown = max(0.0, self._end - now)
        scale = shown / left.seconds if left.seconds else 1.0
        return Left(shown, left.least * scale, left.most * scale)
