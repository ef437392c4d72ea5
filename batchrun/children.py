"""Processes that batchrun starts to work for it: their command, what they inherit, how they end."""

from __future__ import annotations

import ctypes
import os
import signal
import site
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

_INHERITED = "BATCHRUN_INHERITED"  # in a child's environment: the handles that it inherits
_PR_SET_PDEATHSIG = 1
# Signals by which a process dies of what it did, so that the rows in it may be to blame.
_FAULTS = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")
FAULTS = {getattr(signal, name) for name in _FAULTS if hasattr(signal, name)}


def command(*arguments: object, module: str = "batchrun") -> list[str]:
    """A child's command; `-P` keeps files of its working folder from becoming modules."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def inheriting(*handles: int) -> dict[str, Any]:
    """Arguments for `Popen`: handles, and an environment for a child and its own children.

    They find this package where it is, and nothing in their working folder, which an empty path
    entry would mean too.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if handles:
        environment[_INHERITED] = " ".join(map(str, handles))
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        if name in environment:
            environment[name] = os.pathsep.join(filter(None, environment[name].split(os.pathsep)))
    root, path = str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")
    if root not in (*path.split(os.pathsep), *site.getsitepackages(), site.getusersitepackages()):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, path)))
    return {"env": environment, "pass_fds": handles}


def inherited() -> list[int]:
    """The handles inherited from the parent process; this process's children don't get them.

    A lock ends with the last process that has its handle.
    """
    numbers = [int(number) for number in os.environ.pop(_INHERITED, "").split()]
    keep(numbers)
    return numbers


def keep(handles: Iterable[int]) -> None:
    """Keep handles from this process's children, forked or started."""
    for handle in handles:
        os.set_inheritable(handle, False)
        os.register_at_fork(after_in_child=partial(_close, handle))


def _close(handle: int) -> None:
    with suppress(OSError):  # it is closed by now
        os.close(handle)


def end_with_parent(parent: int, number: int | None = None) -> None:
    """Have the kernel send this process a signal when the thread that started it ends.

    Args:
        parent: The parent's PID; if it has ended already, so does this process.
        number: The signal; SIGKILL by default.
    """
    number = number or signal.SIGKILL
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def outlive_parent() -> None:
    """Undo `end_with_parent`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
