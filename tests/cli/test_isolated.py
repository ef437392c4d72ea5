"""A file over which Arrow's C++ ends the process is named, by every command and by a run."""

import faulthandler
import os
import shutil
import signal

import pytest

from batchrun.jobs.errors import InputError, JobError
from batchrun.runner.isolated import ReaderCrashed, isolated
from tests.fuzz.test_fuzz import CORPUS

ABORTING = CORPUS / "parquet" / "checked-aborts"  # its metadata make C++ throw where nobody catches


def end_by(number):
    faulthandler.disable()  # pytest has it on, and would print where
    os.kill(os.getpid(), number)


def test_an_outcome_comes_back():
    assert isolated(lambda note: {"of": os.getpid()})["of"] != os.getpid()


def test_an_error_comes_back_with_its_hint_and_where_it_was_raised():
    def refuse(note):
        raise InputError("no", hint="type this")

    with pytest.raises(InputError) as caught:
        isolated(refuse)
    assert (str(caught.value), caught.value.hint) == ("no", "type this")
    with pytest.raises(ZeroDivisionError) as bug:
        isolated(lambda note: 1 // 0)
    assert "test_isolated.py" in "".join(bug.value.__notes__)


def test_an_error_that_can_not_be_sent_is_told():
    class LocalError(Exception):
        pass

    def fail(note):
        raise LocalError("of here")

    with pytest.raises(RuntimeError, match="of here"):
        isolated(fail)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_names_the_file_that_was_read(tmp_path, number):
    def crash(note):
        with note.reading(tmp_path / "in.parquet", 256, 100):
            end_by(number)

    with pytest.raises(ReaderCrashed) as caught:
        isolated(crash)
    assert str(caught.value) == (
        f"reading {tmp_path / 'in.parquet'}, rows 256 to 355 crashes the reader "
        f"({signal.Signals(number).name}): the file is damaged"
    )


def test_a_crash_that_is_no_files_and_a_kill_are_told_as_such(tmp_path):
    with pytest.raises(JobError, match="ended with SIGABRT"):
        isolated(lambda note: end_by(signal.SIGABRT))

    def end(note):
        with note.reading(tmp_path):
            end_by(signal.SIGKILL)

    with pytest.raises(JobError, match="because memory ran out"):
        isolated(end)


def test_the_commands_that_make_jobs(batchrun):
    shutil.copy(ABORTING, batchrun.folder / "bad.parquet")
    for command in (["submit"], ["submit", "--dry-run"], ["plan"]):
        shown = batchrun(*command, "bad.parquet", "--model", batchrun.model)
        assert shown.code == 1
        assert shown.error == (
            "reading bad.parquet crashes the reader (SIGABRT): the file is damaged"
        )
        assert "write the file again" in shown.hint
    assert not batchrun("list", "--json").json


def test_a_run_whose_file_was_sound_as_far_as_submit_looked(batchrun):
    path = shutil.copy(ABORTING, batchrun.folder / "bad.parquet")
    batchrun.unstarted(path)
    assert batchrun("resume").code == 1
    reason = batchrun("show", "--json").json["reason"]
    assert f"SIGABRT while it read {path}: the file is damaged" in reason
    crash = f"reading {path} crashes the reader (SIGABRT): the file is damaged"
    shown = batchrun("export")
    assert (shown.code, shown.error) == (1, crash)
    shown = batchrun("verify")
    assert (shown.code, shown.out.strip()) == (1, crash)


def test_what_is_left_of_a_job_whose_file_crashes(batchrun):
    path = batchrun.write("in.parquet", ["x"] * 3)
    assert batchrun.submit(path, "--max-tokens", 3, "-o", "out.parquet").code == 0
    shutil.copy(ABORTING, path)
    assert batchrun("export", "--partial", "-o", "left.jsonl").code == 0
    rows = batchrun.read("left.jsonl")
    assert [(row["row"], row["error"]) for row in rows] == [(i, None) for i in range(3)]
