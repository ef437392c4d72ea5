"""What a job needs from the place where its output is: a file system, or an object store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO, cast

from batchrun import platforms
from batchrun.jobs.errors import OutputError, refused
from batchrun.jobs.files import (
    Disk,
    Identity,
    MayReplace,
    atomic_write,
    disk_of,
    identity_of,
    remove_abandoned,
    remove_unlocked,
)
from batchrun.objectstore.client import beneath
from batchrun.objectstore.files import ObjectFile
from batchrun.objectstore.paths import Location, ObjectPath
from batchrun.objectstore.upload import probe, upload

_SAMPLES, _SAMPLE = 5, 1 << 16


class LocalOutputs:
    """Outputs on this machine."""

    def check(self, path: Path, *, overwrite: bool) -> None:
        """See `OutputStore`."""
        # `os.path`, because pathlib raises if a folder on the way may not be entered.
        if os.path.isdir(path):
            raise OutputError(f"{path} is a folder", hint=f"--output '{path / 'output.parquet'}'")
        if os.path.lexists(path):
            if os.path.exists(path) and not os.path.isfile(path):
                raise OutputError(f"{path} is not a regular file", hint="choose another --output")
            if not overwrite:
                raise OutputError(
                    f"{path} already exists", hint="--overwrite to replace it, or another --output"
                )
        parent = path.absolute().parent
        if not os.path.exists(parent):
            raise OutputError(f"{path}: there is no folder {parent}", hint=f"mkdir -p '{parent}'")
        advice = f"choose another --output, or see: ls -ld '{parent}'"
        with refused(OutputError, f"{path} can't be written", advice):
            tempfile.NamedTemporaryFile(dir=parent, prefix=f".{path.name}.", suffix=".tmp").close()

    def write(
        self, path: Path, *, may_replace: MayReplace, private: bool
    ) -> AbstractContextManager[IO[bytes]]:
        """See `atomic_write`."""
        return atomic_write(path, may_replace=may_replace, private=private)

    def disk(self, path: Path) -> Disk:
        """The disk that a file is on, or will be on."""
        return disk_of(path)

    def sweep(self, path: Path) -> None:
        """See `OutputStore`."""
        remove_abandoned(path)

    def identity(self, path: Path) -> Identity | None:
        """See `OutputStore`."""
        try:
            return identity_of(os.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def places(self, path: Path) -> set[str | tuple[object, ...]]:
        """Its path without links, its inode, and its name with its folder's inode."""
        real = os.path.realpath(path)
        found: set[str | tuple[object, ...]] = {real}
        for where, name in ((real, ()), (os.path.dirname(real), (os.path.basename(real),))):
            try:
                stat = os.stat(where)
            except OSError:  # it doesn't exist, or may not be inspected
                continue
            found.add((stat.st_dev, stat.st_ino, *name))
        return found


class ObjectOutputs:
    """Outputs in object stores: written to a file here, then uploaded whole.

    No store's client can make an object only if its name is free: one that somebody else makes
    during the upload is replaced.
    """

    def check(self, path: ObjectPath, *, overwrite: bool) -> None:
        """See `OutputStore`."""
        advice = "choose another --output"
        with refused(OutputError, f"{path} can't be written", advice):
            with suppress(FileNotFoundError):
                if beneath(path) is not None:
                    raise OutputError(f"{path} is a folder", f"--output '{path}/output.parquet'")
                if not overwrite:
                    raise OutputError(
                        f"{path} already exists", f"--overwrite to replace it, or {advice}"
                    )
            probe(path)

    @contextmanager
    def write(
        self, path: ObjectPath, *, may_replace: MayReplace, private: bool
    ) -> Iterator[IO[bytes]]:
        """See `OutputStore`; who may read the object is for its bucket to say."""
        self.sweep(path)
        with tempfile.NamedTemporaryFile(
            dir=_staging(), prefix=_upload(path), suffix=".tmp", buffering=1 << 20
        ) as file:
            platforms.flock(file.fileno(), wait=False)  # else `sweep` removes it
            made = cast(IO[bytes], file)
            yield made
            made.flush()
            identity = _identity(made, os.fstat(made.fileno()).st_size)
            if not may_replace(identity) and self.identity(path) is not None:
                raise FileExistsError(f"{path} exists")
            upload(Path(file.name), path)

    def disk(self, path: ObjectPath) -> Disk:
        """The disk of the file that is uploaded."""
        return disk_of(_staging())

    def sweep(self, path: ObjectPath) -> None:
        """See `OutputStore`: nothing is beside it, but here."""
        remove_unlocked(_staging(), f"{_upload(path)}????????.tmp")

    def identity(self, path: ObjectPath) -> Identity | None:
        """See `OutputStore`: by size and samples of the content, which the file here has too."""
        try:
            with ObjectFile(path) as file:
                return _identity(file, file.size())
        except FileNotFoundError:
            return None

    def places(self, path: ObjectPath) -> set[str | tuple[object, ...]]:
        """Its one name."""
        return {path.identity}


class OutputStore:
    """Files that appear whole or not at all: on this machine, or objects in a store.

    Only the store interprets paths and URLs.
    """

    def __init__(self) -> None:
        self._local, self._objects = LocalOutputs(), ObjectOutputs()

    def check(self, path: Location, *, overwrite: bool) -> None:
        """Prove that a file can be written there, by writing one beside it and removing it.

        Raises:
            OutputError: It can't, or it exists and may not be replaced.
        """
        if isinstance(path, ObjectPath):
            self._objects.check(path, overwrite=overwrite)
        else:
            self._local.check(path, overwrite=overwrite)

    def write(
        self, path: Location, *, may_replace: MayReplace, private: bool
    ) -> AbstractContextManager[IO[bytes]]:
        """A binary file that takes its name when the block ends without an error.

        Args:
            path: The file.
            may_replace: Given the finished file's identity, says whether it may replace what is
                there.
            private: Nobody else may ever read it.

        Raises:
            FileExistsError: The name is taken, and its file may not be replaced.
            OSError: It can't be written.
        """
        if isinstance(path, ObjectPath):
            return self._objects.write(path, may_replace=may_replace, private=private)
        return self._local.write(path, may_replace=may_replace, private=private)

    def disk(self, path: Location) -> Disk:
        """The disk that is written to."""
        if isinstance(path, ObjectPath):
            return self._objects.disk(path)
        return self._local.disk(path)

    def sweep(self, path: Location) -> None:
        """Remove what dead writers left beside a file."""
        if isinstance(path, ObjectPath):
            return self._objects.sweep(path)
        return self._local.sweep(path)

    def identity(self, path: Location) -> Identity | None:
        """What distinguishes a file from any other that takes its place; None if there is none."""
        if isinstance(path, ObjectPath):
            return self._objects.identity(path)
        return self._local.identity(path)

    def places(self, path: Location) -> set[str | tuple[object, ...]]:
        """What identifies a file: those with one of these in common are, or would be, one file."""
        if isinstance(path, ObjectPath):
            return self._objects.places(path)
        return self._local.places(path)


OUTPUTS = OutputStore()


def _identity(file: IO[bytes] | ObjectFile, size: int) -> Identity:
    """A file's size, and a digest of samples of it."""
    digest = blake2b(digest_size=7)  # which every JSON reader keeps exact
    for i in range(_SAMPLES):
        file.seek(max(size - _SAMPLE, 0) * i // (_SAMPLES - 1))
        digest.update(file.read(_SAMPLE) or b"")
    return [size, int.from_bytes(digest.digest(), "little")]


def _upload(path: ObjectPath) -> str:
    """How the name begins of a file that is uploaded there."""
    return f".upload-{blake2b(path.identity.encode(), digest_size=6).hexdigest()}-"


def _staging() -> Path:
    """Where files are until they are uploaded."""
    from batchrun.jobs.folder import home  # noqa: PLC0415 - it imports this

    return home() / "jobs"
