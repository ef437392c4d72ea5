"""How a job went, in the lines that `submit` and `watch` end with."""

from __future__ import annotations

from dataclasses import replace

from batchrun.cli.outcome import as_lines, of_answers, of_rows
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.journal.results import Result
from batchrun.jobs.stats import summarise
from tests.cli.conftest import CommandLine

ROWS = {"total": 8, "done": 8, "failed": 0, "resumed": 0, "failed_by_reason": {}}


def error(row: int, kind: str = "null_prompt") -> Result:
    return Result(row, 0, "error", error=f"why\nrow {row}", error_kind=kind)


def job_of(batchrun: CommandLine, *runs: list[Result]) -> JobFolder:
    job = JobFolder(batchrun.unstarted(batchrun.write("in.jsonl", ["x"] * 10)))
    with job.journal(readonly=False) as journal:
        journal.set_meta("rows_total", 10)
        for results in runs:
            journal.begin_run()
            journal.write(results, {})
            journal.retry_failed() if results is not runs[-1] else None
            journal.end_run("done-with-errors", {})
    return job


def test_rows_that_are_retried_are_not_kept_whether_or_not_they_fail_again(
    batchrun: CommandLine,
) -> None:
    """Also where they never reach the engine, whose figures don't count them."""
    first = [Result(row, 0, "ok", "text", (1,), "stop", 1, 1) for row in range(6)]
    job = job_of(
        batchrun,
        [*first, *map(error, (6, 7, 8)), Result(9, 0, "skipped")],
        [error(6), error(7), Result(8, 0, "ok", "late", (1,), "stop", 1, 1)],
    )
    rows = summarise(job)["rows"]
    assert of_rows(job.spec(), rows, 2.0) == (
        "10 of 10 rows in 2.0 s, 7 of them kept from earlier runs, 1 skipped without a prompt, "
        "2 failed (the column `error` says why)"
    )


def test_a_job_that_ended_early_names_no_column_and_no_command_that_fails_again(
    batchrun: CommandLine,
) -> None:
    job = job_of(batchrun, [error(row) for row in range(5)])
    job.set_state("failed", "they all fail", f"fix it, or: batchrun resume {job.id} --keep-going")
    shown = batchrun("watch", job.id)
    assert shown.out.startswith("failed after 5 of 10 rows in ")
    assert "5 failed\n" in shown.out
    assert "next:" not in shown.out
    job.set_state("failed", "the disk is full", "make room")
    assert f"next:   batchrun resume {job.id}" in batchrun("watch", job.id).out


def test_samples_are_told_apart_from_rows(batchrun: CommandLine) -> None:
    spec = JobFolder(batchrun.unstarted(batchrun.write("in.jsonl", ["x"]))).spec()
    assert of_rows(spec, ROWS, 2.0) == "8 of 8 rows in 2.0 s"
    assert of_rows(replace(spec, n=8), ROWS, 2.0) == "8 of 8 rows, 8 samples of each, in 2.0 s"
    best = of_rows(replace(spec, n=8, keep=2), ROWS, 2.0)
    assert best == "8 of 8 rows, the best 2 of 8 samples of each, in 2.0 s"
    assert of_rows(spec, {**ROWS, "total": None, "done": 0}, 2.0) == "0 of ? rows in 2.0 s"


def test_an_answer_and_the_most_frequent_failure_are_shown(batchrun: CommandLine) -> None:
    answer = Result(2, 0, "ok", "An\n\nanswer  " + "of words " * 99, (1,), "stop", 1, 1)
    failed = [error(0, "prompt_too_long"), error(1), answer, error(4), error(3)]
    job = job_of(batchrun, failed)
    found = of_answers(job, summarise(job)["rows"])
    assert found["answer"] == {"row": 2, "text": answer.text}
    kind = {"kind": "null_prompt", "rows": 3, "row": 1, "error": "why\nrow 1"}
    assert found["failure"] == kind
    first, second = as_lines(found)
    assert first.startswith("answer: row 2: An answer of words of words")
    assert len(first) < 230
    assert second == "failed: 3 rows: null_prompt, such as row 1: why row 1"


def test_a_job_without_answers_shows_none(batchrun: CommandLine) -> None:
    job = JobFolder(batchrun.unstarted(batchrun.write("in.jsonl", ["x"])))
    assert as_lines(of_answers(job, summarise(job)["rows"])) == []
