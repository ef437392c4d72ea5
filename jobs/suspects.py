"""Which rows are in the engine, noted so that the note outlives the process and costs no call.

A row that brings the process down by a signal leaves no error behind, only this: memory that
belongs to a file is the kernel's, and stays when the process goes. What power loss leaves of it
means nothing, which is harmless: then no one is there to ask who brought the process down.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from jobs.errors import OutputError

_SLOTS = 512  # as many rows at first; the file doubles when they don't suffice


class RunningRows:
    """Rows of one job that are in the engine now: one 8-byte slot each, row + 1 or 0 when free.

    A row of several samples is in it as often as it was added.

    Args:
        folder: The job's folder. What an earlier process noted is still there.

    Raises:
        OutputError: The file can't be made.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "running-rows"
        self._open(_SLOTS)
        self._where: dict[int, list[int]] = {}
        self._free: list[int] = []
        for slot in reversed(range(len(self._view))):
            if self._view[slot]:
                self._where.setdefault(self._view[slot] - 1, []).append(slot)
            else:
                self._free.append(slot)

    def add(self, row: int) -> None:
        """Note that the row is about to be in the engine."""
        if not self._free:
            before = len(self._view)
            self.close()
            self._open(2 * before)
            self._free.extend(reversed(range(before, 2 * before)))
        slot = self._free.pop()
        self._view[slot] = row + 1  # one aligned store: there or not there, never a half
        self._where.setdefault(row, []).append(slot)

    def remove(self, row: int) -> None:
        """Note that the row, or one sample of it, has left the engine."""
        slots = self._where[row]
        slot = slots.pop()
        if not slots:
            del self._where[row]
        self._view[slot] = 0
        self._free.append(slot)

    def rows(self) -> list[int]:
        """The rows that are noted, each once, in order; also those of another process."""
        return sorted({number - 1 for number in self._view if number})

    def clear(self) -> None:
        """Forget all rows."""
        for slot in range(len(self._view)):
            self._view[slot] = 0
        self._where.clear()
        self._free = list(reversed(range(len(self._view))))

    def close(self) -> None:
        """Let go of the memory; the note stays."""
        self._view.release()
        self._memory.close()

    def _open(self, slots: int) -> None:
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                size = max(8 * slots, os.fstat(handle).st_size // 8 * 8)
                # Without blocks behind it, memory of a full disk would end the process by SIGBUS.
                os.posix_fallocate(handle, 0, size)
                self._memory = mmap.mmap(handle, size)
            finally:
                os.close(handle)
        except OSError as error:
            raise OutputError(
                f"{self._path} can't be made: {error.strerror or error}",
                hint="make room on the disk, then: batchrun resume",
            ) from error
        self._view = memoryview(self._memory).cast("q")
