"""The one place where an error becomes text and an exit code."""

from __future__ import annotations

import errno
import os
import time
import traceback
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import click

from batchrun.cli.mistyped import meant
from batchrun.errors import UserError, said_by
from batchrun.jobs.errors import cause_of
from batchrun.terminal import say, tell


class ExitStatus(IntEnum):
    """What `batchrun` exits with."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    FAILED_ROWS = 3
    INTERRUPTED = 130


# By the state of a job that has ended; any other has failed.
STATUS = {
    "done": ExitStatus.DONE,
    "done-with-errors": ExitStatus.FAILED_ROWS,
    "interrupted": ExitStatus.INTERRUPTED,
    "cancelled": ExitStatus.INTERRUPTED,
}


def report_errors(command: Callable[[], Any]) -> int:
    """Runs a command, prints what went wrong, if anything, and returns its exit code.

    A user's mistake gets an `error:` line and, where something can be done, a `hint:` line.
    Anything unforeseen is a bug: one line, and the traceback in a file.
    """
    try:
        return int(command() or 0)
    except (click.Abort, KeyboardInterrupt):
        print_error("interrupted", None)
        return ExitStatus.INTERRUPTED
    except click.UsageError as error:
        print_error(*_misused(error))
        return ExitStatus.USAGE
    except click.ClickException as error:
        print_error(error.format_message(), None)
        return ExitStatus.FAILED
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, went away. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitStatus.FAILED
    except Exception as error:
        print_error(*explain(error))
        return ExitStatus.FAILED


def _misused(error: click.UsageError) -> tuple[str, str]:
    """Message and hint of wrong usage."""
    usage = f"{error.ctx.command_path if error.ctx else 'batchrun'} --help"
    if isinstance(error, click.NoSuchOption):
        return f"there is no option {error.option_name}", meant(error) or usage
    return error.format_message(), getattr(error, "hint", None) or usage


def explain(error: Exception, folder: Path | None = None) -> tuple[str, str | None]:
    """Message and hint of any error; a bug's traceback goes to a file that the hint names.

    Args:
        error: The error.
        folder: Where that file goes, instead of `home()`.
    """
    try:
        known = describe(error)
    except (ImportError, OSError, MemoryError):  # not even `describe` can run any more
        known = said_by(error), "run batchrun doctor to see what this machine lacks"
    return known or _bug(error, folder)


def describe(error: Exception) -> tuple[str, str | None] | None:
    """Message and hint of an error that a user can understand; None for a bug."""
    if isinstance(error, UserError):
        return str(error), error.hint
    if isinstance(error, ImportError) or (isinstance(error, OSError) and error.errno is None):
        return f"a library can't be loaded: {error}", "run batchrun doctor to see what is wrong"
    if isinstance(error, MemoryError):
        return (
            ": ".join(filter(None, ("out of memory", str(error)))),
            "raise the limits that batchrun doctor names, then: batchrun resume, with a lower "
            "--max-num-seqs N if needed; or use a smaller model",
        )
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{cause_of(error, _home())}", _os_hint(error.errno)
    return None


def _home() -> Path:
    """Where most of what is written goes."""
    return Path(os.environ.get("BATCHRUN_HOME") or os.path.expanduser("~/.batchrun"))


def _os_hint(number: int) -> str | None:
    return {
        errno.ENOSPC: "make room on that disk (df -h shows all), then: batchrun resume",
        errno.EDQUOT: "free some of your quota, then: batchrun resume",
        errno.EROFS: "set BATCHRUN_HOME to a writable folder",
        errno.EACCES: "check the permissions, or set BATCHRUN_HOME to a writable folder",
        errno.EFBIG: "lift the limit on file sizes: ulimit -f unlimited",
        errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
        errno.ENFILE: "close programs that hold files open, or: sysctl -w fs.file-max=1000000",
        errno.ENOMEM: "free memory, or raise its limits: ulimit -v, ulimit -d",
        errno.ENOLCK: "set BATCHRUN_HOME to a folder on a disk of this machine",
        errno.EAGAIN: "raise the limit of processes: ulimit -u",
    }.get(number)


def _bug(error: Exception, folder: Path | None) -> tuple[str, str]:
    from batchrun.jobs.files import make_folders, open_private  # noqa: PLC0415
    from batchrun.jobs.folder import home  # noqa: PLC0415

    text = "".join(traceback.format_exception(error))
    summary = f"internal error: {type(error).__name__}: {error}"
    path = (folder or home()) / f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        make_folders(path.parent)
        with open(path, "w", encoding="utf-8", errors="replace", opener=open_private) as file:
            file.write(text)
    except OSError as failure:
        say(*text.splitlines(), err=True)
        return summary, f"this is a bug in batchrun; its traceback could not be written: {failure}"
    return summary, f"this is a bug in batchrun; its traceback is in {path}"


def print_error(message: str, hint: str | None) -> None:
    """Print an error and what to do about it."""
    tell(f"error: {message}")
    if hint:
        tell(f"hint: {hint}")
