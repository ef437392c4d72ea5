"""A job is a folder: made whole, found by name, movable, its state read from its files."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.jobs import files
from batchrun.jobs.errors import JobError, JobNotFound, OutputError, SpecChanged
from batchrun.jobs.folder import JobFolder, create, find, list_jobs
from batchrun.jobs.folder import home as jobs_home
from batchrun.jobs.identity import check_unchanged
from batchrun.jobs.journal.results import Result
from batchrun.jobs.lease import Lease
from batchrun.jobs.spec import InputFile

ROOT = Path(__file__).parents[2]


def ok(row):
    return Result(row, 0, "ok", text="x", prompt_tokens=2, completion_tokens=1)


def test_home_is_where_the_environment_says(tmp_path):
    assert jobs_home({"BATCHRUN_HOME": str(tmp_path)}) == tmp_path
    assert jobs_home({"BATCHRUN_HOME": ""}) == Path.home() / ".batchrun"
    assert jobs_home({}) == Path.home() / ".batchrun"
    assert jobs_home({"BATCHRUN_HOME": "relative"}).is_absolute()


def test_a_new_job_reads_back(home, spec):
    job = create(home, spec)
    assert job.spec() == spec
    assert job.id.startswith("prompts-2")
    assert job.state() == "new"
    assert job.snapshot().total is None
    assert job.counts().samples == 0
    assert [j.path for j in list_jobs(home)] == [job.path]
    assert [p for p in job.path.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["Öl & Preise (1).parquet", "....", "x" * 200 + ".jsonl"])
def test_any_input_name_makes_a_usable_id(home, spec, tmp_path, name):
    path = tmp_path / name
    path.write_text("x")
    job = create(home, replace(spec, inputs=(InputFile.of(path),)))
    assert job.id.replace("-", "").isascii()
    assert job.id.replace("-", "").isalnum()
    assert not job.id.startswith("-")
    assert len(job.id) < 64


def test_two_jobs_that_draw_one_id_are_two_jobs(home, spec, monkeypatch):
    drawn = iter(["same", "same", "same", "other"])
    monkeypatch.setattr("batchrun.jobs.folder.new_id", lambda _: next(drawn))
    first, second = create(home, spec), create(home, spec)
    assert (first.id, second.id) == ("same", "other")
    assert sorted(p.name for p in (home / "jobs").iterdir()) == ["other", "same"]
    assert stat.S_IMODE(second.path.stat().st_mode) == 0o700


def test_states_follow_the_files(job):
    with Lease(job.path), job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.set_meta("rows_total", 3)
        journal.write([ok(0)])
        assert job.state() == "running"
    assert job.state() == "interrupted"  # the worker was killed: it never ended its run
    for state in ("interrupted", "failed", "done-with-errors", "done"):
        with job.journal(readonly=False) as journal:
            journal.begin_run()
            journal.end_run(state, {})
        assert job.state() == state
    assert job.snapshot().total == 3
    assert job.counts().rows == 1


def test_a_moved_and_a_copied_job_are_the_same_job(job, tmp_path):
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.write([ok(0), ok(1)])
    copy = JobFolder(Path(shutil.copytree(job.path, tmp_path / "copy")))
    moved = JobFolder(job.path.rename(tmp_path / "moved"))
    for other in (copy, moved):
        assert other.spec().fingerprint() == copy.spec().fingerprint()
        check_unchanged(other)
        with other.journal(readonly=False) as journal:
            assert (1, 0) in journal.done()
            journal.begin_run()
            journal.write([ok(2)])
        assert other.counts().samples == 3


def test_find(home, spec, tmp_path, monkeypatch):
    with pytest.raises(JobNotFound, match="no jobs"):
        find(home)
    names = iter(["aaaa", "aabb", "cccc"])
    monkeypatch.setattr("batchrun.jobs.folder.new_id", lambda _: f"prompts-{next(names)}")
    jobs = [create(home, spec) for _ in range(3)]
    for number, job in enumerate(jobs):
        os.utime(job.path / "job.json", ns=(number, number))
    assert [j.id for j in list_jobs(home)] == [j.id for j in jobs]
    assert find(home).path == jobs[2].path
    assert find(home, "prompts-aaaa").path == jobs[0].path
    assert find(home, "prompts-c").path == jobs[2].path
    assert find(home, str(jobs[1].path)).path == jobs[1].path
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")  # where a folder that came with the data has a job's name
    shutil.copytree(jobs[0].path, "prompts-c")
    assert find(home, "prompts-c").path == jobs[2].path
    assert find(home, "./prompts-c").path == tmp_path / "data" / "prompts-c"
    with pytest.raises(JobNotFound, match=r"(?m)prompts-aaaa, prompts-aabb$"):
        find(home, "prompts-aa")
    with pytest.raises(JobNotFound, match="no job 'other'") as missing:
        find(home, "other")
    assert "prompts-cccc" in str(missing.value)


def test_a_models_code_does_not_run_for_a_job_that_others_could_have_written(home, spec):
    trusting = replace(spec, model=replace(spec.model, trust_remote_code=True))
    check_unchanged(create(home, trusting))
    with tempfile.TemporaryDirectory() as folder:
        wary, open_to_all = create(Path(folder), spec), create(Path(folder), trusting)
        for place in (folder, wary.path.parent):
            Path(place).chmod(0o755)
        for job in (wary, open_to_all):
            job.path.chmod(0o777)
        check_unchanged(wary)
        with pytest.raises(JobError, match="may be another user's: others can write"):
            check_unchanged(open_to_all)


def test_changed_input_is_refused_by_name(job, prompts):
    check_unchanged(job)
    prompts.write_bytes(prompts.read_bytes() + b"x")
    with pytest.raises(SpecChanged, match=r"prompts\.parquet"):
        check_unchanged(job)


def test_a_home_that_cannot_be_made_is_one_clear_error(spec, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="no job folder can be made") as refused:
        create(tmp_path / "file", spec)
    assert "BATCHRUN_HOME" in refused.value.hint


FULL = """
import resource, signal, sys
from pathlib import Path
from batchrun.jobs.errors import JobError
from batchrun.jobs.folder import create
from batchrun.jobs.spec import JobSpec
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
spec = JobSpec.load(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    create(Path(sys.argv[2]), spec)
except JobError as error:
    print(error.hint)
"""


@pytest.mark.parametrize("limit", [100, 5000])
def test_on_a_full_disk_there_is_no_half_a_job(job, tmp_path, limit):
    """100 bytes: not even job.json; 5,000: not the journal."""
    home = tmp_path / "full"
    command = [sys.executable, "-c", FULL, str(job.path), str(home), str(limit)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "BATCHRUN_HOME" in done.stdout
    assert list((home / "jobs").iterdir()) == []
    assert list_jobs(home) == []


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_a_folder_that_cannot_be_synced_leaves_no_job(home, spec, monkeypatch, call):
    """Nor a name that the next one would take for durable."""
    calls = []

    def failing(path):
        calls.append(path)
        if len(calls) == call:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync_directory", failing)
        with pytest.raises(OutputError, match="Input/output error"):
            create(home, spec)
    assert len(calls) == call
    assert list_jobs(home) == []
    assert [p for p in home.rglob("*") if p != home / "jobs"] == []
    assert create(home, spec).state() == "new"


def test_rubbish_among_the_jobs_is_no_job(home, job):
    (home / "jobs" / "notes.txt").write_text("x")
    (home / "jobs" / "empty").mkdir()
    (home / "jobs" / ".prompts-x.tmp").mkdir()
    assert [j.id for j in list_jobs(home)] == [job.id]


def test_a_damaged_job_does_not_hide_the_others(home, job, spec):
    broken = create(home, spec)
    (broken.path / "job.json").unlink()
    assert job.id in [j.id for j in list_jobs(home)]
