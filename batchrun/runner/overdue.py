"""What making one prompt may take. A template is a program, and a tokenizer runs its expressions.

    from inside    Overdue is raised in the thread that makes it: ends whatever is Python
    from outside   an Onlooker in another process says that it must end: C code, memory, sleep

What counts is processor time of the thread, so that no busy machine and no SIGSTOP makes a row an
error. Time of the clock counts only while the thread sleeps and others of the process run.
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

from batchrun.cgroups import text_of
from batchrun.errors import ModelError
from batchrun.jobs.errors import JobError
from batchrun.jobs.inflight import Making, ReaderNote
from batchrun.machine import proc_bytes

T = TypeVar("T")

BARREN = 16  # rows in a row: then it is hardly the rows that are to blame
_MEMORY = 2 << 30  # bytes that a process may grow by while it makes one prompt
_LOOKS = 20  # within the limit
_LATER = 1.25  # times the limit: the onlooker leaves it to the process to end a prompt
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_MEND = (
    "mend the model's chat template or tokenizer; BATCHRUN_PROMPT_SECONDS sets how many seconds of "
    "processor time a prompt may take"
)
_TEMPLATE = "<template>"  # the name of Jinja's code


def prompt_seconds() -> float:
    """Seconds of processor time that a prompt may take."""
    return _seconds("BATCHRUN_PROMPT_SECONDS", 30.0)


def stall_seconds() -> float:
    """Seconds after which a step, a read or a write is taken to hang."""
    return _seconds("BATCHRUN_STALL_SECONDS", 600.0)


class Overdue(BaseException):
    """Making a prompt took too long. No `Exception`: library code is to let it through."""


class PromptLimit:
    """Ends the making of a prompt that takes too long, as far as Python code can be ended.

    Args:
        note: Where is noted what is made; also where an `Onlooker` reads it.
        limit_s: Seconds of processor time for each.
    """

    def __init__(self, note: ReaderNote | None = None, limit_s: float = float("inf")) -> None:
        self.note, self.limit_s = note or ReaderNote(), limit_s
        self._lock = threading.Lock()
        self._struck = False
        self._end = threading.Event()
        self._watcher: threading.Thread | None = None

    def made(self, row: int, make: Callable[[], T]) -> T:
        """What `make` returns, in the calling thread, as the prompt of a row.

        Raises:
            Overdue: It took too long.
        """
        self.note.making(row)
        try:
            return make()
        finally:
            while True:
                try:
                    with self._lock:  # from here on nothing strikes
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
    """Tells how long a process makes a prompt.

    Args:
        pid: The process.
        note: What it is at.

    Attributes:
        seconds: Of processor time, for the prompt that it is at.
        asleep: Whether the thread that makes it sleeps.
        fresh: Whether it was at another one, or none, at the last look.
    """

    def __init__(self, pid: int, note: ReaderNote) -> None:
        self._pid, self._note = pid, note
        self._number, self._begun = 0, 0.0
        self.seconds, self.asleep, self.fresh = 0.0, False, False

    def look(self) -> Making | None:
        """What it is at, if that is a prompt; called from time to time."""
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

    at: Making  # whose it is
    reason: str  # what is wrong with its row
    certain: bool = True  # whether it is its fault: memory may be another thread's


class Onlooker:
    """Watches from outside how long a process makes a prompt.

    Args:
        pid: The process.
        note: What it is at.
    """

    def __init__(self, pid: int, note: ReaderNote) -> None:
        self._pid, self._note, self._clock = pid, note, _PromptClock(pid, note)
        self._limit_s, self._stall_s = prompt_seconds(), stall_seconds()
        self._beat = self._memory = 0
        self._slept = self._looked = 0.0

    def look(self) -> Overrun | None:
        """What has to be ended, if anything has; called from time to time."""
        now, at = time.monotonic(), self._clock.look()
        since, self._looked = min(now - self._looked, 1.0), now
        if at is None:
            return None
        if self._clock.fresh:
            self._slept, self._memory = 0.0, _anonymous(self._pid)
            return None
        # Where nobody beats, another thread has the interpreter's lock, and this one waits for it.
        beat = self._note.beats()
        if self._clock.asleep and beat != self._beat:
            self._slept += since
        self._beat = beat
        if self._clock.seconds > _LATER * self._limit_s + 1:
            return Overrun(at, too_long(self._limit_s))
        if self._slept > self._stall_s:
            return Overrun(at, f"making its prompt has not ended in {self._stall_s:g} s")
        if _anonymous(self._pid) - self._memory > _MEMORY:
            size = f"{_MEMORY / 2**30:g} GiB"
            return Overrun(at, f"making its prompt took more than {size} of memory", certain=False)
        return None


def too_long(limit_s: float) -> str:
    """What is wrong with a row whose prompt took longer than that."""
    return f"making its prompt took more than {limit_s:g} s of processor time"


def never_made(rows: int, place: str) -> ModelError:
    """The error where the prompts of so many rows, one after the other, took too long."""
    where = place or ": the model's chat template or tokenizer is to blame, hardly the rows"
    return ModelError(f"making a prompt took too long for {rows} rows in a row{where}", hint=_MEND)


def not_made(overrun: Overrun) -> ModelError:
    """The error where one prompt had to be ended and nothing goes on."""
    return ModelError(f"row {overrun.at.row}: {overrun.reason}", hint=_MEND)


def place_of(trace: TracebackType | None) -> str:
    """Where a prompt was ended, to add to what is wrong with its row."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    return place_in("\n".join(f'"{code.co_filename}" in {code.co_name}' for code in codes))


def place_in(printed: str) -> str:
    """The same of a printed stack."""
    if f'"{_TEMPLATE}"' in printed:
        return ", in the model's chat template"
    return ", in the tokenizer" if " in _encode" in printed else ""


def _anonymous(pid: int) -> int:
    """Bytes of memory that a process has beside files and what it shares."""
    return proc_bytes(Path(f"/proc/{pid}/status"), "RssAnon:") or 0


def _raise_in(thread: int, what: type[BaseException] | None) -> None:
    """Raise something in a thread at its next instruction; None takes back what did not come."""
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
        raise JobError(f"{name}={text} is no number of seconds", hint=f"unset {name}")
    return found
