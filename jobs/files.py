"""Files that appear whole or not at all, and who may read them.

A job's files are private to its user from the moment they are created. A folder with the setgid bit
is shared with its group on purpose: files created in it are as open to the group as the folder.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from batchrun import platforms
from batchrun.jobs.checksums import sealed, unsealed
from batchrun.jobs.errors import OutputError

_ACCESS_LIST = "system.posix_acl_access"
_SPARE_BYTES = 8 << 20  # kept free on a disk, so that a run that fills it can still say so
# Errors of file systems without hard links.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

# Errors of file systems that can't sync a single directory.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.EOPNOTSUPP}

Identity = list[int]  # inode, size, modification time; a list, for JSON
MayReplace = Callable[[Identity], bool]


def identity_of(stat: os.stat_result) -> Identity:
    """What distinguishes a file from any other that takes its place."""
    # Not the device: its number may change at a reboot.
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def fsync_directory(path: Path) -> None:
    """Make created, renamed or removed names in a directory durable, as far as Windows lets us."""
    if platforms.WINDOWS:  # it has no call for that
        return
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
    """Make a whole file system durable, names included: see syncfs(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(handle):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def current_umask() -> int:
    """The process's umask, from /proc: reading it by setting it affects other threads' files."""
    with suppress(OSError, StopIteration), open("/proc/self/status", "rb") as status:
        return next(int(line[6:], 8) for line in status if line.startswith(b"Umask:"))
    umask = os.umask(0o077)  # a container may lack /proc
    os.umask(umask)
    return umask


def private_mode(folder: Path) -> int:
    """The mode for a new folder in this one; `& 0o666` for a file. The umask still applies."""
    mode = os.stat(folder).st_mode
    return 0o700 | (mode & 0o2070 if mode & stat.S_ISGID else 0)


def open_private(path: str | Path, flags: int) -> int:
    """`os.open` that makes a file it creates private; also an `opener` for `open`."""
    mode = private_mode(Path(path).parent) & 0o666
    return os.open(path, flags | os.O_CREAT | platforms.OPEN_FLAGS, mode)


def close_to_others(folder: Path) -> None:
    """Make an existing folder private, unless it is shared, a link, or not ours."""
    if platforms.WINDOWS:  # a home folder is private there, by lists of who may do what
        return
    found = os.lstat(folder)
    mode = stat.S_IMODE(found.st_mode)
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if ours and mode & 0o077 and not mode & stat.S_ISGID:
        with suppress(OSError):  # a read-only disk
            folder.chmod(mode & 0o700)


def make_folders(path: Path) -> None:
    """Make a folder and its missing parents; private, and durable on return."""
    missing = [p for p in (path, *path.parents) if not os.path.exists(p)]
    for folder in reversed(missing):
        folder.mkdir(private_mode(folder.parent), exist_ok=True)
        try:
            fsync_directory(folder.parent)
        except OSError:  # the next call would take its name to be on disk
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
    """A disk, as it is now.

    Args:
        path: A folder on it.
        name: Its device number, which identifies it.
        size: In bytes.
        free: Bytes that can still be written.
    """

    path: Path
    name: int
    size: int
    free: int


def disk_of(path: Path) -> Disk:
    """The disk that a path is on, or would be on."""
    path = path.absolute()
    there = next(p for p in (path, *path.parents) if os.path.exists(p))
    return Disk(there, os.stat(there).st_dev, *platforms.room(there))


def check_room(*needs: tuple[Disk, int]) -> None:
    """Refuse what won't fit, while there is still room to say so.

    Args:
        needs: Disks, and the bytes that something will take on each. In addition 8 MiB of a disk
            stay free, or a sixteenth of a small one.

    Raises:
        OutputError: A disk has less free space.
    """
    wanted: dict[int, int] = {}
    for disk, needed in needs:
        spare = min(_SPARE_BYTES, disk.size // 16)
        wanted[disk.name] = wanted.get(disk.name, spare) + needed
        if disk.free < wanted[disk.name]:
            raise OutputError(
                f"the disk of {disk.path} has {disk.free / 2**20:,.1f} MiB left, but "
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

    The data reach the disk before the name: temporary file in the same directory, fsync, rename,
    fsync of the directory (Pillai et al., OSDI 2014). An error leaves `path` as it was and nothing
    beside it; the next write removes what a killed process left beside it.

    Nobody else may read it before it is whole. Then it is as open as the file it replaces, with
    its owner, group, access list and attributes where possible; a new file follows the umask.

    Args:
        path: The file.
        durable: If false, nothing is synced: for data that are soon worthless.
        may_replace: Given the finished file's identity, says whether it may replace what is there.
            If not, it takes the name only if the name is free, atomically.
        private: The file stays private to its user, whatever was there.

    Raises:
        FileExistsError: The name is taken, and its file may not be replaced.
        OSError: The file can't be written; a failed fsync is never retried.
    """
    remove_abandoned(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with suppress(OSError):  # a file system without locks: then none is ever abandoned
                platforms.flock(handle, wait=False)
            yield file
            file.flush()
            _open_up(handle, path, private=private)
            if durable:
                os.fsync(handle)
            # Still locked, so nobody considers it abandoned.
            replaces = may_replace(identity_of(os.fstat(handle)))
            if platforms.WINDOWS:  # it renames no open file
                file.close()
            if replaces:
                temporary.replace(path)
            else:
                _take_name(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def _open_up(handle: int, path: Path, *, private: bool) -> None:
    """Give a finished file, private until now, its final mode."""
    if platforms.WINDOWS:
        return
    mode = 0o666 & ~current_umask()
    if private:
        mode &= private_mode(path.parent)
    else:
        with suppress(FileNotFoundError):
            mode = _as_open_as(handle, path)
    os.fchmod(handle, mode)


def _as_open_as(handle: int, path: Path) -> int:
    """Copy the owner, group, access list and attributes of `path` to a file, where possible.

    Returns:
        The mode the file may have: that of `path`, less what the group had beyond everybody if
        the group or the access list could not be copied.
    """
    there = os.stat(path)
    mode = stat.S_IMODE(there.st_mode) & 0o777
    wide = mode & 0o707 | (mode & 0o007) << 3  # the group gets no more than everybody
    keeps_group = True
    for owner, group in ((-1, there.st_gid), (there.st_uid, -1)):
        try:
            if (owner, group) != (-1, os.fstat(handle).st_gid):
                os.fchown(handle, owner, group)
        except OSError:  # only root gives files away; others, only to their own groups
            keeps_group = keeps_group and group < 0
    with suppress(OSError):  # a file system without attributes
        for name in os.listxattr(path) if platforms.LINUX else ():
            if name.startswith("user.") or name == _ACCESS_LIST:
                try:
                    os.setxattr(handle, name, os.getxattr(path, name))
                except OSError:
                    keeps_group = keeps_group and name != _ACCESS_LIST
    return mode if keeps_group else mode & wide


def _take_name(temporary: Path, path: Path) -> None:
    """Give a file a free name; a link fails if the name is taken, a rename does not."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        path.touch(0o600, exist_ok=False)  # claims the name; replacing an empty file loses nothing
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink()
            raise
    else:
        temporary.unlink()


def remove_abandoned(path: Path) -> None:
    """Remove a file's temporary files whose writers are dead: their locks died with them."""
    # As many characters as `mkstemp` draws: `.out.old.tmp` is a user's own file.
    remove_unlocked(path.parent, f".{glob.escape(path.name)}.????????.tmp")


def remove_unlocked(folder: Path, pattern: str) -> None:
    """Remove the files matching the pattern that no living process has locked."""
    for name in glob.glob(pattern, root_dir=folder):
        with suppress(OSError), (folder / name).open("rb") as file:
            platforms.flock(file, wait=False)
            (folder / name).unlink()


def write_json(path: Path, value: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write a JSON object atomically, indented, with a checksum; the file is private."""
    text = json.dumps(sealed(value), indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path, durable=durable, private=True) as file:
        # File names may hold lone surrogates; Python's escape for them is valid JSON.
        file.write(text.encode(errors="backslashreplace"))


def read_json(path: Path | str) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        OSError: The file can't be read.
        ValueError: It is damaged.
    """
    with open(path, "rb", buffering=0) as file:  # called for thousands of jobs: be quick
        return unsealed(file.read())
