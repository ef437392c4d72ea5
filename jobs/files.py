"""Files that appear whole or not at all, and who may read them.

What is kept for a job is its user's alone from the moment it is made. A folder with the setgid bit
is shared with its group on purpose: what is made in it is as open to the group as the folder is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from batchrun.jobs.checksums import sealed, unsealed
from batchrun.jobs.errors import OutputError

_ACCESS_LIST = "system.posix_acl_access"
_SPARE_BYTES = 8 << 20  # of a disk, in which a run that ends for want of room can say so
# What file systems without hard links say when asked for one.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

# And those that can't sync a directory alone, when asked for it.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.EOPNOTSUPP}

Identity = list[int]  # inode, size, time of the last change: what JSON can hold
MayReplace = Callable[[Identity], bool]


def identity_of(stat: os.stat_result) -> Identity:
    """What tells a file from any other that takes its place."""
    # Not the device: its number may change when the machine starts again.
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def fsync_directory(path: Path) -> None:
    """Make names created, renamed or removed in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_SYNC:
                raise
            _sync_file_system(handle)
    finally:
        os.close(handle)


def _sync_file_system(handle: int) -> None:
    """Make all of a file system durable, names included: see syncfs(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(handle):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def current_umask() -> int:
    """The process's umask; setting it to read it closes other threads' files for a moment."""
    with suppress(OSError, StopIteration), open("/proc/self/status", "rb") as status:
        return next(int(line[6:], 8) for line in status if line.startswith(b"Umask:"))
    umask = os.umask(0o077)  # a container may come without /proc
    os.umask(umask)
    return umask


def private_mode(folder: Path) -> int:
    """The mode of a folder in this one, of a file with `& 0o666`; the umask still counts."""
    mode = os.stat(folder).st_mode
    return 0o700 | (mode & 0o2070 if mode & stat.S_ISGID else 0)


def open_private(path: str | Path, flags: int) -> int:
    """`os.open` that makes the file private if it makes it; also the `opener` of `open`."""
    mode = private_mode(Path(path).parent) & 0o666
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, mode)


def close_to_others(folder: Path) -> None:
    """Make a folder private that is there already, unless it is shared, a link, or not ours."""
    found = os.lstat(folder)
    mode = stat.S_IMODE(found.st_mode)
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if ours and mode & 0o077 and not mode & stat.S_ISGID:
        with suppress(OSError):  # a disk that can only be read
            folder.chmod(mode & 0o700)


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing; private, and durable on return."""
    missing = [p for p in (path, *path.parents) if not os.path.exists(p)]
    for folder in reversed(missing):
        folder.mkdir(private_mode(folder.parent), exist_ok=True)
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


class Disk(NamedTuple):
    """Where files lie, as it is now.

    Args:
        path: A folder of it.
        name: Tells it from others.
        size: In bytes.
        free: Bytes that can still be written.
    """

    path: Path
    name: int
    size: int
    free: int


def disk_of(path: Path) -> Disk:
    """The disk where a path is, or would be."""
    path = path.absolute()
    there = next(p for p in (path, *path.parents) if os.path.exists(p))
    found = os.statvfs(there)
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    return Disk(there, os.stat(there).st_dev, size, free)


def check_room(*needs: tuple[Disk, int]) -> None:
    """Refuse what won't fit, while there still is room to say so.

    Args:
        needs: Disks, and the bytes that something will take there. On top of them 8 MiB of a disk
            stay free, or a sixteenth of a small one.

    Raises:
        OutputError: A disk has less.
    """
    wanted: dict[int, int] = {}
    for disk, needed in needs:
        spare = min(_SPARE_BYTES, disk.size // 16)
        wanted[disk.name] = wanted.get(disk.name, spare) + needed
        if disk.free < wanted[disk.name]:
            raise OutputError(
                f"the disk of {disk.path} has {disk.free / 2**20:,.1f} MiB left and "
                f"{wanted[disk.name] / 2**20:,.1f} MiB are needed",
                hint=f"make room there (df -h '{disk.path}'), then: batchrun resume",
            )


@contextmanager
def atomic_write(
    path: Path,
    *,
    durable: bool = True,
    may_replace: MayReplace = lambda _: True,
    private: bool = False,
) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` when the block ends without an error.

    The data are on disk before the name is: temporary file in the same directory, fsync, rename,
    fsync of the directory (Pillai et al., OSDI 2014). An error leaves `path` as it was and nothing
    beside it; what a killed process left beside it is removed by the next one.

    Nobody else may read it before it is whole. Then it is as open as what it replaces, with owner,
    group, access list and attributes as far as they can be kept; a new one follows the umask.

    Args:
        path: The file.
        durable: Without it nothing is synced: for what the next seconds make worthless.
        may_replace: Told the finished file's identity, says whether it may replace what is there.
            If not, it takes the name only if nothing has it, in one step.
        private: It stays its user's alone, whatever was there.

    Raises:
        FileExistsError: The name is taken, and what has it may not be replaced.
        OSError: The file can't be written; a failed fsync is never tried again.
    """
    remove_abandoned(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with suppress(OSError):  # a file system without locks: then none is ever abandoned
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            _open_up(handle, path, private=private)
            if durable:
                os.fsync(handle)
            # Still locked: nobody takes it for abandoned.
            if may_replace(identity_of(os.fstat(handle))):
                temporary.replace(path)
            else:
                _take_name(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def _open_up(handle: int, path: Path, *, private: bool) -> None:
    """Give a finished file, its owner's alone until now, the mode that it is to have."""
    mode = 0o666 & ~current_umask()
    if private:
        mode &= private_mode(path.parent)
    else:
        with suppress(FileNotFoundError):
            mode = _as_open_as(handle, path)
    os.fchmod(handle, mode)


def _as_open_as(handle: int, path: Path) -> int:
    """Give a file what can be had of another one's owner, group, access list and attributes.

    Returns:
        The mode that it may have then: the other one's, without the group's part where that would
        be another group, or lack the list that takes from it.
    """
    there = os.stat(path)
    mode = stat.S_IMODE(there.st_mode) & 0o777
    wide = mode & 0o707 | (mode & 0o007) << 3  # where the group is as good as everybody
    keeps_group = True
    for owner, group in ((-1, there.st_gid), (there.st_uid, -1)):
        try:
            if (owner, group) != (-1, os.fstat(handle).st_gid):
                os.fchown(handle, owner, group)
        except OSError:  # only root gives files away, and to groups that one is in
            keeps_group = keeps_group and group < 0
    with suppress(OSError):  # a file system without attributes
        for name in os.listxattr(path):
            if name.startswith("user.") or name == _ACCESS_LIST:
                try:
                    os.setxattr(handle, name, os.getxattr(path, name))
                except OSError:
                    keeps_group = keeps_group and name != _ACCESS_LIST
    return mode if keeps_group else mode & wide


def _take_name(temporary: Path, path: Path) -> None:
    """Give a file a name that nothing has; a link fails where something has it, a rename not."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        path.touch(0o600, exist_ok=False)  # holds the name; replacing an empty file loses nothing
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink()
            raise
    else:
        temporary.unlink()


def remove_abandoned(path: Path) -> None:
    """Remove temporary files of a file whose writer is dead: its lock on them died with it."""
    # As many characters as `mkstemp` draws: `.out.old.tmp` is somebody's own file.
    remove_unlocked(path.parent, f".{glob.escape(path.name)}.????????.tmp")


def remove_unlocked(folder: Path, pattern: str) -> None:
    """Remove the files of such names that no living process has locked."""
    for name in glob.glob(pattern, root_dir=folder):
        with suppress(OSError), (folder / name).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / name).unlink()


def write_json(path: Path, value: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write a JSON object atomically, indented for people, with a checksum; private."""
    text = json.dumps(sealed(value), indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path, durable=durable, private=True) as file:
        # Names of files may hold halves of surrogate pairs, whose escape is JSON's too.
        file.write(text.encode(errors="backslashreplace"))


def read_json(path: Path | str) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        OSError: The file can't be read.
        ValueError: It is damaged.
    """
    with open(path, "rb", buffering=0) as file:  # of thousands of jobs: every call counts
        return unsealed(file.read())
