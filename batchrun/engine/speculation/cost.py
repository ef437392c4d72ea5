"""What a step costs and what a draft token adds to it, measured while the job runs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from batchrun.engine.core import Segment

_KEPT = 0.97  # of the weight of earlier steps, with each new one: some 33 steps count
_DOUBT = 0.3  # weight of what is assumed before anything is measured
_SCALE = np.array([1, 64, 64, 64, 16384], np.float64)  # of what a step does, to about 1


class StepCost:
    """Seconds of a step by what it does: a linear fit that forgets.

    A step has a fixed part (the weights are read), and parts for its rows, for the keys and values
    that they attend to, for the tokens of prompts, and for draft tokens. The last steps decide, so
    the fit follows the batch and the machine.

    Args:
        free: Tokens of a step that take no longer than one, because the weights are read anyway.
    """

    def __init__(self, free: int) -> None:
        self.free = free
        self._products = np.zeros((5, 5))
        self._targets = np.zeros(5)
        self._seconds = self._tokens = 0.0
        self._solution: np.ndarray | None = None

    def observe(self, segments: Iterable[Segment], seconds: float) -> None:
        """Take in a step and the seconds that it took."""
        does = _does(segments, self.free)
        self._products = _KEPT * self._products + np.outer(does, does)
        self._targets = _KEPT * self._targets + seconds * does
        tokens = float(does[1:4] @ _SCALE[1:4])
        self._seconds = _KEPT * self._seconds + seconds
        self._tokens = _KEPT * self._tokens + max(tokens, 1.0)
        self._solution = None

    @property
    def is_known(self) -> bool:
        """Whether any step was measured."""
        return self._tokens > 0

    def of(self, rows: int, attended: int, others: int = 0) -> tuple[float, float]:
        """The cost of a step in which every row computes one token.

        Args:
            rows: Its rows.
            attended: Tokens that they attend to, all together.
            others: Tokens of prompts that it computes, too.

        Returns:
            The step's seconds, and those of each draft token beyond what is `free`; their ratio is
            an assumption before anything is measured.
        """
        if not self.is_known:
            return 1.0, 1.0 / max(rows, 1)
        if self._solution is None:
            self._solution = self._solved()
        mean = self._seconds / self._tokens
        does = np.array([1, rows, 0, others, attended]) / _SCALE
        step = max(float(self._solution @ does), mean * max(rows, 1) / 4)
        draft = float(self._solution[2]) / _SCALE[2]
        # A token more costs at most what a token costs on average, and never nothing for long.
        return step, min(max(draft, 0.02 * step / max(rows, 1)), step / max(rows, 1))

    def _solved(self) -> np.ndarray:
        """The fit, drawn to half a token's mean cost for a draft token, and to small numbers."""
        mean = self._seconds / self._tokens
        doubt = _DOUBT * np.array([0.01, 0.1, 1, 0.1, 0.1])
        assumed = np.array([0, 0.5, 0.5, 0.5, 0]) * mean * _SCALE
        return np.linalg.solve(self._products + np.diag(doubt), self._targets + doubt * assumed)


def _does(segments: Iterable[Segment], free: int) -> np.ndarray:
    """Of a step: 1, rows, draft tokens that are not free, tokens of prompts, tokens attended to."""
    rows = drafts = others = attended = 0
    for segment in segments:
        attended += segment.end
        drafts += segment.num_drafts
        if segment.sampled:
            rows += 1
            others += segment.length - 1 - segment.num_drafts
        else:
            others += segment.length
    paid = min(drafts, max(0, rows + others + drafts - free))
    return np.array([1, rows, paid, others, attended]) / _SCALE
