"""States: what a job's files say of it at any moment, and that a list need not open journals."""

import shutil

import pytest

from batchrun.jobs import folder as folders
from batchrun.jobs.errors import JournalError, LeaseHeld
from batchrun.jobs.folder import JobFolder, list_jobs
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result
from batchrun.jobs.lease import Lease


def end(job, state, reason=None, hint=None):
    with Lease(job.path):
        with job.journal(readonly=False) as journal:
            journal.begin_run()
            journal.end_run(state, {}, reason)
        job.set_state(state, reason, hint)


def test_a_worker_waits_runs_and_ends(job):
    assert job.state() == "new"
    with Lease(job.path):
        assert job.state() == "running"
        for state in ("queued", "running"):
            job.set_state(state)
            assert job.state() == state
        with job.journal(readonly=False) as journal:
            journal.begin_run()
            assert job.state() == "running"
        job.set_state("queued")
    assert job.state() == "interrupted"  # its worker died, whatever it noted last
    end(job, "cancelled")
    assert job.state() == "cancelled"


def test_a_worker_that_died_in_the_queue_leaves_a_new_job(job):
    with Lease(job.path):
        job.set_state("queued")
    assert job.state() == "new"


def test_a_failure_says_why(job):
    assert job.failure() is None
    end(job, "failed", "the disk is full", "make room")
    assert job.state() == "failed"
    assert job.failure() == ("the disk is full", "make room")
    (job.path / "state.json").unlink()
    assert (job.state(), job.failure()) == ("failed", ("the disk is full", None))
    end(job, "interrupted")
    assert job.failure() is None


def test_a_failure_before_the_run_began_is_a_failure_too(job):
    with Lease(job.path):
        job.set_state("failed", "the model changed", "put it back")
    assert (job.state(), job.failure()) == ("failed", ("the model changed", "put it back"))


def test_what_is_noted_is_never_out_of_date(job):
    """A note of a finished job must not hide that a later run was killed, or failures retried."""
    with Lease(job.path), job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.set_meta("rows_total", 2)
        journal.write([Result(0, 0, "ok"), Result(1, 0, "error", error="no", error_kind="x")])
        journal.end_run("done-with-errors", {})
        journal.close()
        job.set_state("done-with-errors")
    snapshot = job.snapshot()
    assert (snapshot.state, snapshot.total, snapshot.done, snapshot.failed) == (
        "done-with-errors",
        2,
        2,
        1,
    )
    assert job.retry_failed() == 1
    snapshot = job.snapshot()
    assert (snapshot.state, snapshot.total, snapshot.done, snapshot.failed) == (
        "interrupted",
        2,
        1,
        0,
    )
    end(job, "done")
    with Lease(job.path), job.journal(readonly=False) as journal:
        journal.begin_run()
    assert job.state() == job.snapshot().state == "interrupted"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"state": "done"}'])
def test_a_torn_note_is_no_note(job, content):
    end(job, "cancelled")
    (job.path / "state.json").write_text(content)
    assert job.state() == job.snapshot().state == "cancelled"


def test_a_wish_to_cancel_lasts_until_the_next_worker(job):
    assert not job.cancel_requested()
    with Lease(job.path):
        job.request_cancel()
        assert job.cancel_requested()
    with Lease(job.path):
        assert not job.cancel_requested()


def test_removing_a_job_leaves_nothing_but_its_output(job, prompts):
    with Lease(job.path), pytest.raises(LeaseHeld):
        job.remove()
    assert job.state() == "new"
    job.remove()
    assert list(job.path.parent.iterdir()) == []
    assert prompts.exists()


def test_jobs_that_have_ended_are_listed_without_a_journal_being_opened(job, home, monkeypatch):
    end(job, "done")
    for number in range(20):
        shutil.copytree(job.path, job.path.with_name(f"copy-{number}"))

    def refuse(*_, **__):
        raise AssertionError("a journal was opened")

    monkeypatch.setattr(folders, "Journal", refuse)
    snapshots = [job.snapshot() for job in list_jobs(home)]
    assert len(snapshots) == 21
    assert {(b.state, b.model, b.done) for b in snapshots} == {("done", "tiny", 0)}


def test_a_damaged_job_s_state_is_still_noted(job):
    """A worker that fails over a damaged journal must be able to say so."""
    (job.path / "journal.db").write_bytes(b"not a database" * 1000)
    with Lease(job.path):
        job.set_state("failed", "the journal is damaged")
    assert job.failure() == ("the journal is damaged", None)
    assert JobFolder(job.path).snapshot().done is None
    with pytest.raises(JournalError):
        Journal(job.path, 1)
