"""What a job reads, and where that is. Does not load Arrow, which takes a while."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from glob import glob, has_magic
from pathlib import Path
from typing import IO, NamedTuple, Protocol, TypeVar, cast

from batchrun.jobs.errors import InputError
from batchrun.objectstore.client import beneath, matching, stat_object
from batchrun.objectstore.files import ObjectFile
from batchrun.objectstore.paths import Location, ObjectPath, location

T = TypeVar("T")

_AT_ONCE = 16  # requests: a store answers each of them late


@dataclass(frozen=True, slots=True)
class Part:
    """One input file as a source reads it.

    Args:
        path: Where it is.
        size: How many of its bytes belong to the input; None for all.
        partition: Columns from its folders' names (`lang=de`), the same in all its rows.
    """

    path: Location
    size: int | None = None
    partition: Mapping[str, int | str | None] = field(default_factory=dict)


class Noted(Protocol):
    """Told what is being read; see `ReaderNote.reading`."""

    def __call__(
        self, path: Location | None = None, first: int = -1, rows: int = 0
    ) -> AbstractContextManager[None]:
        """Say that these rows of a file are read; without numbers, its metadata."""


def unnoted(
    path: Location | None = None, first: int = -1, rows: int = 0
) -> AbstractContextManager[None]:
    """A `Noted` that does nothing."""
    return nullcontext()


class InputStat(NamedTuple):
    """A file as it is now.

    Args:
        size: In bytes.
        identity: Distinguishes it from any other that takes its place, and from earlier content.
    """

    size: int
    identity: tuple[int, ...]


class LocalInputs:
    """Inputs on this machine."""

    def open(self, path: Path, buffering: int = -1) -> IO[bytes]:
        """See `InputStore`."""
        return path.open("rb", buffering)

    def for_arrow(self, path: Path) -> Path:
        """The path, which is faster than a Python file."""
        return path

    def stat(self, path: Path) -> InputStat:
        """See `InputStore`."""
        found = os.stat(path)
        identity = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        return InputStat(found.st_size, identity)

    def expand(self, name: str) -> Iterator[tuple[Path, Iterator[Path] | None]]:
        """See `InputStore`."""
        where = Path(name).expanduser()
        matches = [str(where)]
        try:
            where.lstat()
        except (FileNotFoundError, NotADirectoryError):
            if not has_magic(name):
                raise _nothing_there(name, where) from None
            matches = glob(str(where), recursive=True)
        if not matches:
            raise InputError(f"no file matches {name}", hint="check the pattern and its quotes")
        for match in matches:
            path = Path(match)
            if os.path.isdir(path):
                yield path, _beneath(path)
                continue
            if not os.path.exists(path):
                raise InputError(f"{path} links to a file that does not exist", f"ls -l '{path}'")
            if not os.path.isfile(path):
                raise InputError(
                    f"{path} is not a regular file",
                    hint=f"pipe it in: batchrun submit - < '{path}'",
                )
            yield path, None


def _nothing_there(name: str, where: Path) -> InputError:
    parent = next((p for p in where.parents if os.path.isdir(p)), Path("/"))
    near = get_close_matches(where.name, os.listdir(parent), 1) if parent == where.parent else []
    meant = f"did you mean '{parent / near[0]}'?" if near else None
    hint = meant or f"ls '{parent}' shows what there is"
    return InputError(f"{name}: there is no such file or folder", hint=hint)


class ObjectInputs:
    """Inputs in object stores."""

    def open(self, path: ObjectPath, buffering: int = -1) -> IO[bytes]:
        """See `InputStore`."""
        file = ObjectFile(path)
        return cast(IO[bytes], io.BufferedReader(file) if buffering else file)

    def for_arrow(self, path: ObjectPath) -> IO[bytes]:
        """A file, which asks again where Arrow's own would give up."""
        return cast(IO[bytes], ObjectFile(path))

    def stat(self, path: ObjectPath) -> InputStat:
        """See `InputStore`."""
        size, tag = stat_object(path)
        return InputStat(size, (size, tag))

    def expand(self, path: ObjectPath) -> Iterator[tuple[ObjectPath, Iterator[ObjectPath] | None]]:
        """See `InputStore`."""
        try:
            found = [(path, beneath(path))]
        except FileNotFoundError:
            if not has_magic(path.url):
                raise InputError(
                    f"{path}: there is no such object or folder", hint="check its name"
                ) from None
            found = [
                (match, beneath(match) if is_folder else None)
                for match, is_folder in matching(path)
            ]
        if not found:
            raise InputError(f"no object matches {path}", hint="check the pattern")
        for match, inside in found:
            yield match, None if inside is None else (f for f in inside if _is_data(f, match))


class InputStore:
    """Where inputs are: on this machine, or objects in a store. Raises `OSError`.

    Only the store interprets paths and URLs.
    """

    def __init__(self) -> None:
        self._local, self._objects = LocalInputs(), ObjectInputs()

    def open(self, path: Location, buffering: int = -1) -> IO[bytes]:
        """The file's bytes, seekable; `buffering` as in Python's `open`, 0 or not."""
        if isinstance(path, ObjectPath):
            return self._objects.open(path, buffering)
        return self._local.open(path, buffering)

    def for_arrow(self, path: Location) -> Path | IO[bytes]:
        """What Arrow reads from."""
        if isinstance(path, ObjectPath):
            return self._objects.for_arrow(path)
        return self._local.for_arrow(path)

    def stat(self, path: Location) -> InputStat:
        """Its current size and identity."""
        if isinstance(path, ObjectPath):
            return self._objects.stat(path)
        return self._local.stat(path)

    def expand(self, name: str) -> Iterator[tuple[Location, Iterator[Location] | None]]:
        """What a path, URL or pattern stands for: files, and folders with the files beneath each.

        Leaves out hidden files in folders, and those whose names begin with `_`.

        Raises:
            InputError: It does not exist, or can't be read more than once.
        """
        where = location(name)
        if isinstance(where, ObjectPath):
            return self._objects.expand(where)
        return self._local.expand(str(where) if name.startswith("file:") else name)


INPUTS = InputStore()


def each(paths: Sequence[Location], work: Callable[[int], T]) -> list[T]:
    """Do something with each path's number, several at once if a store must answer."""
    numbers = range(len(paths))
    if not any(isinstance(path, ObjectPath) for path in paths):
        return [work(number) for number in numbers]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(work, numbers))


def _beneath(path: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename} can't be read: {error.strerror}", f"ls -ld '{error.filename}'"
        ) from error

    been: set[tuple[int, int]] = set()  # a link may lead back up
    for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        folders[:] = sorted(
            (name for name in folders if not name.startswith((".", "_"))),
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name),
        )
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in been:
            folders.clear()
            continue
        been.add((here.st_dev, here.st_ino))
        yield from (Path(folder, n) for n in sorted(names) if not n.startswith((".", "_")))


def _is_data(path: ObjectPath, folder: ObjectPath) -> bool:
    inside = path.parts[len(folder.parts) :]
    return not any(name.startswith((".", "_")) for name in inside)
