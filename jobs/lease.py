"""One worker per job, by a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from batchrun.jobs.errors import LOCAL_DISK, LeaseHeld, OutputError, no_locks
from batchrun.jobs.files import open_private
from batchrun.jobs.holders import FLOCK, holders, process, write_lock

LOCK = "lock"  # in a job's folder
CANCEL = "cancel"  # is there once someone asked the worker of this lease's life to give up
_WIDTH = 256  # bytes of a note


class Lease:
    """Holds a lock on a job's `lock` file that ends with the process, however it ends.

    A child that inherits `fileno()` holds it too: it ends with the last of them.

    Args:
        folder: The job's folder.
        inherited: The handle of a lease on it that this process got from the one that started it.

    Raises:
        LeaseHeld: On entry, when another process has it; the message names that process.
        OutputError: On entry, when the folder can't be written.
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
        """Note that a child has it from now on."""
        os.pwrite(self.fileno(), _Note.of(pid).line(), 0)

    def __enter__(self) -> Lease:
        handle = -1
        try:
            if self._inherited is not None and _is_file(self._inherited, self._path):
                handle = self._inherited
            else:
                handle = open_private(self._path, os.O_RDWR)
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, write_lock())
            # One write of one width: whoever reads meanwhile sees a whole note.
            os.pwrite(handle, _Note.of(os.getpid()).line(), 0)
            if handle != self._inherited:
                with suppress(FileNotFoundError):  # it was meant for an earlier worker
                    self._path.with_name(CANCEL).unlink()
        except BlockingIOError:
            os.close(handle)
            job = self._path.parent.name
            raise LeaseHeld(
                f"the job {job} is being run by {holder(self._path.parent)}",
                hint=f"batchrun watch {job}, or batchrun cancel {job}",
            ) from None
        except OSError as error:
            if handle >= 0:
                os.close(handle)
            if handle >= 0 and no_locks(error):
                raise OutputError(
                    f"{self._path} can't be locked: {error.strerror}; its file system has no locks",
                    hint=LOCAL_DISK,
                ) from error
            raise OutputError(
                f"{self._path} can't be written: {error.strerror or error}",
                hint=f"make room, or check the permissions: ls -ld '{self._path.parent}'",
            ) from error
        self._handle = handle
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@dataclass(frozen=True)
class _Note:
    """Who took a lease. It is for people to read, and never says whom to signal.

    Args:
        pid: The process.
        started: When, in clock ticks after the machine's start.
        host: The machine's name.
        boot: The machine's life since it was started.
        space: The namespace in which the process has its number: a container has its own.
    """

    pid: int = 0
    started: int = 0
    host: str = ""
    boot: str = ""
    space: int = 0

    @classmethod
    def of(cls, pid: int) -> _Note:
        """A process of this machine."""
        found = process(pid)
        return cls(pid, found.started if found else 0, platform.node()[:64], *_here())

    @classmethod
    def read(cls, handle: int) -> _Note:
        """What a lock's file says, which may be anything."""
        try:
            found = json.loads(os.pread(handle, _WIDTH, 0))
            note = cls(**found) if isinstance(found, dict) else cls()
        except (OSError, ValueError, TypeError):
            return cls()
        whole = all(type(value) is type(getattr(cls(), name)) for name, value in vars(note).items())
        return note if whole and note.pid > 1 else cls()

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode()[: _WIDTH - 1].ljust(_WIDTH - 1) + b"\n"


def held_by(folder: Path) -> int | None:
    """The process that says it runs the job now, 0 where it can't be told, or None.

    Takes and changes nothing. The number is for people: it is no target of a signal.
    """
    note = _held(folder)
    return None if note is None else note.pid


def holder(folder: Path) -> str:
    """Who has the job, in words: of this machine as the kernel tells, of others as they noted."""
    found = holders(folder / LOCK)
    if found:
        return f"process {found[0].pid}"
    note = _held(folder) or _Note()
    boot, space = _here()
    if not note.pid:
        return "a process that can't be seen from here"
    if note.boot != boot:
        return f"process {note.pid} on the machine {note.host}"
    if note.space != space:
        return f"process {note.pid} of another container, {note.host}, on this machine"
    return f"process {note.pid}"


def is_locked(path: Path) -> bool:
    """Whether a living process has locked the file. Takes and changes nothing."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return _taken(handle)
    finally:
        os.close(handle)


def _held(folder: Path) -> _Note | None:
    """What is noted of the holder of a lease that is held."""
    try:
        handle = os.open(f"{folder}/{LOCK}", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _Note.read(handle) if _taken(handle) else None
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    found = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, write_lock())
    return bool(struct.unpack(FLOCK, found)[0] != fcntl.F_UNLCK)


def _is_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _here() -> tuple[str, int]:
    """This machine's life and this process's namespace of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return "", 0
