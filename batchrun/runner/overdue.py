"""Limits on making one prompt: a template is a program, and a tokenizer runs its expressions.

    from inside    Overdue is raised in the thread that makes it: ends Python code
    from outside   an Onlooker in another process decides: for C code, memory, sleep

The limit is on the thread's processor time, so that neither a busy machine nor SIGSTOP fails a row.
Wall-clock time counts only while the thread sleeps and other threads of the process run.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

from batchrun import platforms
from batchrun.cgroups import text_of
from batchrun.errors import ModelError
from batchrun.jobs.errors import JobError
from batchrun.jobs.inflight import Making, ReaderNote
from batchrun.machine import proc_bytes

T = TypeVar("T")

BARREN = 16  # failures in succession: then the rows are hardly to blame
_MEMORY = 2 << 30  # bytes that a process may grow by while it makes one prompt
_LOOKS = 20  # within the limit
_LATER = 1.25  # times the limit: the onlooker lets the process try first
_TICK_S = 1 / os.sysconf("SC_CLK_TCK") if platforms.LINUX else 0.01
_MEND = (
    "fix the model's chat template or tokenizer, or set BATCHRUN_PROMPT_SECONDS to the seconds of "
    "processor time that a prompt may take"
)
_TEMPLATE = "<template>"  # the name of Jinja's code


def prompt_seconds() -> float:
    """Seconds of processor time that a prompt may take."""
    return _seconds("BATCHRUN_PROMPT_SECONDS", 30.0)


def stall_seconds() -> float:
    """Seconds after which a step, a read or a write counts as hanging."""
    return _seconds("BATCHRUN_STALL_SECONDS", 600.0)


def hook_seconds() -> float:
    """Seconds that the command of `--on-done` may take."""
    return _seconds("BATCHRUN_HOOK_SECONDS", 600.0)


class Overdue(BaseException):
    """Making a prompt took too long. Not an `Exception`, so that library code lets it through."""


class PromptLimit:
    """Interrupts the making of a prompt that takes too long, where it is Python code.

    Args:
        note: Where the current row is noted; an `Onlooker` reads it there.
        limit_s: Seconds of processor time for each prompt.
    """

    def __init__(self, note: ReaderNote | None = None, limit_s: float = float("inf")) -> None:
        self.note, self.limit_s = note or ReaderNote(), limit_s
        self._lock = threading.Lock()
        self._struck = False
        self._end = threading.Event()
        self._watcher: threading.Thread | None = None

    def made(self, row: int, make: Callable[[], T]) -> T:
        """Call `make` in the calling thread as the prompt of a row; return its result.

        Raises:
            Overdue: It took too long.
        """
        self.note.making(row)
        try:
            return make()
        finally:
            while True:
                try:
                    with self._lock:  # from here on, no strike
                        self.note.made()
                        if self._struck:
                            _raise_in(threading.get_ident(), None)
                            self._struck = False
                    break
                except Overdue:  # it came just as the prompt was made
                    continue

    def __enter__(self) -> PromptLimit:
        if self.limit_s < float("inf"):
            self._watcher = threading.Thread(target=self._watch, name="prompt limit", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._watcher is not None:
            self._watcher.join()

    def _watch(self) -> None:
        clock = _PromptClock(os.getpid(), self.note)
        while not self._end.wait(min(max(self.limit_s / _LOOKS, 0.05), 1.0)):
            self.note.beat()
            at = clock.look()
            if at is not None and clock.seconds > self.limit_s:
                self._strike(at)  # at each look: code may catch everything

    def _strike(self, at: Making) -> None:
        with self._lock:
            if self.note.at() == at:
                self._struck = True
                _raise_in(at.thread, Overdue)


class _PromptClock:
    """Measures how long a process takes to make a prompt.

    Args:
        pid: The process.
        note: Says what it is doing.

    Attributes:
        seconds: Processor time spent on the current prompt.
        asleep: Whether the thread that makes it sleeps.
        fresh: Whether at the last look it made another prompt, or none.
    """

    def __init__(self, pid: int, note: ReaderNote) -> None:
        self._pid, self._note = pid, note
        self._number, self._begun = 0, 0.0
        self.seconds, self.asleep, self.fresh = 0.0, False, False

    def look(self) -> Making | None:
        """The prompt that it is making, if any; called from time to time."""
        at = self._note.at()
        if not isinstance(at, Making):
            return None
        stat = text_of(Path(f"/proc/{self._pid}/task/{at.native}/stat"))
        if not stat:
            return None
        letter, *fields = stat[stat.rindex(")") + 2 :].split()  # R runs, S and D sleep
        now = (int(fields[10]) + int(fields[11])) * _TICK_S
        self.fresh = at.number != self._number
        if self.fresh:
            self._number, self._begun = at.number, now
        self.seconds, self.asleep = now - self._begun, letter in "SD"
        return at


class Overrun(NamedTuple):
    """A prompt that has to be ended."""

    at: Making  # the prompt
    reason: str  # its row's error
    certain: bool = True  # whether the row is to blame: memory may be another thread's


class Onlooker:
    """Watches from outside how long a process takes to make a prompt.

    Args:
        pid: The process.
        note: Says what it is doing.
    """

    def __init__(self, pid: int, note: ReaderNote) -> None:
        self._pid, self._note, self._clock = pid, note, _PromptClock(pid, note)
        self._limit_s, self._stall_s = prompt_seconds(), stall_seconds()
        self._beat = self._memory = 0
        self._slept = self._looked = 0.0

    def look(self) -> Overrun | None:
        """The prompt that has to be ended, if any; called from time to time."""
        now, at = time.monotonic(), self._clock.look()
        since, self._looked = min(now - self._looked, 1.0), now
        if at is None:
            return None
        if self._clock.fresh:
            self._slept, self._memory = 0.0, _anonymous(self._pid)
            return None
        # Without beats, another thread holds the GIL, and this one waits for it.
        beat = self._note.beats()
        if self._clock.asleep and beat != self._beat:
            self._slept += since
        self._beat = beat
        if self._clock.seconds > _LATER * self._limit_s + 1:
            return Overrun(at, too_long(self._limit_s))
        if self._slept > self._stall_s:
            return Overrun(at, f"building its prompt did not finish in {self._stall_s:g} s")
        if _anonymous(self._pid) - self._memory > _MEMORY:
            size = f"{_MEMORY / 2**30:g} GiB"
            return Overrun(
                at, f"building its prompt took more than {size} of memory", certain=False
            )
        return None


def too_long(limit_s: float) -> str:
    """The error of a row whose prompt took longer than that."""
    return f"building its prompt took more than {limit_s:g} s of processor time"


def never_made(rows: int, place: str) -> ModelError:
    """The error for this many successive rows whose prompts took too long."""
    where = place or ": the cause is probably the model's chat template or tokenizer"
    return ModelError(
        f"building prompts took too long for {rows} consecutive rows{where}", hint=_MEND
    )


def not_made(overrun: Overrun) -> ModelError:
    """The error for a prompt that had to be ended, and its process with it."""
    return ModelError(f"row {overrun.at.row}: {overrun.reason}", hint=_MEND)


def place_of(trace: TracebackType | None) -> str:
    """Where a prompt was ended, to append to its row's error."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    return place_in("\n".join(f'"{code.co_filename}" in {code.co_name}' for code in codes))


def place_in(printed: str) -> str:
    """The same, from a printed stack."""
    if f'"{_TEMPLATE}"' in printed:
        return ", in the model's chat template"
    return ", in the tokenizer" if " in _encode" in printed else ""


def _anonymous(pid: int) -> int:
    """Bytes of a process's anonymous memory: neither files nor shared."""
    return proc_bytes(Path(f"/proc/{pid}/status"), "RssAnon:") or 0


def _raise_in(thread: int, what: type[BaseException] | None) -> None:
    """Raise something in a thread at its next instruction; None cancels a pending one."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(what) if what is not None else None
    )


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise JobError(f"{name}={text} is not a positive number of seconds", hint=f"unset {name}")
    return found
