"""Reads objects."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from batchrun.objectstore.client import asked, opened
from batchrun.objectstore.paths import ObjectPath, StoreError

_AHEAD, _MOST_AHEAD = 1 << 18, 1 << 23  # bytes that are read with those asked for
_BLOCKS, _KEPT = 64, 64 << 20  # blocks that are kept, and about how many bytes
_COPIED = 1 << 23


@dataclass(eq=False, slots=True)
class _Block:
    """Bytes of an object.

    Args:
        begin: Where they are.
        data: The bytes.
        ahead: At least so many were asked for.
    """

    begin: int
    data: bytes
    ahead: int

    @property
    def end(self) -> int:
        """Where the next ones are."""
        return self.begin + len(self.data)


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
        self._blocks: list[_Block] = []  # the latest first
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
            block = self._block(len(into) - done)
            within = self._at - block.begin
            part = memoryview(block.data)[within : within + len(into) - done]
            into[done : done + len(part)] = part
            self._at, done = self._at + len(part), done + len(part)
        return done

    def _block(self, wanted: int) -> _Block:
        """The block that the next byte is in."""
        for block in self._blocks:
            if block.begin <= self._at < block.end:
                break
        else:
            # Who read to the end of a block is likely to read on: a request takes long, whatever
            # its size. A Parquet file is read in as many places at once as it has columns.
            before = next((block for block in self._blocks if block.end == self._at), None)
            most = min(_MOST_AHEAD, _KEPT // (len(self._blocks) + 1))
            ahead = _AHEAD if before is None else min(2 * before.ahead, most)
            size = min(max(wanted, ahead), self._stat.size - self._at)
            data = asked(self._path, partial(self._fetched, size))
            block = _Block(self._at, data, ahead)
            if before is not None:
                self._blocks.remove(before)
        if self._blocks[:1] != [block]:
            self._blocks = [block, *(other for other in self._blocks if other is not block)]
            del self._blocks[_BLOCKS:]
        return block

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
        while data := source.read(_COPIED):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
