"""`batchrun peek`: rows beside their answers, for a terminal and as JSON."""

import json

import pytest
from click.testing import CliRunner

from batchrun.cli import cli
from batchrun.cli.peek import _text
from batchrun.jobs.journal.results import Result
from tests.jobs.test_rejoin import ROWS, answered, job_of, written
from tests.test_peek import computed, ok


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments):
        return CliRunner().invoke(cli, ["peek", *arguments])

    return call


@pytest.fixture
def job(tmp_path):
    found = job_of(tmp_path, written(tmp_path / "in.jsonl", "jsonl", ROWS), kind="jsonl")
    bad = Result(4, 0, "error", error="the prompt is too long", error_kind="prompt_too_long")
    return computed(found, [ok(0), ok(1), ok(2), ok(3), bad, ok(5)], ["prompt"])


def test_rows_can_be_read(run, job):
    lines = run("-n", "1").output.splitlines()
    assert lines == ["row 0  stop  3 + 1 tokens", "  prompt: prompt 0", "  answer: fine", ""]
    assert run().output.count("answer:") == 4  # and one that failed
    failed = run("--failed", job.id).output
    assert failed.startswith(
        "row 4  failed\n  prompt: prompt 4\n  error:  the prompt is too long\n"
    )


def test_rows_can_be_chosen(run, job):
    def rows(*arguments):
        return [row["row"] for row in json.loads(run("--json", *arguments).output)["rows"]]

    assert rows("--row", "3", "--row", "0-1,5") == [0, 1, 3, 5]
    drawn = json.loads(run("--json", "--random", "-n", "2").output)
    assert rows("--seed", str(drawn["seed"]), "-n", "2") == [r["row"] for r in drawn["rows"]]
    assert "none of these rows" in run("--row", "77").output
    for wrong in ("x", "-1", "3-1", "1-", ""):
        assert run("--row", wrong).exit_code == 2


def test_json_has_all_of_a_row(run, job):
    shown = json.loads(run("--json", "--row", "4").output)
    assert (shown["job"], shown["state"], shown["done"], shown["total"]) == (
        *(job.id, "interrupted", 6, 6),
    )
    assert shown["rows"] == [
        {
            "row": 4,
            "prompt": "prompt 4",
            "answer": None,
            "error": "the prompt is too long",
            "finish_reason": None,
            "sample": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "status": "error",
            "unread": None,
        }
    ]


def test_without_its_input_a_job_still_has_its_answers(run, job, tmp_path):
    (tmp_path / "in.jsonl").unlink()
    shown = run("-n", "2")
    assert shown.output.count("answer: fine") == 2
    assert "prompt:" not in shown.output
    assert "some prompts are not shown: " in shown.output
    assert "in.jsonl" in shown.output


def test_long_text_is_cut_and_controls_are_shown_as_text():
    lines = list(_text("answer", "\x1b[2J" + "word " * 500, 40, full=False))
    assert len(lines) == 7
    assert max(map(len, lines[:-1])) <= 40
    assert lines[0].startswith(r"  answer: \x1b[2J word") or lines[0].startswith(
        r"  answer: \x1b[2Jword"
    )
    assert lines[-1].strip().endswith("more characters: --full")
    whole = list(_text("answer", "word " * 500, 40, full=True))
    assert sum(line.count("word") for line in whole) == 500
    assert list(_text("answer", "", 40, full=False)) == ["  answer:"]


def test_a_job_that_has_not_begun(run, tmp_path):
    job_of(tmp_path, written(tmp_path / "in.jsonl", "jsonl", ROWS), kind="jsonl")
    assert "no row is finished yet" in run().output


def test_samples_have_numbers(run, tmp_path):
    source = written(tmp_path / "in.jsonl", "jsonl", ROWS[:1])
    answered(job_of(tmp_path, source, kind="jsonl", n=2))
    assert [line for line in run().output.splitlines() if line.startswith("row")] == [
        "row 0  stop  1 + 1 tokens",
        "row 0, sample 1  stop  1 + 1 tokens",
    ]
