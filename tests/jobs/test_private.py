"""What is kept for a job is its user's alone, and an output is as open as its user wants it."""

import os
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.jobs.files import (
    atomic_write,
    close_to_others,
    make_folders,
    open_private,
    write_json,
)
from batchrun.jobs.folder import create
from batchrun.jobs.inflight import InFlightRows
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result
from batchrun.jobs.lease import Lease
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.output.destination import one_at_a_time
from batchrun.jobs.queue import DeviceQueue
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.sweep import sweep

ROOT = Path(__file__).parents[2]
MARK = "Pr1vate-M4rker"
USER, GROUP = 4321, 5432  # somebody else's


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def openness(root):
    """By relative path, the modes of all that lies beneath a folder."""
    return {str(path.relative_to(root)): mode(path) for path in root.rglob("*")}


@pytest.fixture
def umask_of():
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.fixture
def spec(tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text(f'{{"prompt": "{MARK}"}}\n')
    output = OutputSpec(str(tmp_path / "out.jsonl"), "jsonl")
    inputs = (InputFile.of(source),)
    return JobSpec(inputs, "jsonl", PromptSpec(), ModelSpec("m"), SamplingSpec(), output=output)


def used(home, spec):
    """A job with one of every file that this package makes in it, some of them open."""
    job = create(home, spec)
    job.request_cancel()
    job.note_destination(home / "elsewhere")
    InFlightRows(job.path).close()
    return job


def test_all_that_is_kept_is_private_while_it_is_in_use(tmp_path, spec, umask_of):
    umask_of(0)
    home = tmp_path / "new" / "home"
    with one_at_a_time(home):
        job = used(home, spec)
    with Lease(job.path), DeviceQueue(home, "cpu"), job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.write([Result(0, 0, "ok", text=MARK)])
        found = openness(tmp_path / "new")
    assert {"journal.db", "journal.db-wal", "journal.db-shm"} <= {Path(p).name for p in found}
    assert {"home/jobs/.submitting", "home/queue/cpu/1", f"home/jobs/{job.id}/lock"} <= found.keys()
    folders = {path for path in found if (tmp_path / "new" / path).is_dir()}
    assert {
        path: m for path, m in found.items() if m != (0o700 if path in folders else 0o600)
    } == {}


def test_a_file_is_private_from_its_first_moment(tmp_path, umask_of):
    umask_of(0)
    os.close(open_private(tmp_path / "made", os.O_RDWR))
    with atomic_write(tmp_path / "out"), atomic_write(tmp_path / "kept", private=True):
        assert set(openness(tmp_path).values()) == {0o600}
    assert openness(tmp_path) == {"made": 0o600, "out": 0o666, "kept": 0o600}


def test_a_home_shared_by_setgid_stays_its_groups_and_nobody_elses(tmp_path, spec, umask_of):
    umask_of(0o002)
    home = tmp_path / "team"
    home.mkdir()
    home.chmod(0o2775)
    with one_at_a_time(home):
        job = used(home, spec)
    with Lease(job.path), DeviceQueue(home, "cpu"):
        found = openness(home)
    shared = {path: 0o2770 if (home / path).is_dir() else 0o660 for path in found}
    assert found == shared


def test_jobs_of_before_are_closed_and_the_home_itself_is_left_as_it_is(tmp_path):
    home = tmp_path / "home"
    (home / "jobs").mkdir(parents=True)
    home.chmod(0o755)
    (home / "jobs").chmod(0o755)
    with one_at_a_time(home):
        pass
    assert (mode(home), mode(home / "jobs")) == (0o755, 0o700)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    close_to_others(shared)
    assert mode(shared) == 0o2775


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0])
def test_a_new_output_follows_the_umask(tmp_path, umask_of, umask):
    umask_of(umask)
    with atomic_write(tmp_path / "out"):
        pass
    assert mode(tmp_path / "out") == 0o666 & ~umask


@pytest.mark.parametrize("before", [0o600, 0o640, 0o664, 0o400, 0o4755])
def test_what_replaces_an_output_is_as_open(tmp_path, before):
    path = tmp_path / "out"
    path.write_text("old")
    path.chmod(before)
    with atomic_write(path) as file:
        [temporary] = tmp_path.glob(".out.*")
        assert mode(temporary) == 0o600
        file.write(b"new")
    assert path.read_text() == "new"
    assert mode(path) == before & 0o777


def test_what_replaces_a_link_is_as_open_as_what_it_led_to(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    with atomic_write(link) as file:
        file.write(b"new")
    assert (real.read_text(), link.read_text(), mode(link)) == ("old", "new", 0o600)
    assert not link.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_owner_and_group_are_kept_by_who_can(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    path.chmod(0o640)
    os.chown(path, USER, GROUP)
    with atomic_write(path) as file:
        file.write(b"new")
    found = path.stat()
    assert (found.st_uid, found.st_gid, mode(path)) == (USER, GROUP, 0o640)


REPLACE = f"""
import os, sys
from dataclasses import replace
from pathlib import Path
from batchrun.jobs.files import atomic_write
os.setgroups([]); os.setgid({USER}); os.setuid({USER})
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"new")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
@pytest.mark.parametrize(("before", "after"), [(0o660, 0o600), (0o664, 0o644), (0o640, 0o600)])
def test_of_a_group_that_cant_be_kept_another_one_gets_nothing(before, after):
    with tempfile.TemporaryDirectory() as folder:  # pytest's can't be entered by others
        path = Path(folder, "out")
        path.write_text("old")
        path.chmod(before)
        os.chown(path, USER, GROUP)
        os.chown(folder, USER, USER)
        subprocess.run([sys.executable, "-c", REPLACE, str(path)], cwd=ROOT, check=True)
        found = (path.read_text(), path.stat().st_gid, mode(path))
    assert found == ("new", USER, after)


def test_attributes_are_kept(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    try:
        os.setxattr(path, "user.origin", b"here")
    except OSError:
        pytest.skip("a file system without attributes")
    with atomic_write(path):
        pass
    assert os.getxattr(path, "user.origin") == b"here"


def test_a_name_of_broken_unicode_is_kept_as_it_is(tmp_path, spec):
    name = os.fsdecode(b"\xff\x1b.jsonl")
    path = tmp_path / "a.json"
    write_json(path, {"path": name})
    job = create(tmp_path / "home", spec)
    places = {str(tmp_path / "out.jsonl"): str(tmp_path / name)}
    write_json(job.path / "places.json", places)
    assert job.spec().output.path == str(tmp_path / name)
    folder = tmp_path / name
    folder.mkdir()
    Journal.create(folder)
    with Journal(folder, 1) as journal:
        journal.begin_run()
        journal.write([Result(0, 0, "error", error=f"{name} is broken")])
        journal.end_run("failed", {}, f"{name} is broken")
        assert [r.error for r in journal.results()] == ["\\udcff\x1b.jsonl is broken"]


def bytes_beneath(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_rm_takes_what_killed_writers_left_beside_every_destination(tmp_path, spec):
    job = create(tmp_path / "home", spec)
    destinations = [tmp_path / "out.jsonl", tmp_path / "moved.jsonl", tmp_path / "copy.csv"]
    job.note_destination(destinations[2])
    write_json(job.path / "places.json", {str(destinations[0]): str(destinations[1])})
    left = [path.with_name(f".{path.name}.abcdefgh.tmp") for path in destinations]
    for path in (*left, *destinations):
        path.write_text(MARK)
    with job.journal() as reader:
        job.remove()
        assert reader.counts().rows == 0  # who looks is not disturbed
    assert [path.exists() for path in left] == [False] * 3
    assert [path.exists() for path in destinations] == [True] * 3  # whole ones stay
    assert MARK.encode() not in bytes_beneath(tmp_path / "home")


KILLED = """
import os, shutil, signal, sys
from dataclasses import replace
from pathlib import Path
from jobs import folder
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import JobSpec
home, job, moment = Path(sys.argv[1]), folder.JobFolder(Path(sys.argv[2])), sys.argv[3]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "removing":
    shutil.rmtree = die
    job.remove()
else:
    folder._rename_to_new_id = die
    folder.create(home, job.spec())
"""


@pytest.mark.parametrize("moment", ["removing", "making"])
def test_what_a_killed_process_left_half_done_is_swept_away(tmp_path, spec, moment):
    home = tmp_path / "home"
    spec = replace(spec, prompt=PromptSpec(template=MARK))
    job = create(home, spec)
    command = [sys.executable, "-c", KILLED, str(home), str(job.path), moment]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    if moment == "making":
        job.remove()
    assert MARK.encode() in bytes_beneath(home)
    sweep(home)
    assert MARK.encode() not in bytes_beneath(home)


def test_retrying_failed_rows_leaves_nothing_of_their_errors(tmp_path):
    Journal.create(tmp_path)
    with Journal(tmp_path, 1) as journal:
        journal.begin_run()
        long = f"{MARK} " * 2000  # more than a page
        for row in range(8):
            journal.write([Result(row, 0, "error", error=long), Result(row + 8, 0, "ok", text="x")])
    assert MARK.encode() in bytes_beneath(tmp_path)
    with Journal(tmp_path, 1) as journal:
        journal._db.execute("PRAGMA secure_delete=OFF")  # some builds of SQLite begin with ON
        assert journal.retry_failed() == 8
    assert MARK.encode() not in bytes_beneath(tmp_path)


def test_folders_above_a_home_are_private_too_where_they_are_made(tmp_path, umask_of):
    umask_of(0)
    make_folders(tmp_path / "a" / "b")
    assert openness(tmp_path) == {"a": 0o700, "a/b": 0o700}
