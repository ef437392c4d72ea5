"""What a page about a job is made from: JSON-able values, and no word of how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from batchrun.jobs.folder import JobFolder
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.schema import COMMAND, SETUP
from batchrun.jobs.stats import summarise
from batchrun.report.timeline import timeline

EXAMPLES = 6  # rows with their answers
SAMPLES = 3  # of such a row, the first ones
FAILURES = 3  # rows of each reason
_BARS = 40  # of a histogram
_LENGTHS = {"prompt": "prompt_tokens", "completion": "completion_tokens"}
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}

# Given rows, and whether only their failures are wanted, returns samples with `row`, `sample`,
# `prompt`, `answer`, `error`, `finish_reason`, `unread`.
Examples = Callable[[Sequence[int], bool], list[dict[str, Any]]]


def collect(
    job: JobFolder,
    parameters: Mapping[str, Any],
    examples: Examples | None = None,
    rows: Sequence[int] | None = None,
) -> dict[str, Any]:
    """All that a page says of a job.

    Args:
        job: The job, in whatever state.
        parameters: What it was asked for.
        examples: Returns rows with prompts and answers; None leaves all of them out.

        rows: Those whose answers are wanted; by default some that are spread over the job.

    Returns:
        JSON-able: the `summary` (see `summarise`), its `parameters`, the `command` that submitted
        it (None if that was not recorded), its `runs` with the `setup` of each (likewise), the
        `timeline`, the `lengths` of prompts and completions (`least`, `width` and `counts` of a
        histogram's bars, and quantiles), and the `examples` and `failures` (by reason), None if
        they were left out.

    Raises:
        JobError: The job or its journal is damaged.
    """
    summary = summarise(job)
    with job.journal() as journal:
        runs = journal.runs()
        found = {
            "summary": summary,
            "parameters": dict(parameters),
            "command": journal.meta(COMMAND),
            "runs": [_run(journal, run) for run in runs],
            "timeline": timeline(runs, journal.samples),
            "lengths": {name: _lengths(journal, column) for name, column in _LENGTHS.items()},
        }
        answered = journal.answered(EXAMPLES) if rows is None else rows
        failing = journal.failing(FAILURES)
    if examples is None:
        return {**found, "examples": None, "failures": None}
    failed = examples(sorted({row for rows in failing.values() for row in rows}), True)
    by_row = {e["row"]: e for e in reversed(failed)}  # of several samples, the first
    by_reason = {
        kind: [by_row[row] for row in rows if row in by_row] for kind, rows in failing.items()
    }
    shown = [e for e in examples(answered, False) if e["sample"] < SAMPLES]
    return {**found, "examples": shown, "failures": by_reason}


def _run(journal: Journal, run: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: run[key] for key in ("id", "started_at", "ended_at", "state", "reason")}
    wall, setup = run["stats"].get("wall_s"), journal.meta(SETUP.format(run["id"]))
    return {**told, "wall_s": wall, "setup": setup}


def _lengths(journal: Journal, column: str) -> dict[str, Any] | None:
    histogram = journal.histogram(column, _BARS)
    quantiles = journal.quantiles(column, list(_SHARES.values()))
    if histogram is None or quantiles is None:
        return None
    least, width, counts = histogram
    told = dict(zip(_SHARES, quantiles, strict=True))
    return {"least": least, "width": width, "counts": counts, **told}
