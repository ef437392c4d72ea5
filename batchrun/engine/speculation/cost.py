"""What a step costs and what a draft token adds to it, measured while the job runs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from batchrun.engine.core import Segment

_KEPT = 0.98  # of the weight of earlier steps, with each new one: some fifty steps count
_SCALE = np.array([1.0, 64.0, 64.0, 64.0])  # of what a step does, to about 1
_DOUBT = np.diag([0.01, 0.05, 0.1, 0.05])  # weights of what is assumed of these four
_DRAFT = 1.0  # what a draft token is assumed to cost, in units of a full step's tokens
_DEAREST = 1.5  # cost of a draft token, in units of a full step's tokens: it has logits of its own
# Before there were this many, as squares in units of 64, one costs at most that share of what a row
# costs in the step: likely tokens are then tried.
_TRIED, _UNTRIED = 0.05, 0.6
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
        self._products, self._targets = np.zeros((4, 4)), np.zeros(4)
        self._token = 0.0  # seconds of a token in full steps
        self._full = 0.0  # tokens of the fullest step; older ones count for less
        self._num_steps = 0
        self._fit: np.ndarray | None = None

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
        does = np.array([1.0, rows, drafts, tokens]) / _SCALE
        if self._full:
            expected = float(self._solved() @ does)
            seconds = min(seconds, _OUTLIER * expected) if expected > 0 else seconds
        self._products = _KEPT * self._products + np.outer(does, does)
        self._targets = _KEPT * self._targets + seconds * does
        weight = 0.3 if self._full else 1.0
        self._full = max(tokens, 0.995 * self._full)
        if 2 * tokens >= self._full:
            self._token += weight * (seconds / tokens - self._token)
        self._fit = None

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
        fixed, row, draft, token = self._solved() / _SCALE
        step = fixed + (row + token) * rows + token * others
        step = max(float(step), self._token * (rows + others) / 2)
        price = min(max(float(draft + token), 0.005 * step / rows), _DEAREST * self._token)
        if self._products[2, 2] < _TRIED:
            price = min(price, _UNTRIED * step / rows)
        return step, price

    def _solved(self) -> np.ndarray:
        if self._fit is None:
            assumed = _DOUBT @ (np.array([0.0, 0.0, _DRAFT - 1, 1.0]) * self._token * _SCALE)
            self._fit = np.linalg.solve(self._products + _DOUBT, self._targets + assumed)
        return self._fit
