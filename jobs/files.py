"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from jobs.errors import OutputError

_SPARE_BYTES = 8 << 20  # of a disk, in which a run that ends for want of room can say so
# What file systems without hard links say when asked for one.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

MayReplace = Callable[[os.stat_result], bool]


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
    found = os.statvfs(_there(path))
    return found.f_bavail * found.f_frsize


def _there(path: Path) -> Path:
    """The path, or what there is of the folders above it."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if os.path.exists(p))


def check_room(*needs: tuple[Path, int]) -> None:
    """Refuse what won't fit, while there still is room to say so.

    Args:
        needs: Files or folders, there or to be, and the bytes that each will take. On top of them
            8 MiB of a disk stay free, or a sixteenth of a small one.

    Raises:
        OutputError: A disk has less.
    """
    wanted: dict[int, int] = {}
    for path, needed in needs:
        there = _there(path)
        device, disk = os.stat(there).st_dev, os.statvfs(there)
        spare = min(_SPARE_BYTES, disk.f_blocks * disk.f_frsize // 16)
        wanted[device] = wanted.get(device, spare) + needed
        free = free_bytes(path)
        if free < wanted[device]:
            raise OutputError(
                f"the disk of {path} has {free / 2**20:,.1f} MiB left and "
                f"{wanted[device] / 2**20:,.1f} MiB are needed",
                hint=f"make room there (df -h '{there}'), then: batchrun resume",
            )


@contextmanager
def atomic_write(
    path: Path, *, durable: bool = True, may_replace: MayReplace = lambda _: True
) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` when the block ends without an error.

    The data are on disk before the name is: temporary file in the same directory, fsync, rename,
    fsync of the directory (Pillai et al., OSDI 2014). An error leaves `path` as it was and nothing
    beside it; what a killed process left beside it is removed by the next one.

    Args:
        path: The file.
        durable: Without it nothing is synced: for what the next seconds make worthless.
        may_replace: Told the finished file's stat, says whether it may replace what is there. If
            not, it takes the name only if nothing has it, in one step.

    Raises:
        FileExistsError: The name is taken, and what has it may not be replaced.
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
            # Still locked: nobody takes it for abandoned.
            if may_replace(os.fstat(handle)):
                temporary.replace(path)
            else:
                _take_name(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def _take_name(temporary: Path, path: Path) -> None:
    """Give a file a name that nothing has; a link fails where something has it, a rename not."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        path.touch(exist_ok=False)  # holds the name; replacing an empty file loses nothing
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink()
            raise
    else:
        temporary.unlink()


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files whose writer is dead: its lock on them died with it."""
    # As many characters as `mkstemp` draws: `.out.old.tmp` is somebody's own file.
    for name in glob.glob(f".{glob.escape(path.name)}.????????.tmp", root_dir=path.parent):
        with suppress(OSError), (path.parent / name).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (path.parent / name).unlink()


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write a JSON file atomically, indented for people."""
    with atomic_write(path, durable=durable) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
