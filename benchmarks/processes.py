"""A command run to its end or its limit, with its seconds and its memory, and nothing left behind.

What a command starts may outlive it: an engine's workers, a server. `adopt_orphans` makes such
processes children of this one, so that their memory is seen and they end with the command.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_SUBREAPER = 36  # prctl: orphans below us become our children
_EVERY = 1.0  # seconds between two looks at the memory


class FailedError(RuntimeError):
    """A command failed: the reason in one line; `log` has the end of what it printed."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


def adopt_orphans() -> None:
    """Make this process the parent of all that its children leave behind."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


class Memory(threading.Thread):
    """The peak memory of all descendants of this process but those that there are `before`."""

    def __init__(self, before: Iterable[psutil.Process]) -> None:
        super().__init__(daemon=True)
        self._before = set(before)
        self._resident: dict[int, int] = {}  # largest, by process
        self.proportional = 0
        self._ended = threading.Event()

    @property
    def resident(self) -> int:
        """Bytes: the largest resident set of each process, summed; shared pages count in each."""
        return sum(self._resident.values())

    def run(self) -> None:
        """Look until told to stop."""
        while True:
            self._look()
            if self._ended.wait(_EVERY):
                return

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self.join()

    def _look(self) -> None:
        found = 0
        for process in set(psutil.Process().children(recursive=True)) - self._before:
            with suppress(OSError):
                folder = Path(f"/proc/{process.pid}")
                found += 1024 * _kib(folder / "smaps_rollup", "Pss:")
                self._resident[process.pid] = 1024 * _kib(folder / "status", "VmHWM:")
        self.proportional = max(self.proportional, found)


def _kib(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def measured(
    command: list[str],
    environment: Mapping[str, str],
    log: Path,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Run a command to its end; its seconds and memory. Nothing that it started lives on.

    Args:
        command: The program and its arguments.
        environment: Variables beside this process's own.
        log: A file for all that it prints.
        timeout: Seconds after which it is ended; None waits.

    Raises:
        FailedError: It failed, or was not done in time.
    """
    before = psutil.Process().children(recursive=True)
    memory = Memory(before)
    began = time.perf_counter()
    code: int | None = None
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=file, stderr=file
        )
    memory.start()  # not before: until it is the command, the child has this process's memory
    try:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout)
        seconds = time.perf_counter() - began
    finally:
        memory.stop()
        _end_all_but(before)
    if code != 0:
        raise _failure(code, timeout, log.read_text(errors="replace"))
    return {
        "process_s": seconds,
        "peak_memory": memory.proportional,
        "peak_resident_sum": memory.resident,
    }


def _end_all_but(before: Iterable[psutil.Process]) -> None:
    """End the descendants that are not among `before`; they may have started more meanwhile."""
    while left := set(psutil.Process().children(recursive=True)) - set(before):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        # Not longer: whose parent dies is ours to wait for only from then on.
        psutil.wait_procs(left, timeout=0.5)


def _failure(code: int | None, timeout: float | None, printed: str) -> FailedError:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    if code is None:
        reason = f"not done within {timeout:g} seconds"
    elif code < 0:
        reason = f"ended by signal {-code}"
    else:
        reason = lines[-1] if lines else f"exit status {code}"
    return FailedError(reason, "\n".join(lines[-15:]))
