"""Which rows are in the engine, and what the reader is doing, in notes that outlive the process.

A note costs no system call. A process killed by a signal leaves no error, only these notes: the
memory of a mapped file belongs to the kernel and outlives the process. After a power loss they mean
nothing, which is harmless: nobody then asks which row crashed the process.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from batchrun.jobs.errors import OutputError
from batchrun.jobs.files import open_private
from batchrun.objectstore.paths import Location

_SLOTS = 512  # initial capacity in rows; the file doubles when it is full
_PATH_BYTES = 4096


class _Note:
    """Whole numbers in memory that outlives the process."""

    _memory: mmap.mmap
    _view: memoryview

    def close(self) -> None:
        """Let go of the memory; the note stays."""
        self._view.release()
        self._memory.close()


class InFlightRows(_Note):
    """Rows of one job that are in the engine now: one 8-byte slot each, row + 1, or 0 when free.

    A row with several samples takes a slot for each time it was added.

    Args:
        folder: The job's folder. Notes of an earlier process are still there.

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
        """Note that the row is about to enter the engine."""
        if not self._free:
            before = len(self._view)
            self.close()
            self._open(2 * before)
            self._free.extend(reversed(range(before, 2 * before)))
        slot = self._free.pop()
        self._view[slot] = row + 1  # one aligned store is atomic
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
        """The noted rows, each once, in order, including those of an earlier process."""
        return sorted({number - 1 for number in self._view if number})

    def clear(self) -> None:
        """Forget all rows."""
        for slot in range(len(self._view)):
            self._view[slot] = 0
        self._where.clear()
        self._free = list(reversed(range(len(self._view))))

    def _open(self, slots: int) -> None:
        self._memory = _mapped(self._path, 8 * slots)
        self._view = memoryview(self._memory).cast("q")


@dataclass(frozen=True)
class Making:
    """The reader is making a row's prompt.

    Args:
        row: The row.
        thread: The thread that makes it, by `threading.get_ident`.
        native: The same thread's id in the system.
        number: Counts prompts that were begun, to tell this one from the next.
    """

    row: int
    thread: int
    native: int
    number: int


@dataclass(frozen=True)
class Reading:
    """The reader is reading a file, or the input.

    Args:
        path: The file; empty if unknown.
        first: First row of the job that is read; -1 if unknown.
        rows: Number of rows; 0 if unknown.
        thread: The thread that reads it, by `threading.get_ident`.
    """

    path: str
    first: int
    rows: int
    thread: int

    def __str__(self) -> str:
        what = self.path or "the input"
        if self.first < 0:
            return what
        return f"{what}, rows {self.first:,} " + (
            f"to {self.first + self.rows - 1:,}" if self.rows else "on"
        )


class ReaderNote(_Note):
    """What a job's reader is doing: making a prompt, reading a file, or neither.

    Args:
        folder: The job's folder. The note of an earlier process is still there. Without a folder
            only this process and its children see the note.

    Raises:
        OutputError: The file can't be made.
    """

    _AT, _THREAD, _NATIVE, _ROW, _NUMBER, _FIRST, _ROWS, _LENGTH, _BEATS, _PATH = range(10)
    _NEITHER, _MAKING, _READING = range(3)

    def __init__(self, folder: Path | None = None) -> None:
        size = 8 * self._PATH + _PATH_BYTES
        self._memory = _mapped(folder / "reader-at", size) if folder else mmap.mmap(-1, size)
        self._view = memoryview(self._memory)[: 8 * self._PATH].cast("q")

    @contextmanager
    def reading(
        self, path: Location | None = None, first: int = -1, rows: int = 0
    ) -> Iterator[None]:
        """Note that the calling thread reads a file, or the input, in the block. Nests.

        Args:
            path: The file, if known.
            first: Index of the first row read, if known.
            rows: Number of rows read, if known.
        """
        view = self._view
        before = self.at() if view[self._AT] == self._READING else None
        self._set_reading(os.fsencode(str(path or ""))[:_PATH_BYTES], first, rows)
        try:
            yield
        finally:
            view[self._AT] = self._NEITHER
            if isinstance(before, Reading):
                self._set_reading(os.fsencode(before.path), before.first, before.rows)

    def making(self, row: int) -> None:
        """Note that the calling thread makes a row's prompt, until its next note."""
        view = self._view
        view[self._AT] = self._NEITHER
        view[self._NUMBER] += 1  # before the row: `at` reads them in the other order
        view[self._ROW] = row
        view[self._THREAD] = threading.get_ident()
        view[self._NATIVE] = threading.get_native_id()
        view[self._AT] = self._MAKING

    def made(self) -> None:
        """Note that the reader is doing neither."""
        self._view[self._AT] = self._NEITHER

    def beat(self) -> None:
        """Note that another thread of the process is running too."""
        self._view[self._BEATS] += 1

    def beats(self) -> int:
        """How often `beat` was called."""
        return self._view[self._BEATS]

    def at(self) -> Making | Reading | None:
        """The current note, possibly another process's."""
        view = self._view
        at, thread, native, row, number, first, rows, length, _ = view
        if at == self._MAKING:
            return Making(row, thread, native, number)
        if at != self._READING:
            return None
        begin = 8 * self._PATH
        path = os.fsdecode(self._memory[begin : begin + min(max(length, 0), _PATH_BYTES)])
        return Reading(path, first, rows, thread)

    def _set_reading(self, path: bytes, first: int, rows: int) -> None:
        view, begin = self._view, 8 * self._PATH
        view[self._AT] = self._NEITHER
        view[self._THREAD] = threading.get_ident()
        view[self._FIRST], view[self._ROWS], view[self._LENGTH] = first, rows, len(path)
        self._memory[begin : begin + len(path)] = path
        view[self._AT] = self._READING


def _mapped(path: Path, size: int) -> mmap.mmap:
    """A file mapped into memory, at least `size` bytes long."""
    try:
        handle = open_private(path, os.O_RDWR)
        try:
            size = max(size, os.fstat(handle).st_size // 8 * 8)
            # Without allocated blocks, a write to the mapping on a full disk would raise SIGBUS.
            os.posix_fallocate(handle, 0, size)
            return mmap.mmap(handle, size)
        finally:
            os.close(handle)
    except OSError as error:
        refused = error.errno in {errno.ENOMEM, errno.EPERM, errno.EMFILE, errno.ENFILE}
        mend = (
            "batchrun doctor says what this machine lacks" if refused else "make room on the disk"
        )
        raise OutputError(
            f"{path} can't be made: {error.strerror or error}",
            hint=f"{mend}; then: batchrun resume",
        ) from error
