"""Inputs are read, and prompts made, in a child process, which this one can outlive and end.

What C++ makes of a damaged file may be the process's end. Where a chat template hangs in C no
handler of signals runs any more, so neither a limit nor Ctrl-C could end it from inside.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from batchrun.jobs.errors import InputError, JobError
from batchrun.jobs.inflight import ReaderNote, Reading
from batchrun.jobs.rows.row import AGAIN
from batchrun.runner.overdue import Onlooker, not_made

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_LOOK_S = 0.2  # between two looks at what the child is at
_GRACE_S = 2.0  # for a child that was interrupted
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


def isolated(work: Callable[[ReaderNote], T]) -> T:
    """What `work` returns or raises; done in a child, whose changes in memory are lost.

    Args:
        work: Given what it tells which file it reads, and which row's prompt it makes. What it
            returns can be pickled.

    Raises:
        ReaderCrashed: It crashed while it read a file.
        ModelError: Making a prompt took too long.
        JobError: The child was ended otherwise.
    """
    note = ReaderNote()
    ours, theirs = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with _interrupts_left_to_the_child() as interrupts:
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns of other threads: here they are libraries' that are safe to fork
            # beside.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os.close(ours)
            _be_child(work, note, theirs, parent)
        os.close(theirs)
        try:
            sent = _sent(child, ours, note, interrupts)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            os.close(ours)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    at = note.at()
    note.close()
    if code:
        raise _crash(signal.Signals(-code).name if code < 0 else f"exit code {code}", at)
    value, error = pickle.loads(sent)
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def _sent(child: int, pipe: int, note: ReaderNote, interrupts: list[float]) -> bytes:
    """What the child sends until it ends."""
    onlooker, parts = Onlooker(child, note), []
    while True:
        if select.select([pipe], [], [], _LOOK_S)[0]:
            parts.append(os.read(pipe, 1 << 20))
            if not parts[-1]:
                return b"".join(parts)
        elif interrupts and time.monotonic() - interrupts[0] > _GRACE_S:
            raise KeyboardInterrupt
        elif (overrun := onlooker.look()) is not None:
            raise not_made(overrun)


def _crash(how: str, at: object) -> JobError:
    what = f"reading {at}" if isinstance(at, Reading) else "reading the input"
    if how == "SIGKILL":
        return JobError(
            f"{what} was ended by SIGKILL: by somebody, or by the system for want of memory"
        )
    if how in _FAULTS and isinstance(at, Reading) and at.path:
        return ReaderCrashed(Path(at.path), f"{what} crashes the reader ({how})")
    return JobError(f"{what} was ended by {how}")


def _be_child(
    work: Callable[[ReaderNote], Any], note: ReaderNote, pipe: int, parent: int
) -> NoReturn:
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


def _done(work: Callable[[ReaderNote], Any], note: ReaderNote) -> bytes:
    try:
        return pickle.dumps((work(note), None))
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
def _interrupts_left_to_the_child() -> Iterator[list[float]]:
    """A terminal's Ctrl-C goes to both; the child's answer to it is enough. Yields when it came."""
    came: list[float] = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(time.monotonic()))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
