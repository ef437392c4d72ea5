"""What a disk may hold after the power went, by the rules that POSIX gives.

Data of a file are certain up to its last sync; names in a directory up to the directory's. What
came later may be there, or not, or in part: writes by sectors of 512 bytes in any order, names one
operation at a time in any order. A rename within a directory is whole or not at all.
(Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.)

After a sync of a file that failed, what it was to write never arrives, though reading shows it and
later syncs succeed; only pages that are written again do (Rebello et al., "Can Applications
Recover from fsync Failures?", ATC 2020).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.faults.shim import Kind, Operation

SECTOR = 512
PAGE = 4096


@dataclass(eq=False)
class File:
    """Content that is certain, and what was done since the last sync: (offset, data) or a size."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    cached: bytearray | None = None  # what reading shows, once a sync has failed

    def do(self, offset: int, data: bytes | None) -> None:
        """Write there, or, without data, make it that long."""
        if self.cached is not None:
            _do(self.cached, offset, data)
            if data is not None:  # whole pages reach the disk
                low, end = offset // PAGE * PAGE, offset + len(data)
                offset, data = low, bytes(self.cached[low : -(-end // PAGE) * PAGE])
        self.pending.append((offset, data))

    def fail(self) -> None:
        """A sync failed: what was pending is dropped, and looks as if it were there."""
        if self.cached is None:
            self.cached = self.content(None)
        self.pending.clear()

    def sync(self) -> None:
        self.durable = self.content(None)
        self.pending.clear()

    def content(self, draw: random.Random | None) -> bytearray:
        """The content with all that is pending, or with what `draw` lets through."""
        content = bytearray(self.durable)
        last = len(self.pending) if draw is None else draw.randint(0, len(self.pending))
        scattered = draw is not None and draw.random() < 0.5
        for i, (offset, data) in enumerate(self.pending):
            if i < last and (data is None or not scattered):
                _do(content, offset, data)
            elif data is None or draw is None:
                continue
            elif scattered or i == last:  # torn
                for low, high in _sectors(offset, len(data)):
                    if draw.random() < 0.5:
                        _do(content, low, data[low - offset : high - offset])
        return content


@dataclass(eq=False)
class Directory:
    """Names that are certain, the names now, and how they came to be: lists of changes."""

    durable: dict[str, File | Directory] = field(default_factory=dict)
    now: dict[str, File | Directory] = field(default_factory=dict)
    pending: list[dict[str, File | Directory | None]] = field(default_factory=list)

    def apply(self, change: dict[str, File | Directory | None]) -> None:
        _apply(self.now, change)
        self.pending.append(change)

    def fail(self) -> None:
        """A sync failed; names are in the file system's own log, which a later one writes."""

    def sync(self) -> None:
        self.durable = dict(self.now)
        self.pending.clear()

    def names(self, draw: random.Random | None) -> dict[str, File | Directory]:
        names = dict(self.durable)
        last = len(self.pending) if draw is None else draw.randint(0, len(self.pending))
        scattered = draw is not None and draw.random() < 0.5
        for i, change in enumerate(self.pending):
            if draw is None or (draw.random() < 0.5 if scattered else i < last):
                _apply(names, change)
        return names


class Disk:
    """The tree under one folder, as operation after operation takes place."""

    def __init__(self, root: str) -> None:
        self._root = PurePosixPath(root)
        self.tree = Directory()

    def apply(self, operation: Operation) -> None:
        """Let an operation take place."""
        kind, path = operation.kind, operation.path
        if kind == Kind.NOTE or path.endswith(" (deleted)"):
            return
        if kind == Kind.SYNC:
            node = self._node(path)
            node.fail() if operation.offset else node.sync()
        elif kind in (Kind.WRITE, Kind.TRUNCATE):
            file = self._node(path)
            assert isinstance(file, File)
            file.do(operation.offset, operation.data if kind == Kind.WRITE else None)
        elif kind in (Kind.CREATE, Kind.MKDIR):
            folder, name = self._place(path)
            folder.apply({name: File() if kind == Kind.CREATE else Directory()})
        elif kind in (Kind.UNLINK, Kind.RMDIR):
            folder, name = self._place(path)
            folder.apply({name: None})
        elif kind == Kind.LINK:
            (old, name), (new, other) = self._place(path), self._place(operation.other)
            new.apply({other: old.now[name]})
        elif kind == Kind.RENAME:
            (old, name), (new, other) = self._place(path), self._place(operation.other)
            assert old is new, "renames between directories are not modelled"
            old.apply({name: None, other: old.now[name]})

    def image(self, draw: random.Random | None, *, everything: bool = False) -> dict[str, bytes]:
        """Files by path as the power's loss may leave them; folders end in a slash.

        Args:
            draw: Decides what of the unsynced arrives; None for nothing of it.
            everything: All of it arrives.
        """
        found: dict[str, bytes] = {}

        def visit(folder: Directory, prefix: str) -> None:
            names = folder.now if everything else folder.names(draw) if draw else folder.durable
            for name, node in names.items():
                if isinstance(node, Directory):
                    found[f"{prefix}{name}/"] = b""
                    visit(node, f"{prefix}{name}/")
                elif everything:
                    found[prefix + name] = bytes(node.content(None))
                else:
                    found[prefix + name] = bytes(node.content(draw) if draw else node.durable)

        visit(self.tree, "")
        return found

    def _node(self, path: str) -> File | Directory:
        node: File | Directory = self.tree
        for part in PurePosixPath(path).relative_to(self._root).parts:
            assert isinstance(node, Directory)
            node = node.now[part]
        return node

    def _place(self, path: str) -> tuple[Directory, str]:
        folder = self._node(str(PurePosixPath(path).parent))
        assert isinstance(folder, Directory)
        return folder, PurePosixPath(path).name


def write_image(image: dict[str, bytes], root: Path) -> None:
    """Make the files of an image under an empty folder."""
    for name, data in image.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.write_bytes(data)


def _apply(names: dict[str, File | Directory], change: dict[str, File | Directory | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _do(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        content[offset:] = bytes(max(0, offset - len(content)))
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _sectors(offset: int, size: int) -> Iterable[tuple[int, int]]:
    low = offset
    while low < offset + size:
        high = min((low // SECTOR + 1) * SECTOR, offset + size)
        yield low, high
        low = high
