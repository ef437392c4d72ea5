"""Reads inputs and makes prompts in a child process, which may crash or be killed.

C++ code that reads a damaged file may crash the process. While a chat template hangs in C no signal
handler runs, so neither a limit nor Ctrl-C could end it from inside.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn, TypeVar

from batchrun import platforms
from batchrun.errors import sendable
from batchrun.jobs.errors import InputError, JobError
from batchrun.jobs.inflight import ReaderNote, Reading
from batchrun.objectstore.paths import Location, location
from batchrun.runner.overdue import Onlooker, not_made

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_LOOK_S = 0.2  # between two looks at what the child is doing
_GRACE_S = 2.0  # for a child that was interrupted
_FAULTS = {"SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE"}


class ReaderCrashed(InputError):  # noqa: N818 - what happened to a process
    """A file crashed the process that read it.

    Args:
        path: The file.
        what: Which part of it was read, and how the process ended.
    """

    def __init__(self, path: Location, what: str) -> None:
        from batchrun.jobs.rows.row import AGAIN  # noqa: PLC0415 - Arrow, seldom

        super().__init__(f"{what}: the file is damaged", hint=AGAIN)
        self.path = path


def isolated(
    work: Callable[[ReaderNote], T],
    doing: str = "reading the input",
    look: Callable[[object], None] = lambda at: None,
) -> T:
    """Run `work` in a child process; return what it returns, or raise what it raises.

    Its changes to memory are lost. On other systems than Linux this process runs it, and nothing
    protects it.

    Args:
        work: Called with a note, where it says which file it reads, and which row's prompt it
            makes. Its result must be picklable.
        doing: What it does while it notes nothing.
        look: Called several times a second with what it notes.

    Raises:
        ReaderCrashed: It crashed while reading a file.
        ModelError: Making a prompt took too long.
        JobError: The child ended in another way.
    """
    if not platforms.LINUX:  # without fork, or where libraries don't survive one
        with closing(ReaderNote()) as note:
            return work(note)
    ours, theirs = Pipe(duplex=False)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with closing(ReaderNote()) as note, ours, _interrupts_left_to_the_child() as interrupts:
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns of other threads. The child takes none of their locks: it only
            # reads, and forking is safe with Arrow.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _be_child(work, note, theirs, parent)
        theirs.close()
        try:
            sent = _sent(child, ours, note, interrupts, look)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if sent is None:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise _crash(how, note.at(), doing)
    value, error = pickle.loads(sent)
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def _sent(
    child: int,
    pipe: Connection,
    note: ReaderNote,
    interrupts: list[float],
    look: Callable[[object], None],
) -> bytes | None:
    """What the child sends; None if it ends without a word."""
    onlooker = Onlooker(child, note)
    while not pipe.poll(_LOOK_S):
        if interrupts and time.monotonic() - interrupts[0] > _GRACE_S:
            raise KeyboardInterrupt
        look(note.at())
        if (overrun := onlooker.look()) is not None:
            raise not_made(overrun)
    try:
        return pipe.recv_bytes()
    except (EOFError, OSError):  # before it began to send, or meanwhile
        return None


def _crash(how: str, at: object, doing: str) -> JobError:
    what = f"reading {at}" if isinstance(at, Reading) else doing
    if how == "SIGKILL":
        return JobError(
            f"{what} was killed by SIGKILL: by a user, or by the system because memory ran out"
        )
    if how in _FAULTS and isinstance(at, Reading) and at.path:
        return ReaderCrashed(location(at.path), f"{what} crashes the reader ({how})")
    return JobError(f"{what} ended with {how}")


def _be_child(
    work: Callable[[ReaderNote], Any], note: ReaderNote, pipe: Connection, parent: int
) -> NoReturn:
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == parent:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            faulthandler.disable()  # the parent says what crashed
            sent = _done(work, note)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            pipe.send_bytes(sent)
    finally:
        os._exit(1)  # what was sent says more


def _done(work: Callable[[ReaderNote], Any], note: ReaderNote) -> bytes:
    try:
        return pickle.dumps((work(note), None))
    except BaseException as error:
        return pickle.dumps((None, sendable(error)))


@contextmanager
def _interrupts_left_to_the_child() -> Iterator[list[float]]:
    """Let the child alone react to Ctrl-C, which both get; yields the times of interrupts."""
    came: list[float] = []
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield came
        return
    before = signal.signal(signal.SIGINT, lambda *_: came.append(time.monotonic()))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
