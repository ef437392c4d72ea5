"""The processes that hold a lock, according to the kernel, and signals to them alone.

A PID in a file may be stale, reused or forged, so it is never signalled. A process is signalled
only if the kernel says that it holds the lock now: `/proc/PID/fdinfo` lists the locks of each open
file (proc(5), since Linux 4.1). A pidfd is opened before that check, so that the PID can't come to
mean another process in between.
"""

from __future__ import annotations

import os
import signal
import stat
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from batchrun import platforms
from batchrun.cgroups import text_of

if platforms.LINUX:
    import fcntl

_LOCK = b"OFDLCK"
# struct flock over the whole file. The locks belong to the open file description, not the process:
# closing another handle of the file releases nothing, and a query takes nothing.
_FLOCK = "hhqqi0q"
_WHOLE = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0) if platforms.LINUX else b""


@dataclass(frozen=True)
class Process:
    """One process on this machine, while it lives.

    Args:
        pid: Its PID in this namespace.
        started: Clock ticks from boot to its start; with the PID, this is unique.
        parent: PID of the process that started it; another one if that has ended.
    """

    pid: int
    started: int
    parent: int

    def state(self) -> str | None:
        """The letter of proc(5); D if one of its threads waits uninterruptibly.

        None if it has ended.
        """
        found = _stat(self.pid)
        if found is None or int(found[19]) != self.started:
            return None
        return "D" if "D" in _threads(self.pid) else found[0]


def lock(file: int | IO[Any]) -> None:
    """Lock a whole file until all copies of its handle are closed; raises OSError."""
    if not platforms.LINUX:
        platforms.flock(file, wait=False)
        return
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _WHOLE)


def is_locked(handle: int) -> bool:
    """Whether a living process has locked a file. Takes and changes nothing.

    Only Linux can tell, and jobs run nowhere else.
    """
    if not platforms.LINUX:
        return False
    found = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, _WHOLE)
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


def process(pid: int) -> Process | None:
    """The process that has this PID now, if any."""
    found = _stat(pid)
    return None if found is None else Process(pid, int(found[19]), int(found[1]))


def holders(path: Path) -> list[Process]:
    """The processes that hold a lock, parents before their children.

    Leaves out processes on other machines and those that this user may not inspect.
    """
    try:
        wanted = path.stat()
        numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    held = [process(pid) for pid in numbers if _holds(pid, path, wanted)]
    found = {one.pid: one for one in held if one is not None}
    return sorted(found.values(), key=lambda one: (one.parent in found, one.started, one.pid))


def send(path: Path, to: Process, number: int) -> bool:
    """Send a signal to a process if it holds the lock; return whether it was sent.

    Raises:
        PermissionError: The process is another user's.
    """
    try:
        handle = os.pidfd_open(to.pid)
    except ProcessLookupError:
        return False
    except OSError:  # a kernel or a container without pidfds
        handle = -1
    try:
        # From here on the pidfd, unlike the PID, can't mean another process.
        if process(to.pid) != to or not _holds(to.pid, path, path.stat()):
            return False
        if handle < 0:
            os.kill(to.pid, number)
        else:
            signal.pidfd_send_signal(handle, number)
        return True
    except (ProcessLookupError, FileNotFoundError):
        return False
    finally:
        if handle >= 0:
            os.close(handle)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on; None if there is no such process."""
    fields = _fields(f"/proc/{pid}/stat")
    if not fields or (fields[0] in "ZX" and not _threads(pid)):
        return None
    return fields


def _threads(pid: int) -> str:
    """The states of a process's live threads. The first may have ended before the others."""
    found = [_fields(path) for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return "".join(fields[0] for fields in found if fields and fields[0] not in "ZX")


def _fields(path: str | Path) -> list[str]:
    return text_of(Path(path)).rpartition(")")[2].split()


def _holds(pid: int, path: Path, wanted: os.stat_result) -> bool:
    """Whether a process holds the lock on this very file."""
    with suppress(OSError):  # it has just ended, or is another user's
        folder = f"/proc/{pid}"
        if not os.listdir(f"{folder}/fd"):  # its first thread has ended
            tasks = [f"{folder}/task/{name}" for name in os.listdir(f"{folder}/task")]
            folder = next((task for task in tasks if os.listdir(f"{task}/fd")), folder)
        for name in os.listdir(f"{folder}/fd"):
            link = f"{folder}/fd/{name}"
            with suppress(OSError):
                # Stat only files with this name: others may be on a dead server.
                named = os.path.basename(os.readlink(link)).startswith(path.name)
                if not named or not os.path.samestat(os.stat(link), wanted):
                    continue
                if _kernel_tells():
                    if _LOCK in Path(f"{folder}/fdinfo/{name}").read_bytes():
                        return True
                elif os.lstat(link).st_mode & stat.S_IWUSR and _is_worker(pid, path.parent):
                    return True
    return False


def _is_worker(pid: int, folder: Path) -> bool:
    """Whether a process was started to work in a folder, or for whatever job comes."""
    words = {*Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")}
    return os.fsencode(folder) in words or (
        {b"batchrun", b"--parent"} < words and bool({b"work", b"run-job"} & words)
    )


@cache
def _kernel_tells() -> bool:
    """Whether fdinfo shows locks; some sandboxes' kernels (gVisor) have it without them."""
    try:
        with tempfile.TemporaryFile() as file:
            lock(file)
            return _LOCK in Path(f"/proc/self/fdinfo/{file.fileno()}").read_bytes()
    except OSError:
        return False
