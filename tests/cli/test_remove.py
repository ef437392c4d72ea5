"""`rm` and `prune`: what is removed, what is asked first, and what never goes."""

import json
import os
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner

from batchrun.cli import cli, remove
from batchrun.jobs.folder import create, list_jobs
from batchrun.jobs.journal.results import Result
from batchrun.jobs.lease import Lease
from batchrun.jobs.options import OutputSpec
from tests.cli.test_listing import ended
from tests.jobs.conftest import home, prompts, spec  # noqa: F401 - fixtures

DAY = 86400


@pytest.fixture
def run(home, monkeypatch):  # noqa: F811
    monkeypatch.setenv("BATCHRUN_HOME", str(home))

    def call(*arguments, answer=None):
        return CliRunner().invoke(cli, arguments, input=answer)

    return call


@pytest.fixture
def make(home, spec):  # noqa: F811
    def made(state, *, rows=3, age=0.0, **changes):
        job = create(home, replace(spec, seed=len(list_jobs(home)), **changes))
        if state != "new":
            ended(job, state, rows=rows)
        if age and (job.path / "state.json").exists():
            state_file = job.path / "state.json"
            noted = replace(job.snapshot(), ended=time.time() - age)
            noted.save(job.path)
            os.utime(state_file)
        return job

    return made


def left(home):  # noqa: F811
    return {job.id for job in list_jobs(home)}


def test_a_job_whose_output_was_written_goes_without_a_word(run, make, home):  # noqa: F811
    done, new = make("done"), make("new")
    assert run("rm", done.id, new.id).output == f"removed {done.id}\nremoved {new.id}\n"
    assert left(home) == set()


def test_results_that_no_output_has_are_asked_for(run, make, home):  # noqa: F811
    job = make("interrupted", rows=2)
    refused = run("rm", job.id)
    assert refused.exit_code == 1
    assert str(refused.exception) == (
        f"{job.id} is interrupted with 2 of 3 rows done, not exported"
    )
    assert "--yes" in refused.exception.hint
    assert left(home) == {job.id}
    assert json.loads(run("rm", job.id, "--yes", "--json").output) == {"removed": [job.id]}
    assert left(home) == set()


def test_in_a_terminal_a_question_is_asked(make, home, monkeypatch):  # noqa: F811
    monkeypatch.setenv("BATCHRUN_HOME", str(home))
    job = make("failed", rows=1)

    class Tty(CliRunner):
        def isolation(self, *arguments, **options):
            outer = super().isolation(*arguments, **options)

            class Inside:
                def __enter__(self):
                    found = outer.__enter__()
                    remove.sys.stdin.isatty = lambda: True
                    remove.sys.stderr.isatty = lambda: True
                    return found

                def __exit__(self, *error):
                    return outer.__exit__(*error)

            return Inside()

    said = Tty().invoke(cli, ["rm", job.id], input="n\n")
    assert "remove these results?" in said.output
    assert "nothing was removed" in said.output
    assert left(home) == {job.id}
    assert Tty().invoke(cli, ["rm", job.id], input="y\n").exit_code == 0
    assert left(home) == set()


def test_a_running_job_stays_and_the_way_to_stop_it_is_named(run, make, home):  # noqa: F811
    job, other = make("interrupted", rows=2), make("done")
    with Lease(job.path):
        refused = run("rm", other.id, job.id, "--yes")
    assert f"batchrun cancel {job.id}" in refused.exception.hint
    assert left(home) == {job.id, other.id}


def test_prune_takes_old_jobs_that_are_done(run, make, home):  # noqa: F811
    old, young = make("done", age=40 * DAY), make("done", age=2 * DAY)
    bad, new = make("failed", rows=1, age=40 * DAY), make("new")
    shown = run("prune", "--older-than", "30d", "--dry-run")
    assert shown.output.splitlines()[0].startswith(f"{old.id}  done  ")
    assert "would remove 1 job, " in shown.output
    refused = run("prune", "--older-than", "30d")
    assert (refused.exit_code, "--yes" in refused.exception.hint) == (1, True)
    assert left(home) == {old.id, young.id, bad.id, new.id}
    told = json.loads(run("prune", "--older-than", "30d", "--yes", "--json").output)
    assert [row["job"] for row in told["jobs"]] == [old.id]
    assert told["bytes"] == sum(row["bytes"] for row in told["jobs"]) > 0
    assert left(home) == {young.id, bad.id, new.id}
    run("prune", "--older-than", "30d", "--unexported", "--yes")
    assert left(home) == {young.id, new.id}


def test_prune_keeps_the_newest_and_chooses_states(run, make, home):  # noqa: F811
    jobs = [make("done", age=n * DAY) for n in (5, 4, 3)]
    for number, job in enumerate(jobs):
        os.utime(job.path / "job.json", (1000 + number, 1000 + number))
    assert run("prune").exit_code == 2
    assert run("prune", "--older-than", "soon").exit_code == 2
    run("prune", "--keep", "0", "--state", "failed", "--yes")
    assert len(left(home)) == 3
    run("prune", "--keep", "2", "--yes")
    assert left(home) == {jobs[1].id, jobs[2].id}


def test_a_job_that_was_killed_is_as_old_as_what_it_wrote(run, make, home):  # noqa: F811
    """Not as its submission, which may be weeks ago when a run is killed."""
    job = make("new")
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.write([Result(0, 0, "ok", "x")])
    long_ago = time.time() - 40 * DAY
    os.utime(job.path / "job.json", (long_ago, long_ago))
    shown = run("prune", "--older-than", "30d", "--unexported", "--yes")
    assert "removed 0 jobs" in shown.output
    for path in job.path.iterdir():
        os.utime(path, (long_ago, long_ago))
    shown = run("prune", "--older-than", "30d", "--unexported", "--yes")
    assert "removed 1 job, " in shown.output


def test_a_job_that_is_taken_meanwhile_stays(run, make, home, monkeypatch):  # noqa: F811
    job = make("done", age=40 * DAY)
    chosen = remove._old

    def then_taken(*arguments, **options):
        found = chosen(*arguments, **options)
        lease.__enter__()
        return found

    lease = Lease(job.path)
    monkeypatch.setattr(remove, "_old", then_taken)
    told = run("prune", "--older-than", "30d", "--yes")
    lease.__exit__()
    assert "removed 0 jobs" in told.output
    assert f"{job.id} is not removed: " in told.output
    assert left(home) == {job.id}


def test_an_output_in_the_jobs_folder_goes_with_it_only_if_that_is_wanted(run, make, home):  # noqa: F811
    """Such as that of rows from Python."""
    inside = OutputSpec(path="stdout.jsonl", format="jsonl", stdout=True)
    job = make("done", output=inside, age=40 * DAY)
    refused = run("rm", job.id)
    assert str(refused.exception) == f"{job.id} is done, and its only output is in its folder"
    assert "removed 0 jobs" in run("prune", "--older-than", "30d", "--yes").output
    assert left(home) == {job.id}
    assert "removed 1 job" in run("prune", "--older-than", "30d", "--unexported", "--yes").output


def test_a_folder_that_is_elsewhere_stays_and_is_named(run, make, home, tmp_path):  # noqa: F811
    job, other = make("done", age=40 * DAY), make("done", age=50 * DAY)
    there = tmp_path / "there"
    job.path.rename(there)
    job.path.symlink_to(there)
    refused = run("rm", job.id)
    assert str(there) in str(refused.exception)
    assert refused.exception.hint == (
        f"batchrun rm {there} removes the job, rm {job.path} the link"
    )
    told = run("prune", "--keep", "0", "--yes").output
    assert f"{job.id} is not removed: " in told
    assert "removed 1 job, " in told
    assert left(home) == {job.id}
    assert not other.path.exists()
    assert not list((home / "jobs").glob(".*.tmp"))
    assert run("rm", str(there)).exit_code == 0
    assert not there.exists()


def test_a_job_that_ran_while_the_question_was_asked_stays(run, make, home, monkeypatch):  # noqa: F811
    job = make("failed", rows=0, age=40 * DAY)
    chosen = remove._old

    def then_resumed(*arguments, **options):
        found = chosen(*arguments, **options)
        ended(job, "interrupted", rows=2)
        return found

    monkeypatch.setattr(remove, "_old", then_resumed)
    told = run("prune", "--older-than", "30d", "--yes").output
    assert f"{job.id} is not removed: it was resumed in the meantime" in told
    assert left(home) == {job.id}
