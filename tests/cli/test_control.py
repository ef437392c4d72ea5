"""`export`, `verify` and `cancel` as programs read them, and what they say of unfinished jobs."""

import json

import pytest
from click.testing import CliRunner

from batchrun.cli import cli
from tests.jobs.test_rejoin import ROWS, answered, job_of, written


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli, arguments)


@pytest.fixture
def job(tmp_path):
    return job_of(tmp_path, written(tmp_path / "in.jsonl", "jsonl", ROWS), kind="jsonl")


def test_an_export_of_an_unfinished_job_says_how_far_it_is(run, job):
    fresh = run("export", "-o", "o.jsonl")
    assert str(fresh.exception) == "the job is not finished: no rows are done"
    answered(job, without={(0, 0), (3, 0)})
    refused = run("export", "-o", "o.jsonl")
    assert str(refused.exception) == "the job is not finished: 4 of 6 rows are done"
    assert "batchrun resume" in refused.exception.hint
    assert "--partial" in refused.exception.hint
    partial = json.loads(run("export", "-o", "o.jsonl", "--partial", "--json").output)
    assert (partial["rows"], partial["changed_rows"]) == (4, None)


def test_export_as_json(run, job, tmp_path):
    answered(job)
    shown = run("export", "-o", "o.jsonl", "--json")
    assert json.loads(shown.output) == {
        "job": job.id,
        "output": str(tmp_path / "o.jsonl"),
        "rows": 6,
        "changed_rows": None,
    }
    assert run("export", "-o", "-", "--json").exit_code == 2


def test_verify_as_json(run, job, tmp_path):
    answered(job)
    shown = json.loads(run("verify", "--json").output)
    assert shown["job"] == job.id
    assert shown["recomputed"] is None
    assert shown["sound"] == (not shown["problems"])
    written(tmp_path / "in.jsonl", "jsonl", ROWS[::-1])
    changed = json.loads(run("verify", "--json").output)
    assert (changed["sound"], changed["rows"]) == (False, None)
    assert "in.jsonl" in "".join(changed["problems"])


def test_cancel_of_a_job_that_does_not_run_is_an_error_in_json_too(run, job):
    refused = run("cancel", "--json")
    assert "is not running" in str(refused.exception)
    assert refused.output == ""
