"""Every error becomes a message, a hint and an exit code; a bug becomes a line and a file."""

import errno
import re

import click
import pytest

from batchrun.cli import cli
from batchrun.cli.errors import ExitStatus, report_errors
from batchrun.engine.core import EngineError
from batchrun.errors import ModelError
from batchrun.jobs.errors import InputError


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (InputError("no rows", hint="look"), ExitStatus.FAILED, "error: no rows\nhint: look\n"),
        (ModelError("no model", hint="-m"), ExitStatus.FAILED, "error: no model\nhint: -m\n"),
        (EngineError("stuck"), ExitStatus.FAILED, "error: stuck\n"),
        (
            OSError(errno.EROFS, "Read-only file system", "/tmp/x"),
            ExitStatus.FAILED,
            "error: /tmp/x: Read-only file system\nhint: set BATCHRUN_HOME to a writable folder\n",
        ),
        (
            click.UsageError("--n is odd"),
            ExitStatus.USAGE,
            "error: --n is odd\nhint: batchrun --help\n",
        ),
        (click.Abort(), ExitStatus.INTERRUPTED, "error: interrupted\n"),
    ],
)
def test_known_errors(error, status, shown, capsys):
    assert report_errors(raising(error)) == status
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("name", [None, "new/deep/file"])
def test_of_a_full_disk_it_says_which_and_what_is_left(name, tmp_path, monkeypatch, capsys):
    """That of the file, or else that of the jobs."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path / "home"))
    path = name and str(tmp_path / name)
    full = OSError(errno.ENOSPC, "No space left on device", path)
    assert report_errors(raising(full)) == ExitStatus.FAILED
    error, hint = capsys.readouterr().err.splitlines()
    disk = re.escape(str(tmp_path if name else tmp_path / "home"))
    size = r"[\d,]+\.\d"
    start = f"error: {path}: No" if name else "error: No"
    assert re.fullmatch(
        rf"{start} space left on device \(the disk of {disk} has {size} of {size} MiB left\)", error
    )
    assert hint == "hint: make room on that disk (df -h shows all), then: batchrun resume"


def test_a_bug_is_one_line_and_its_traceback_in_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path / "home"))
    assert report_errors(raising(ZeroDivisionError("by zero"))) == ExitStatus.FAILED
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: internal error: ZeroDivisionError: by zero"
    (log,) = (tmp_path / "home").glob("crash-*.log")
    assert hint.endswith(str(log))
    assert "Traceback" in log.read_text()
    assert "in command" in log.read_text()


def test_a_bug_is_shown_whole_where_no_file_can_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "home").write_text("a file where the folder should be")
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path / "home"))
    assert report_errors(raising(KeyError("gone"))) == ExitStatus.FAILED
    shown = capsys.readouterr().err
    assert "could not be written" in shown
    assert "Traceback" in shown


def test_a_command_without_a_status_is_done():
    assert report_errors(lambda: None) == ExitStatus.DONE
    assert report_errors(lambda: 3) == ExitStatus.FAILED_ROWS


@pytest.mark.parametrize("command", ["prune --older-than", "submit x.jsonl --max-tokens"])
def test_an_option_without_its_value_points_to_its_command(command, capsys):
    words = command.split()
    assert report_errors(lambda: cli.main(words, "batchrun", standalone_mode=False)) == 2
    assert capsys.readouterr().err == (
        f"error: Option '{words[-1]}' requires an argument.\nhint: batchrun {words[0]} --help\n"
    )
