"""Which system this is, and what the others have in place of Linux's calls.

Jobs are computed on Linux alone. What reads a job, or plans one, works on macOS and Windows too: on
their own calls, or without what they lack. Nothing else knows one system from another.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from typing import IO, Any

from batchrun.errors import MachineError

if sys.platform != "win32":
    import fcntl
    import resource

NAME = {"linux": "Linux", "darwin": "macOS", "win32": "Windows"}.get(sys.platform, sys.platform)
LINUX, WINDOWS = sys.platform == "linux", sys.platform == "win32"
# For files opened by number: no child inherits them, and Windows leaves their bytes alone.
OPEN_FLAGS: int = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_WHERE = "in WSL 2 (wsl --install)" if WINDOWS else "on a Linux machine or in a Linux container"


def need_linux(what: str = "running a model") -> None:
    """Refuse what only Linux can do.

    Raises:
        MachineError: This is another system.
    """
    if not LINUX:
        raise MachineError(
            f"{what} needs Linux; this is {NAME}",
            hint=f"run batchrun {_WHERE}; plan, peek, export and report work here too",
        )


def flock(file: int | IO[Any], *, wait: bool = True) -> None:
    """Lock a file until it is closed, for this process alone.

    Args:
        file: The file.
        wait: Until it is free.

    Raises:
        OSError: It is locked by another process, or its file system has no locks.
    """
    if sys.platform == "win32":
        _lock_far_byte(file if isinstance(file, int) else file.fileno(), wait=wait)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


_AGAIN_S = 0.05  # between two tries to lock a file, on Windows
_FAR = (1 << 31) - 2  # a byte that no file of ours has: on Windows, locked bytes can't be read


def _lock_far_byte(handle: int, *, wait: bool) -> None:
    import msvcrt  # noqa: PLC0415 - which only Windows has

    at = os.lseek(handle, 0, os.SEEK_CUR)
    os.lseek(handle, _FAR, os.SEEK_SET)
    try:
        while not _locked(msvcrt, handle):
            if not wait:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            time.sleep(_AGAIN_S)
    finally:
        os.lseek(handle, at, os.SEEK_SET)


def _locked(system: Any, handle: int) -> bool:
    try:
        system.locking(handle, system.LK_NBLCK, 1)
    except PermissionError:  # somebody has it
        return False
    return True


def read_at(handle: int, size: int, at: int) -> bytes:
    """Up to `size` bytes of a file."""
    if hasattr(os, "pread"):
        return os.pread(handle, size, at)
    os.lseek(handle, at, os.SEEK_SET)
    return os.read(handle, size)


def write_at(handle: int, data: bytes, at: int) -> None:
    """Write into a file, in a single call."""
    if hasattr(os, "pwrite"):
        os.pwrite(handle, data, at)
    else:
        os.lseek(handle, at, os.SEEK_SET)
        os.write(handle, data)


def room(path: Any) -> tuple[int, int]:
    """The size of the disk that a path is on, and how many bytes can still be written there."""
    if hasattr(os, "statvfs"):
        found = os.statvfs(path)
        return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    usage = shutil.disk_usage(path)
    return usage.total, usage.free


def affinity() -> set[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_memory() -> tuple[int, int]:
    """Bytes of memory of this machine, and those available; all of it where that is not known."""
    if hasattr(os, "sysconf"):
        page, total = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else total
        return total * page, free * page
    return _windows_memory()


def _windows_memory() -> tuple[int, int]:
    """By GlobalMemoryStatusEx: see MEMORYSTATUSEX, two 32-bit numbers and seven 64-bit ones."""
    import ctypes  # noqa: PLC0415

    status = (ctypes.c_uint64 * 8)()
    status[0] = ctypes.sizeof(status)  # the length, and in its upper half the load in percent
    kernel: Any = ctypes
    kernel.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status[1], status[2]


def most_memory() -> int:
    """The most bytes of memory that this process has had, its parent's included; 0 if unknown."""
    if WINDOWS:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if LINUX else 1)
