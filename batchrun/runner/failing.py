"""Ends a job whose rows all fail the same way, instead of failing the whole input.

Rows count in the order in which they end. But the reader is far ahead of the engine, so many rows
without a prompt may end long before the first one with a prompt does: if there are any with a
prompt by then, all of them have to fail too, or as many as it takes.
"""

from __future__ import annotations

from collections.abc import Callable

from batchrun.jobs.errors import JobError
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import CopiedResult, Result

ENOUGH = 100  # rows
_SAID = 300  # characters of an error

_COLUMN = "name the column that holds the prompts (--prompt-column, --template)"
_ADVICE = {
    "prompt_too_long": "shorten the prompts, or use a model with a longer context",
    "kv_budget": "raise --kv-budget, or leave it out",
    "null_prompt": f"{_COLUMN}, or skip such rows (--skip-empty)",
    "empty_prompt": f"{_COLUMN}, or skip such rows (--skip-empty)",
    "missing_field": _COLUMN,
    "wrong_type": _COLUMN,
    "bad_parameter": "correct that column, or treat it as data (--ignore-param-columns)",
    "not_finite": "the model's numbers overflow: try --dtype float32",
}


class SameFailure:
    """Watches how rows end, until one is answered or fails in another way.

    Args:
        job: The job's id.
        made: Returns how many requests the reader has made in this run.
        journal: The job's, for how rows ended in earlier runs.
    """

    def __init__(self, job: str, made: Callable[[], int], journal: Journal) -> None:
        self._job, self._made = job, made
        self._rows: set[int] = set()
        self._ended = 0  # requests of this run that failed
        self._needed: int | None = None  # requests that must fail too before the job ends
        counts, kinds = journal.counts(), list(journal.tally("error_kind"))
        self._earlier, self._kind = counts.failed, kinds[0] if kinds else None
        self._is_over = bool(len(kinds) > 1 or counts.skipped or journal.answering_runs())
        if counts.failed and not self._is_over:
            self._example = next(_said(r) for r in journal.results() if r.status == "error")

    def error(self) -> JobError | None:
        """The error to end the job with, if enough rows have failed by now."""
        count = self._earlier + len(self._rows)
        if self._is_over or count < ENOUGH:
            return None
        if self._needed is None:
            self._needed = min(ENOUGH, self._made())
        if self._ended < self._needed:
            return None
        advice = _ADVICE.get(self._kind or "")
        return JobError(
            f"the first {count:,} rows all failed the same way ({self._kind}): {self._example}",
            hint=f"{advice}; or " * bool(advice)
            + f"continue anyway: batchrun resume {self._job} --keep-going",
        )

    def see(self, result: Result | CopiedResult) -> None:
        """Take in a result."""
        if self._is_over:
            return
        if isinstance(result, CopiedResult) or result.status != "error":
            self._is_over = True
            return
        if self._kind is None:
            self._kind, self._example = result.error_kind, _said(result)
        self._is_over = result.error_kind != self._kind
        self._rows.add(result.row)
        self._ended += bool(result.prompt_tokens)  # else the reader found it, and made no request


def _said(result: Result) -> str:
    return f"row {result.row}: {(result.error or '')[:_SAID]}"
