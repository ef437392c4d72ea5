"""Reads objects."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path
from typing import Any

from batchrun.objectstore.client import asked, opened
from batchrun.objectstore.paths import ObjectPath, StoreError

_AHEAD, _MOST_AHEAD = 1 << 18, 1 << 23  # bytes that are read with those asked for
_BLOCK = 1 << 23


class ObjectFile(io.RawIOBase):
    """An object's bytes, seekable. Waits for a store that falls silent, and asks again.

    Args:
        path: The object.

    Raises:
        FileNotFoundError: There is no such object.
        StoreError: The store does not answer, or the object was replaced while it was read.
    """

    def __init__(self, path: ObjectPath) -> None:
        super().__init__()
        self._path, self._at = path, 0
        self._begin, self._block, self._ahead = 0, memoryview(b""), _AHEAD
        self._file, self._stat = asked(path, lambda: opened(path))

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def size(self) -> int:
        """In bytes."""
        return self._stat.size

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read from there on."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stat.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, whole unless the object ends."""
        into, done = memoryview(buffer).cast("B"), 0
        while done < len(into) and self._at < self._stat.size:
            within = self._at - self._begin
            if not 0 <= within < len(self._block):
                # Reading on from there is likely to go on: a request takes long, whatever its size.
                goes_on = within == len(self._block) > 0
                self._ahead = min(2 * self._ahead, _MOST_AHEAD) if goes_on else _AHEAD
                size = min(max(len(into) - done, self._ahead), self._stat.size - self._at)
                self._block = memoryview(asked(self._path, partial(self._fetched, size)))
                self._begin, within = self._at, 0
            part = self._block[within : within + len(into) - done]
            into[done : done + len(part)] = part
            self._at, done = self._at + len(part), done + len(part)
        return done

    def _fetched(self, size: int) -> bytes:
        """That many bytes from where it is."""
        if self._file is None:
            file, now = opened(self._path)
            if now != self._stat:
                raise StoreError(f"{self._path} was replaced while it was read")
            self._file = file
        try:
            data: bytes = self._file.read_at(size, self._at)
        except BaseException:
            self._file = None
            raise
        if len(data) < size:
            self._file = None
            raise OSError(f"{self._path} ended {size - len(data):,} bytes early")
        return data


def download(path: ObjectPath, to: Path) -> None:
    """Write an object's bytes to a file, which must be new.

    Raises:
        OSError: The file can't be written.
        StoreError: The store does not answer, or the object was replaced in the meantime.
    """
    with ObjectFile(path) as source, to.open("xb") as file:
        while data := source.read(_BLOCK):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
