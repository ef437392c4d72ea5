"""`batchrun report`: where the page goes, who may read it, and what is refused."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import pytest
from click.testing import CliRunner

from batchrun import peek
from batchrun.cli import cli
from batchrun.jobs.identity import set_limits
from batchrun.jobs.options import SamplingSpec
from tests.report.pages import Page, answer, failure, run


@pytest.fixture
def report(job, home, tmp_path, monkeypatch):
    """The command, in a folder of its own, with one job that ran."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.setenv("BATCHRUN_HOME", str(home))
    monkeypatch.chdir(folder)
    run(job, [answer(0, "first"), failure(1, "no room"), answer(2)], "done-with-errors")

    def call(*arguments):
        return CliRunner().invoke(cli, ["report", *map(str, arguments)])

    call.folder = folder
    return call


def test_the_page_is_beside_the_user_and_private(report, job):
    shown = report()
    assert (shown.exit_code, shown.output) == (0, f"report: {job.id}-report.html\n")
    [path] = report.folder.iterdir()
    assert path.name == f"{job.id}-report.html"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "answer first" in Page(path.read_text()).text


def test_what_is_there_is_replaced_only_on_request(report, job):
    (report.folder / "x.html").write_text("mine")
    shown = report(job.id, "-o", "x.html")
    assert shown.exit_code != 0
    assert "x.html already exists" in str(shown.exception)
    assert "--overwrite" in shown.exception.hint
    assert (report.folder / "x.html").read_text() == "mine"
    (report.folder / "x.html").chmod(0o644)
    assert report("-o", "x.html", "--overwrite").exit_code == 0
    assert "first" in (report.folder / "x.html").read_text()
    assert stat.S_IMODE((report.folder / "x.html").stat().st_mode) == 0o600
    assert [path.name for path in report.folder.iterdir()] == ["x.html"]


def test_a_page_takes_no_place_of_a_jobs_own_files(report, job):
    for place in (job.path / "job.json", job.spec().inputs[0].path):
        shown = report("-o", place, "--overwrite")
        assert shown.exit_code != 0
        assert "choose another --output" in shown.exception.hint


def test_the_page_on_stdout(report):
    shown = report("-o", "-")
    assert shown.exit_code == 0
    assert "answer first" in Page(shown.stdout).text
    assert list(report.folder.iterdir()) == []


def test_json_is_what_the_page_is_made_from(report, job):
    told = json.loads(report("--json").stdout)
    assert told["summary"]["job"] == job.id
    assert told["failures"]["prompt_too_long"][0]["error"] == "no room"
    assert told["timeline"]["runs"][0]["at"]
    assert json.loads(report("--json", "--no-examples").stdout)["examples"] is None
    assert list(report.folder.iterdir()) == []


def test_prompts_and_answers_can_be_left_out(report):
    page = Page(report("--no-examples", "-o", "-").stdout)
    assert "first" not in page.text
    assert "no room" not in page.text


def test_parameters_are_told_where_they_are_not_as_usual(report, job, make_job, spec):
    runtime = replace(spec.runtime, drafts=False)
    make_job(sampling=SamplingSpec(temperature=0.0), runtime=runtime)
    found = json.loads(report("--json").stdout)["parameters"]
    assert (found["sampling"]["temperature"], found["runtime"]["drafts"]) == (0.0, False)
    assert not found["runtime"].keys() & {"overlap", "deterministic"}
    assert "chat" not in found["prompt"]


def test_the_command_for_the_end_of_a_job_is_left_out(report, job):
    set_limits(job.path, {"on_done": "curl https://hooks.example.com/secret"})
    assert json.loads(report("--json").stdout)["parameters"]["runtime"]["on_done"] == "..."
    assert "secret" not in report("-o", "-").stdout


def test_several_jobs_on_one_page(report, job, make_job):
    other = make_job(seed=2)
    run(other, [answer(0, "second")], "interrupted")
    shown = report(job.id, other.id)
    assert shown.output == f"report: {job.id}-{other.id}-report.html\n"
    page = Page((report.folder / f"{job.id}-{other.id}-report.html").read_text())
    assert f"{job.id} first {other.id} second" in page.text
    assert [
        each["summary"]["job"] for each in json.loads(report(job.id, other.id, "--json").stdout)
    ] == [
        job.id,
        other.id,
    ]


def test_jobs_are_compared_by_rows_that_all_of_them_may_have(report, job, make_job):
    run(other := make_job(seed=2), [answer(1, "second")], "interrupted")
    for names in ((job.id, other.id), (other.id, job.id)):
        shown = json.loads(report(*names, "--json").stdout)
        assert [[each["row"] for each in one["examples"]] for one in shown] == [[1], [1]]
    unstarted = make_job(seed=3)
    [one, other] = json.loads(report(job.id, unstarted.id, "--json").stdout)
    assert [each["row"] for each in one["examples"]] == [0, 2]
    assert other["examples"] == []


def test_more_jobs_than_a_page_can_tell_apart(report, job):
    shown = report(*[job.id] * 7)
    assert shown.exit_code == 2
    assert "7 jobs: a report compares at most 6" in shown.output


def test_an_input_that_crashes_its_reader_costs_the_prompts_alone(report, job, monkeypatch):
    """As damaged files do to libraries in C++."""

    def crash(paths, form, *, noted, **more):
        with noted(paths[0].path, 0):
            os.abort()

    monkeypatch.setattr(peek, "open_source", crash)
    page = Page(report("-o", "-").stdout)
    assert "prompt not shown: reading" in page.text
    assert "answer first" in page.text
