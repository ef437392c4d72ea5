"""Hands out results row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator

from batchrun.jobs.errors import JobError, input_changed
from batchrun.jobs.journal.results import Result


class ResultMissing(JobError):  # noqa: N818 - what happened
    """A row lacks samples."""


class ResultReader:
    """The results of one row after the other.

    Args:
        results: In (row, sample) order.
        n: Samples per row.
        partial: Whether samples may be missing.
        keep: Return only this many of a row's samples, the best by mean log-probability first,
            renumbered; none of a row that lacks samples, since its best may be among those.
        rows: Number of rows; None if unknown.
    """

    def __init__(
        self,
        results: Iterator[Result],
        n: int,
        partial: bool,
        keep: int | None = None,
        rows: int | None = None,
    ) -> None:
        self.n, self._rows, self._keep = n, rows, keep
        self._taken = 0
        self._results = results
        self._samples = list(range(n))
        self._partial = partial
        self._next = next(results, None)

    def take(self, row: int) -> list[Result]:
        """The results of the next row."""
        found: list[Result] = []
        self._taken = row + 1
        while self._next is not None and self._next.row <= row:
            found.append(self._next)
            self._next = next(self._results, None)
        samples = [result.sample for result in found if result.row == row]
        if samples != self._samples or len(found) != len(samples):
            ordered = len(found) == len(samples) and samples == sorted(
                set(samples).intersection(self._samples)
            )
            if not (ordered and self._partial):
                kind = ResultMissing if ordered else JobError
                raise kind(
                    f"row {row} has the samples {samples}, not {self._samples}"
                    if ordered
                    else f"results out of order at row {row}",
                    hint="batchrun resume, or batchrun export --partial for the finished rows",
                )
        if self._keep is None:
            return found
        best = sorted(found, key=_rank)[: self._keep if samples == self._samples else 0]
        return [result._replace(sample=i) for i, result in enumerate(best)]

    def finish(self) -> None:
        """Check that no result and no row is left."""
        if self._next is not None:
            raise input_changed(
                f"there is a result for row {self._next.row}, which the input does not have"
            )
        if not self._partial and self._rows is not None and self._taken < self._rows:
            raise input_changed(f"the input ended after {self._taken:,} of its {self._rows:,} rows")


def _rank(result: Result) -> tuple[bool, float, int]:
    """Sorts the likeliest first and errors last."""
    mean = result.mean_logprob
    return (result.status != "ok", math.inf if mean is None else -mean, result.sample)
