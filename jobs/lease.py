"""One worker per job, by a lock that is released when its holder ends."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import NamedTuple

from batchrun import platforms
from batchrun.jobs.errors import LOCAL_DISK, LeaseHeld, OutputError, no_locks
from batchrun.jobs.files import open_private
from batchrun.jobs.holders import holders, is_locked, lock

LOCK = "lock"  # in a job's folder
CANCEL = "cancel"  # exists once someone has asked the lease's current holder to stop
_WIDTH = 256  # bytes of a note


class Lease:
    """Holds a lock on a job's `lock` file that ends with the process, however it ends.

    A child that inherits `fileno()` holds it too: the lock ends with the last of them.

    Args:
        folder: The job's folder.
        inherited: The handle of a lease that this process inherited from its parent.

    Raises:
        LeaseHeld: On entry, if another process has it; the message names that process.
        OutputError: On entry, if the folder can't be written.
    """

    def __init__(self, folder: Path, inherited: int | None = None) -> None:
        self._path = folder / LOCK
        self._inherited = inherited
        self._handle: int | None = None

    def fileno(self) -> int:
        """The lock's handle, while it is held."""
        assert self._handle is not None
        return self._handle

    def hand_over(self, pid: int) -> None:
        """Note that a child holds it from now on."""
        _note(self.fileno(), pid)

    def __enter__(self) -> Lease:
        handle, folder = -1, self._path.parent
        try:
            if self._inherited is not None and _is_file(self._inherited, self._path):
                handle = self._inherited
            else:
                handle = open_private(self._path, os.O_RDWR)
            lock(handle)
            _note(handle, os.getpid())
            if handle != self._inherited:
                (folder / CANCEL).unlink(missing_ok=True)  # it was meant for an earlier worker
        except OSError as error:
            if handle >= 0:
                os.close(handle)
            if isinstance(error, BlockingIOError):
                raise _held(folder) from None
            if handle >= 0 and no_locks(error):
                raise OutputError(
                    f"{self._path} can't be locked: {error.strerror}; its file system lacks locks",
                    hint=LOCAL_DISK,
                ) from error
            raise OutputError(
                f"{self._path} can't be written: {error.strerror or error}",
                hint=f"make room, or check the permissions: ls -ld '{folder}'",
            ) from error
        self._handle = handle
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class _Holder(NamedTuple):
    """A lease's holder, by its own note. For people to read; never a target for signals.

    Attributes:
        pid: The process.
        host: The machine's name.
        boot: The machine's boot id.
        space: The PID namespace of the process: a container has its own.
    """

    pid: int = 0
    host: str = ""
    boot: str = ""
    space: int = 0


def _note(handle: int, pid: int) -> None:
    """Note who holds a lease. A single write of fixed width: readers see a whole note."""
    note = json.dumps(_Holder(pid, platform.node()[:64], *_here())._asdict()).encode()
    platforms.write_at(handle, note[: _WIDTH - 1].ljust(_WIDTH - 1) + b"\n", 0)


def check_not_held(folder: Path) -> None:
    """Raise LeaseHeld if a process has the job's lease; takes and changes nothing."""
    if held_by(folder) is not None:
        raise _held(folder)


def _held(folder: Path) -> LeaseHeld:
    return LeaseHeld(
        f"the job {folder.name} is being run by {holder(folder)}",
        hint=f"batchrun watch {folder.name}, or batchrun cancel {folder.name}",
    )


def held_by(folder: Path) -> int | None:
    """The process noted as running the job now, 0 if it is unknown, None if nobody is.

    Takes and changes nothing. The PID is for people to read, never a target for signals.
    """
    found = _noted(folder)
    return None if found is None else found.pid


def holder(folder: Path) -> str:
    """Who holds the job, in words: on this machine by the kernel, on others by their note."""
    found = holders(folder / LOCK)
    if found:
        return f"process {found[0].pid}"
    noted = _noted(folder) or _Holder()
    boot, space = _here()
    if not noted.pid:
        return "a process that can't be seen from here"
    if noted.boot != boot:
        return f"process {noted.pid} on the machine {noted.host}"
    if noted.space != space:
        return f"process {noted.pid} of another container, {noted.host}, on this machine"
    return f"process {noted.pid}"


def _noted(folder: Path) -> _Holder | None:
    """The note of a held lease's holder, or None if it is not held; the note may be garbage."""
    try:
        handle = os.open(f"{folder}/{LOCK}", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if not is_locked(handle):
            return None
        noted = json.loads(platforms.read_at(handle, _WIDTH, 0))
        found = _Holder(*(noted[name] for name in _Holder._fields))
        return found if type(found.pid) is int and found.pid > 1 else _Holder()
    except (ValueError, TypeError, KeyError):
        return _Holder()
    finally:
        os.close(handle)


def _is_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _here() -> tuple[str, int]:
    """This machine's boot id and this process's PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return "", 0
