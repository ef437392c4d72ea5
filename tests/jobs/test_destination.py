"""A destination is one live job's, and only what that job may replace is replaced."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.jobs.errors import Fenced, LeaseHeld, OutputError, OutputTaken
from batchrun.jobs.files import atomic_write
from batchrun.jobs.folder import JobFolder, create
from batchrun.jobs.identity import move
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.lease import Lease
from batchrun.jobs.output.destination import (
    Claim,
    check_apart,
    check_place,
    exporting,
    is_same,
    one_at_a_time,
    resuming,
)
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.spec import InputFile

ROOT = Path(__file__).parents[2]


def end(job, state):
    with Lease(job.path), job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.end_run(state, {})
        journal.close()
        job.set_state(state)


@pytest.fixture
def out(spec):
    return Path(spec.output.path)


@pytest.fixture
def other(tmp_path):
    """An input of a job that is to be submitted."""
    path = tmp_path / "other.parquet"
    path.write_bytes(b"x")
    return path


class TestOneLiveJob:
    def test_a_new_job_has_its_destination(self, home, job, out, other):
        with pytest.raises(OutputTaken) as refused:
            check_apart(home, out, [other])
        assert str(refused.value) == (
            f"{out} is where the job {job.id}, which is new, writes its output"
        )
        assert f"batchrun rm {job.id}" in refused.value.hint
        check_apart(home, out.with_name("another.parquet"), [other])

    @pytest.mark.parametrize("state", ["queued", "running"])
    def test_a_job_with_a_worker_has_it(self, home, job, out, other, state):
        with Lease(job.path):
            job.set_state(state)
            with pytest.raises(
                OutputTaken, match=f"(?m)which is {state}, writes its output$"
            ) as refused:
                check_apart(home, out, [other])
        assert f"batchrun cancel {job.id}" in refused.value.hint
        assert f"batchrun watch {job.id}" in refused.value.hint

    @pytest.mark.parametrize(
        "state", ["interrupted", "failed", "cancelled", "done", "done-with-errors"]
    )
    def test_a_job_that_rests_has_not(self, home, job, out, other, state):
        end(job, state)
        check_apart(home, out, [other])

    def test_a_worker_that_was_killed_has_not(self, home, job, out, other):
        with Lease(job.path), job.journal(readonly=False) as journal:
            journal.begin_run()
            job.set_state("running")
        assert job.state() == "interrupted"
        check_apart(home, out, [other])

    def test_a_damaged_one_has_not_and_hides_no_other(self, home, job, spec, out, other):
        damaged = create(home, spec)
        (damaged.path / "job.json").write_text("{")
        (damaged.path / "journal.db").write_text("{")
        os.utime(damaged.path / "job.json", (0, 0))  # it comes first
        with pytest.raises(OutputTaken, match=job.id):
            check_apart(home, out, [other])
        job.remove()
        check_apart(home, out, [other])

    def test_what_a_live_job_reads_is_no_destination(self, home, job, prompts, other):
        link = prompts.with_name("link.parquet")
        link.symlink_to(prompts)
        for place in (prompts, link):
            with pytest.raises(OutputTaken, match=f"is what the job {job.id}, which is new, reads"):
                check_apart(home, place, [other])

    def test_what_a_live_job_replaces_is_no_input(self, home, job, out, tmp_path, other):
        out.write_text("of an earlier job, to be replaced")
        with pytest.raises(OutputTaken, match=f"the input {out} is what the job {job.id},") as no:
            check_apart(home, tmp_path / "new.jsonl", [other, out])
        assert str(no.value).endswith("which is new, replaces")
        assert "--output" not in no.value.hint

    def test_a_job_is_not_in_its_own_way_but_in_its_copy_s(self, home, job, out, prompts, tmp_path):
        check_apart(home, out, [prompts], job)
        copy = JobFolder(Path(shutil.copytree(job.path, tmp_path / job.id)))
        with pytest.raises(OutputTaken):
            check_apart(home, out, [prompts], copy)

    def test_one_that_has_another_destination_by_now_is_asked_for_that(
        self, home, job, out, other, tmp_path
    ):
        with resuming(home, job, tmp_path / "b.jsonl"):
            pass
        check_apart(home, out, [other])
        with pytest.raises(OutputTaken, match=job.id):
            check_apart(home, tmp_path / "b.jsonl", [other])


def spellings(folder):
    """Paths of one file that is not there, and of one that is."""
    (folder / "real" / "deep").mkdir(parents=True)
    (folder / "linked").symlink_to("real")
    (folder / "there").write_text("x")
    (folder / "link").symlink_to("there")
    (folder / "dangling").symlink_to("real/out")
    os.link(folder / "there", folder / "hard")
    absent = [
        *("real/out", "real/./out", "real/deep/../out", "linked/out", "linked/../linked/out"),
        "dangling",
    ]
    return [absent, ["there", "link", "hard", "real/../link", "linked/../there"]]


def test_paths_of_one_file_are_known_however_they_are_spelled(tmp_path, monkeypatch):
    for group in spellings(tmp_path):
        for one in group:
            for another in group:
                assert is_same(tmp_path / one, tmp_path / another), (one, another)
                monkeypatch.chdir(tmp_path / "real")
                assert is_same(Path("..") / one, tmp_path / another), (one, another)
    different = ("real/out", "real/deep/out", "out", "there")
    pairs = [(a, b) for a in different for b in different if a < b]
    assert not [pair for pair in pairs if is_same(*(tmp_path / name for name in pair))]


def test_a_folder_that_is_mounted_twice_is_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    mount = ["mount", "--bind", str(tmp_path / "a"), str(tmp_path / "b")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a folder can't be mounted here")
    try:
        assert is_same(tmp_path / "a" / "out", tmp_path / "b" / "out")
        assert not is_same(tmp_path / "a" / "out", tmp_path / "b" / "out2")
    finally:
        subprocess.run(["umount", str(tmp_path / "b")], check=True)


class TestPlace:
    def test_an_input_by_another_name(self, home, tmp_path, prompts):
        link = tmp_path / "link.parquet"
        link.symlink_to(prompts)
        hard = tmp_path / "hard.parquet"
        os.link(prompts, hard)
        for path in (prompts, link, hard, tmp_path / "x" / ".." / prompts.name):
            with pytest.raises(OutputError, match="is an input of this job"):
                check_place(home, path, [prompts])
        check_place(home, tmp_path / "x.parquet", [prompts])

    def test_files_of_batchrun_s_own(self, home, job, prompts, tmp_path):
        (tmp_path / "way").symlink_to(job.path)
        moved = shutil.copytree(job.path, tmp_path / "moved")
        for path in (
            job.path / "log.jsonl",
            tmp_path / "way" / "log.jsonl",
            home / "jobs" / "out.jsonl",
            home / "models" / "out.jsonl",
            moved / "deep" / "out.jsonl",
        ):
            with pytest.raises(OutputError, match="among batchrun's own files"):
                check_place(home, path, [prompts])
        check_place(home, home / "out.jsonl", [prompts])  # a home may be the project's folder
        check_place(home, tmp_path / "jobs" / "out.jsonl", [prompts])


HOLD = """
import sys
from pathlib import Path
from batchrun.jobs.output.destination import one_at_a_time
with one_at_a_time(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_ends_with_its_process(home):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "held\n"
        with (home / "jobs" / ".submitting").open() as file:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            process.send_signal(signal.SIGKILL)
            process.wait()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with one_at_a_time(home):
        pass


def test_a_home_that_cannot_be_locked_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"\.submitting can't be written") as refused:
        one_at_a_time(tmp_path / "file").__enter__()
    assert "BATCHRUN_HOME" in refused.value.hint


def write(journal, path, text, *, overwrite=False):
    claim = Claim(journal, path, overwrite=overwrite)
    with atomic_write(path, may_replace=claim) as file:
        file.write(text)


class TestClaim:
    @pytest.fixture
    def journal(self, job):
        with job.journal(readonly=False) as journal:
            journal.begin_run()
            yield journal

    def test_nothing_there_then_its_own(self, journal, out):
        for text in (b"one", b"two", b"three"):
            write(journal, out, text)
            assert out.read_bytes() == text
        assert [p.name for p in out.parent.glob(f".{out.name}*")] == []

    def test_a_stranger_s_file_stays(self, journal, out):
        out.write_text("a stranger's")
        with pytest.raises(FileExistsError):
            write(journal, out, b"mine")
        assert out.read_text() == "a stranger's"
        out.unlink()
        write(journal, out, b"mine")
        assert out.read_bytes() == b"mine"

    @pytest.mark.parametrize("how", ["edited", "replaced", "touched"])
    def test_its_own_that_someone_changed_stays(self, journal, out, how):
        write(journal, out, b"mine")
        was = out.stat()
        if how == "replaced":
            out.unlink()
            (out.parent / "keeps the inode").write_text("")
        out.write_bytes(b"mine" if how == "touched" else b"ours")
        os.utime(out, ns=(was.st_atime_ns, was.st_mtime_ns + (how != "replaced")))
        if how == "replaced" and out.stat().st_ino == was.st_ino:
            pytest.skip("this file system gives an inode's number again at once")
        with pytest.raises(FileExistsError):
            write(journal, out, b"next")
        assert out.read_bytes() in (b"mine", b"ours")

    def test_whatever_is_there_is_replaced_once_if_told_so(self, journal, out):
        out.write_text("old")
        write(journal, out, b"mine", overwrite=True)
        assert out.read_bytes() == b"mine"
        out.write_text("of a later job")
        with pytest.raises(FileExistsError):
            write(journal, out, b"again", overwrite=True)
        assert out.read_text() == "of a later job"

    def test_a_file_that_takes_the_place_at_the_last_moment_stays(self, journal, out, monkeypatch):
        """While the journal is told, that is synced."""
        write(journal, out, b"mine")
        real = Journal.set_meta

        def late(self, key, value):
            real(self, key, value)
            out.unlink()
            out.write_text("late")

        monkeypatch.setattr(Journal, "set_meta", late)
        with pytest.raises(FileExistsError):
            write(journal, out, b"again")
        assert out.read_text() == "late"

    def test_a_run_that_another_took_the_job_from_names_nothing(self, job, journal, out):
        with job.journal(readonly=False) as later:
            later.begin_run()
        with pytest.raises(Fenced):
            write(journal, out, b"mine")
        assert not out.exists()

    @pytest.mark.parametrize("before", [None, "own", "told"])
    @pytest.mark.parametrize("call", ["link", "rename", "unlink"])
    def test_a_crash_leaves_a_file_that_the_job_knows(self, job, out, before, call):
        """At each step of giving the name; whoever goes on brings it to its end."""
        if before == "own":
            with job.journal(readonly=False) as journal:
                write(journal, out, b"first")
        elif before == "told":
            out.write_text("old")
        code = DYING.format(call=call)
        command = [sys.executable, "-c", code, str(job.path), str(out), str(int(before == "told"))]
        died = subprocess.run(command, cwd=ROOT, check=False).returncode
        applies = {None: ("link", "unlink"), "own": ("rename",), "told": ("rename",)}[before]
        assert died == (-signal.SIGKILL if call in applies else 0)
        with job.journal(readonly=False) as journal:
            write(journal, out, b"third", overwrite=before == "told")
        assert out.read_bytes() == b"third"
        assert [p.name for p in out.parent.glob(f".{out.name}*")] == []


DYING = """
import os, signal, sys
from pathlib import Path
from batchrun.jobs.output.destination import Claim
from batchrun.jobs.files import atomic_write
from batchrun.jobs.folder import JobFolder
job, out = JobFolder(Path(sys.argv[1])), Path(sys.argv[2])
def watch(event, arguments):
    if event == "os.{call}" or ("{call}", event) == ("unlink", "os.remove"):
        if str(arguments[0]).endswith(".tmp") and out.name in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)
with job.journal(readonly=False) as journal:
    claim = Claim(journal, out, overwrite=sys.argv[3] == "1")
    with atomic_write(out, may_replace=claim) as file:
        file.write(b"second")
        sys.addaudithook(watch)
"""


class TestResuming:
    def test_a_file_that_is_not_the_job_s(self, home, job, out):
        out.write_text("a stranger's")
        with pytest.raises(OutputTaken, match=f"exists, and the job {job.id} did not") as refused:
            resuming(home, job).__enter__()
        assert f"batchrun resume {job.id} --output OTHER" in refused.value.hint
        assert "--overwrite" in refused.value.hint
        with resuming(home, job, overwrite=True):
            pass
        with resuming(home, job):
            pass
        out.write_text("another stranger's")  # nobody spoke of this one
        with pytest.raises(OutputTaken):
            resuming(home, job).__enter__()

    def test_its_own_file(self, home, job, out):
        with job.journal(readonly=False) as journal:
            write(journal, out, b"mine")
        with resuming(home, job):
            pass

    def test_what_it_was_submitted_to_replace(self, home, spec, out):
        job = create(home, replace(spec, output=replace(spec.output, overwrite=True)))
        out.write_text("old")
        with resuming(home, job):
            pass

    def test_another_job_that_is_live(self, home, job, spec, out, tmp_path):
        end(job, "interrupted")
        later = create(home, spec)
        with pytest.raises(OutputTaken, match=later.id):
            resuming(home, job, overwrite=True).__enter__()
        with resuming(home, job, tmp_path / "b.parquet"):
            assert job.spec().output.path == str(tmp_path / "b.parquet")
        with pytest.raises(OutputTaken, match=later.id):
            resuming(home, job, out).__enter__()

    def test_a_job_that_runs(self, home, job, tmp_path):
        with Lease(job.path), pytest.raises(LeaseHeld):
            resuming(home, job, tmp_path / "b.parquet").__enter__()
        assert not (job.path / "places.json").exists()

    def test_another_output(self, home, spec, out, tmp_path):
        job = create(home, replace(spec, output=replace(spec.output, overwrite=True)))
        before = (job.path / "job.json").read_bytes()
        elsewhere = tmp_path / "b.jsonl.gz"
        with resuming(home, job, elsewhere):
            pass
        output = job.spec().output
        assert (output.path, output.format) == (str(elsewhere), "jsonl")
        assert not output.overwrite  # that was said of another file
        assert job.spec().fingerprint() == spec.fingerprint()
        assert (job.path / "job.json").read_bytes() == before
        with resuming(home, job, out):  # and back
            pass
        assert job.spec() == JobFolder(job.path).spec() == replace(spec, output=job.spec().output)
        assert job.spec().output == replace(spec.output, overwrite=True)

    def test_another_output_and_a_moved_input_go_together(self, home, job, prompts, tmp_path):
        moved = prompts.rename(tmp_path / "moved.parquet")
        move(job, str(prompts), str(moved))
        with resuming(home, job, tmp_path / "b.jsonl"):
            pass
        assert job.spec().inputs[0].path == str(moved)
        assert job.spec().output.path == str(tmp_path / "b.jsonl")
        again = moved.rename(tmp_path / "again.parquet")
        move(job, str(moved), str(again))
        assert job.spec().output.path == str(tmp_path / "b.jsonl")

    def test_another_output_that_cannot_be(self, home, job, prompts, tmp_path):
        (tmp_path / "there.jsonl").write_text("x")
        for path, match in [
            (prompts, "is an input of this job"),
            (job.path / "log.jsonl", "among batchrun's own files"),
            (tmp_path / "no" / "b.jsonl", "there is no folder"),
            (tmp_path / "there.jsonl", "did not write it"),
            (tmp_path / "b.txt", "does not say which format"),
        ]:
            with pytest.raises(OutputError, match=match):
                resuming(home, job, path).__enter__()
        assert not (job.path / "places.json").exists()

    def test_what_is_noted_leaves_the_state_as_it_was(self, home, job, out):
        job.set_state("cancelled")  # before it ever ran: nothing but state.json says so
        out.write_text("x")
        with resuming(home, job, overwrite=True):
            pass
        assert job.state() == "cancelled"


class TestExporting:
    def finish(self, may_replace, path, text=b"rows"):
        with atomic_write(path, may_replace=may_replace) as file:
            file.write(text)

    def test_to_the_job_s_own_output_is_the_job_s(self, home, job, out):
        job.set_state("cancelled")
        for text in (b"some", b"more"):
            with exporting(home, job, out, overwrite=text == b"more") as may_replace:
                with pytest.raises(LeaseHeld):
                    Lease(job.path).__enter__()
                self.finish(may_replace, out, text)
        assert out.read_bytes() == b"more"
        assert job.state() == "cancelled"
        with resuming(home, job):
            pass

    def test_elsewhere_it_is_not(self, home, job, out, tmp_path):
        with exporting(home, job, tmp_path / "b.parquet", overwrite=False) as may_replace:
            self.finish(may_replace, tmp_path / "b.parquet")
        with pytest.raises(OutputTaken):
            resuming(home, job, tmp_path / "b.parquet").__enter__()

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("name", ["out.parquet", "b.parquet"])
    def test_a_file_that_appears_meanwhile_stays(self, home, job, tmp_path, overwrite, name):
        path = tmp_path / name
        with exporting(home, job, path, overwrite=overwrite) as may_replace:
            path.write_text("a stranger's")
            with pytest.raises(FileExistsError):
                self.finish(may_replace, path)
        assert path.read_text() == "a stranger's"

    def test_only_the_file_that_was_there_is_replaced(self, home, job, tmp_path):
        path = tmp_path / "b.parquet"
        path.write_text("old")
        with exporting(home, job, path, overwrite=True) as may_replace:
            path.write_text("a stranger's")
            with pytest.raises(FileExistsError):
                self.finish(may_replace, path)
        with exporting(home, job, path, overwrite=True) as may_replace:
            self.finish(may_replace, path)
        assert path.read_bytes() == b"rows"

    def test_to_its_output_while_the_job_runs(self, home, job, out):
        with Lease(job.path):
            job.set_state("running")
            with pytest.raises(OutputTaken, match="which is running, writes its output"):
                exporting(home, job, out, overwrite=True).__enter__()
            with exporting(home, job, out.with_name("partial.jsonl"), overwrite=False):
                pass

    def test_what_is_another_s_is_refused(self, home, job, spec, prompts, out):
        end(job, "interrupted")
        later = create(home, replace(spec, inputs=(InputFile.of(ROOT / "LICENSE"),)))
        for path, match in [(out, later.id), (ROOT / "LICENSE", later.id), (prompts, "an input")]:
            with pytest.raises(OutputError, match=match):
                exporting(home, job, path, overwrite=True).__enter__()


def test_identity_is_of_the_name_itself(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    assert OUTPUTS.identity(tmp_path / "gone") is None
    assert OUTPUTS.identity(tmp_path / "file" / "deeper") is None
    assert OUTPUTS.identity(tmp_path / "link") != OUTPUTS.identity(tmp_path / "file")
    there = OUTPUTS.identity(tmp_path / "file")
    assert json.loads(json.dumps(there)) == there
