"""What a step costs and what a draft token adds to it, measured while the job runs."""

from __future__ import annotations

from collections.abc import Iterable

from batchrun.engine.core import Segment

_KEPT = 0.98  # of the weight of earlier steps, with each new one: some fifty steps count
_UNIT = 64.0  # rows, draft tokens and tokens are counted in such units, to be about 1
_DOUBT = (0.01, 0.05, 0.1, 0.05)  # weights of what is assumed of a step and of these three
_DRAFT = 1.0  # what a draft token is assumed to cost, in units of a full step's tokens
_DEAREST = 1.5  # cost of a draft token, in units of a full step's tokens: it has logits of its own
# Before there were this many, as squares in units of 64, one costs at most that share of what a row
# costs in the step: likely tokens are then tried.
_TRIED, _UNTRIED = 0.05, 0.6
_STALE = 8  # steps after which a fit is not used any more
_OUTLIER = 1.5  # times as long as expected; longer steps count as this long


class StepCost:
    """Seconds of a step by what it does: a linear fit that forgets.

    A step has a fixed part, as the weights are read, and parts for its rows, its draft tokens, and
    all its tokens. Steps with prompts tell what a token costs where there are many; a draft token
    is assumed to cost as much, until steps with more and fewer of them tell it apart, but no
    more than is worth trying. The last steps decide, so the fit follows the batch and the machine.

    Args:
        free: Tokens of a step that take no longer than one, because the weights are read anyway.
    """

    def __init__(self, free: int) -> None:
        self.free = free
        # Sums over steps: what they do times what they do, and times the seconds that they took.
        self._products, self._targets = [[0.0] * 4 for _ in range(4)], [0.0] * 4
        self._token = 0.0  # seconds of a token in full steps
        self._full = 0.0  # tokens of the fullest step; older ones count for less
        self._num_steps = 0
        self._fit = [0.0] * 4  # seconds of a step, a row, a draft token, a token
        self._unsolved = 0  # steps since

    @property
    def is_known(self) -> bool:
        """Whether any step was measured."""
        return self._num_steps > 1

    def observe(self, segments: Iterable[Segment], seconds: float) -> None:
        """Take in a step and the seconds that it took; the first one warms up and does not count.

        Args:
            segments: The step's segments.
            seconds: How long it took.
        """
        rows = drafts = tokens = 0
        for segment in segments:
            rows += segment.sampled
            drafts += segment.num_drafts
            tokens += segment.length
        self._num_steps += 1
        if self._num_steps == 1:
            return
        does = 1.0, rows / _UNIT, drafts / _UNIT, tokens / _UNIT
        if self._full:
            fit = self._fit if self._unsolved < _STALE else self._solved()
            expected = sum(each * cost for each, cost in zip(does, fit, strict=True))
            seconds = min(seconds, _OUTLIER * expected) if expected > 0 else seconds
        for sums, each in zip((*self._products, self._targets), (*does, seconds), strict=True):
            sums[:] = [_KEPT * s + each * other for s, other in zip(sums, does, strict=True)]
        weight = 0.3 if self._full else 1.0
        self._full = max(tokens, 0.995 * self._full)
        if 2 * tokens >= self._full:
            self._token += weight * (seconds / tokens - self._token)
        self._unsolved += 1

    def of(self, rows: int, others: int = 0) -> tuple[float, float]:
        """The cost of a step in which every row computes one token.

        Args:
            rows: Its rows, at least one.
            others: Tokens of prompts that it computes, too.

        Returns:
            The step's seconds, and those of each draft token beyond what is free; before anything
            is measured, seconds in which only their ratio counts.
        """
        if not self.is_known:
            return 1.0, 1.0 / rows
        fixed, row, draft, token = self._solved()
        row, draft, token = row / _UNIT, draft / _UNIT, token / _UNIT
        step = fixed + (row + token) * rows + token * others
        step = max(step, self._token * (rows + others) / 2)
        price = min(max(draft + token, 0.005 * step / rows), _DEAREST * self._token)
        if self._products[2][2] < _TRIED:
            price = min(price, _UNTRIED * step / rows)
        return step, price

    def _solved(self) -> list[float]:
        if self._unsolved:
            assumed = 0.0, 0.0, (_DRAFT - 1) * _UNIT * self._token, _UNIT * self._token
            equations = [
                [*(s + (i == j) * doubt for j, s in enumerate(sums)), target + doubt * known]
                for i, (sums, target, doubt, known) in enumerate(
                    zip(self._products, self._targets, _DOUBT, assumed, strict=True)
                )
            ]
            self._fit, self._unsolved = _solve(equations), 0
        return self._fit


def _solve(equations: list[list[float]]) -> list[float]:
    """Solve the equations of a positive definite matrix `[n, n]`, with their right sides behind.

    Faster than numpy for so few, above all with the caches that a step of the model leaves.
    """
    found: list[float] = []
    for i, row in enumerate(equations):  # below the diagonal, nothing is left
        for other in equations[i + 1 :]:
            share = other[i] / row[i]
            other[i:] = [a - share * b for a, b in zip(other[i:], row[i:], strict=True)]
    for i, row in reversed(list(enumerate(equations))):
        rest = sum(a * b for a, b in zip(row[i + 1 : -1], found, strict=True))
        found.insert(0, (row[-1] - rest) / row[i])
    return found
