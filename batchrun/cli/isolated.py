"""Inputs are read in a child process: what C++ makes of a damaged file may be the process's end."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jobs.errors import InputError, JobError
from jobs.row import AGAIN, Noted
from jobs.suspects import ReaderNote, Reading

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_FAULTS = {"SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE"}


class ReaderCrashed(InputError):  # noqa: N818 - what happened to a process
    """A file brought the process down that read it.

    Args:
        path: The file.
        what: What of it was read, and how the process ended.
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{what}: the file is damaged", hint=AGAIN)
        self.path = path


def isolated(work: Callable[[Noted], T]) -> T:
    """What `work` returns or raises; done in a child, whose changes in memory are lost.

    Args:
        work: Given what it tells which file it reads. What it returns can be pickled.

    Raises:
        ReaderCrashed: It crashed while it read a file.
        JobError: The child was ended otherwise.
    """
    note = ReaderNote()
    ours, theirs = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with _interrupts_left_to_the_child():
        parent, child = os.getpid(), _forked()
        if child == 0:
            os.close(ours)
            _be_child(work, note, theirs, parent)
        os.close(theirs)
        with os.fdopen(ours, "rb") as pipe:
            sent = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    at = note.at()
    note.close()
    if code:
        raise _crash(signal.Signals(-code).name if code < 0 else f"exit code {code}", at)
    value, error = pickle.loads(sent)
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def _crash(how: str, at: object) -> JobError:
    what = f"reading {at}" if isinstance(at, Reading) else "reading the input"
    if how == "SIGKILL":
        return JobError(
            f"{what} was ended by SIGKILL: by somebody, or by the system for want of memory"
        )
    if how in _FAULTS and isinstance(at, Reading) and at.path:
        return ReaderCrashed(Path(at.path), f"{what} crashes the reader ({how})")
    return JobError(f"{what} was ended by {how}")


def _forked() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of other threads: here they are libraries' that are safe to fork beside.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _be_child(work: Callable[[Noted], Any], note: ReaderNote, pipe: int, parent: int) -> NoReturn:
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == parent:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sent = _done(work, note)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            with os.fdopen(pipe, "wb") as file:
                file.write(sent)
            code = 0
    finally:
        os._exit(code)


def _done(work: Callable[[Noted], Any], note: ReaderNote) -> bytes:
    try:
        return pickle.dumps((work(note.reading), None))
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        error.add_note(trace)  # which can't be sent
        try:
            sent = pickle.dumps((None, error))
            pickle.loads(sent)
        except Exception:
            return pickle.dumps((None, RuntimeError(trace)))
        return sent


@contextmanager
def _interrupts_left_to_the_child() -> Iterator[None]:
    """A terminal's Ctrl-C goes to both; the child's answer to it is enough."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
