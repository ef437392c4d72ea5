"""Whether a job's answers are independent of how its rows were batched, by what its runs noted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from batchrun.jobs.journal.readings import Readings


def computing_runs(journal: Readings) -> list[dict[str, Any]]:
    """The runs that computed any tokens, as `Readings.runs` gives them."""
    answering = journal.answering_runs()
    return [
        run
        for run in journal.runs()
        if run["id"] in answering or run["stats"].get("generated_tokens")
    ]


def why_not(runs: list[dict[str, Any]]) -> str | None:
    """Why answers that these runs computed may depend on the batch, in one clause, or None."""
    for run in runs:
        if not run["stats"].get("arithmetic"):
            return f"run {run['id']} did not record how it computed"
        if varies := run["stats"].get("varies"):
            return str(varies)
    for first, then in pairwise(runs):
        one, other = first["stats"]["arithmetic"], then["stats"]["arithmetic"]
        if one != other:
            return f"runs {first['id']} and {then['id']} computed with {one} and {other}"
    return None
