"""How a job went, in a few lines: rows, an answer, the most frequent failure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchrun.jobs.folder import JobFolder
from batchrun.jobs.spec import JobSpec
from batchrun.report.text import counted, seconds

_LOOKED_AT = 20  # rows, for one that is answered
_SHOWN = 200  # characters of an answer or an error


def of_rows(spec: JobSpec, rows: Mapping[str, Any], wall_s: float, *, written: bool = True) -> str:
    """How many rows are done, kept, skipped and failed.

    Args:
        spec: The job.
        rows: See `batchrun.jobs.stats.summarise`.
        wall_s: How long the run took.
        written: Whether there is an output.
    """
    total = "?" if rows["total"] is None else f"{rows['total']:,}"
    line = f"{rows['done']:,} of {total} rows"
    if spec.keep is not None:
        line += f", the best {spec.keep:,} of {spec.n:,} samples of each,"
    elif spec.n > 1:
        line += f", {spec.n:,} samples of each,"
    line += f" in {seconds(wall_s)}"
    if rows["resumed"]:
        line += f", {rows['resumed']:,} of them kept from earlier runs"
    if rows.get("skipped"):
        line += f", {rows['skipped']:,} skipped without a prompt"
    if rows["failed"]:
        line += f", {rows['failed']:,} failed"
        line += f" (the column `{spec.output.prefix}error` says why)" * written
    return line


def of_answers(job: JobFolder, rows: Mapping[str, Any]) -> dict[str, Any]:
    """An answer, and the most frequent failure, JSON-able.

    Returns:
        `answer` (`row` and `text`, or None) and `failure` (`kind`, `rows`, `row` and `error` of an
        example; or None).
    """
    from batchrun.peek import examples  # noqa: PLC0415 - imports Arrow

    some = examples(job, _LOOKED_AT, unread="not looked at")
    found = next((e for e in some if e.answer), None)
    answer = None if found is None else {"row": found.row, "text": found.answer}
    failure = None
    for kind, count in [*rows["failed_by_reason"].items()][:1]:
        with job.journal() as journal:
            result = journal.first_failure(kind)
        if result is not None:
            example = {"row": result.row, "error": result.error}
            failure = {"kind": kind, "rows": count, **example}
    return {"answer": answer, "failure": failure}


def as_lines(found: Mapping[str, Any]) -> list[str]:
    """What `of_answers` found, a line each."""
    lines, (answer, failure) = [], (found["answer"], found["failure"])
    if answer is not None:
        lines.append(f"answer: row {answer['row']:,}: {_short(answer['text'])}")
    if failure is not None:
        often = f"{counted(failure['rows'], 'row')}: {failure['kind']}"
        lines.append(f"failed: {often}, such as row {failure['row']:,}: {_short(failure['error'])}")
    return lines


def _short(text: str | None) -> str:
    """The beginning of a text, on one line."""
    line = " ".join((text or "")[: 4 * _SHOWN].split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
