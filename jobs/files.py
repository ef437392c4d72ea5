"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from jobs.errors import OutputError


def fsync_directory(path: Path) -> None:
    """Make names created, renamed or removed in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing; durable on return."""
    missing = [p for p in (path, *path.parents) if not os.path.exists(p)]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        try:
            fsync_directory(folder.parent)
        except OSError:  # the next one would believe that its name is on disk
            with suppress(OSError):
                folder.rmdir()
            raise


def remove(path: Path) -> None:
    """Remove a file if it is there; durable on return."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    fsync_directory(path.parent)


def free_bytes(path: Path) -> int:
    """Bytes that can still be written where `path` is, or would be."""
    path = path.absolute()
    there = next(p for p in (path, *path.parents) if os.path.exists(p))
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize


def check_room(path: Path, needed: int) -> None:
    """Refuse to begin what won't fit.

    Args:
        path: A file or folder, there or to be.
        needed: Bytes.

    Raises:
        OutputError: The disk has less.
    """
    free = free_bytes(path)
    if free < needed:
        raise OutputError(
            f"the disk of {path} has {free / 2**20:,.1f} MiB left and "
            f"{needed / 2**20:,.1f} MiB are needed",
            hint=f"make room (df -h '{path.parent}'), or choose a place on another disk",
        )


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an error.

    The data are on disk before the name is: temporary file in the same directory, fsync, rename,
    fsync of the directory (Pillai et al., OSDI 2014). An error leaves `path` as it was and nothing
    beside it; what a killed process left beside it is removed by the next one. Without `durable`
    nothing is synced: for what the next seconds make worthless.

    Raises:
        OSError: The file can't be written; a failed fsync is never tried again.
    """
    _remove_abandoned(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with suppress(OSError):  # a file system without locks: then none is ever abandoned
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fchmod(handle, 0o666 & ~current_umask())  # mkstemp is for secrets
            if durable:
                os.fsync(handle)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files whose writer is dead: its lock on them died with it."""
    for name in glob.glob(f".{glob.escape(path.name)}.*.tmp", root_dir=path.parent):
        with suppress(OSError), (path.parent / name).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (path.parent / name).unlink()


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write a JSON file atomically, indented for people."""
    with atomic_write(path, durable=durable) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
