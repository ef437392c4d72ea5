"""One worker per job, by a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from jobs.errors import LeaseHeld, OutputError
from jobs.files import open_private

# struct flock over the whole file. Locks of the open file description, not of the process: closing
# another handle of the file drops nothing, and asking who holds one takes nothing.
_FLOCK = "hhqqi0q"
CANCEL = "cancel"  # is there once someone asked the worker of this lease's life to give up


class Lease:
    """Holds a lock on a job's `lock` file that ends with the process, however it ends.

    A child that inherits `fileno()` holds it too: it ends with the last of them.

    Args:
        folder: The job's folder.

    Raises:
        LeaseHeld: On entry, when another process has it; the message names that process.
        OutputError: On entry, when the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._handle: int | None = None

    def fileno(self) -> int:
        """The lock's handle, while it is held."""
        assert self._handle is not None
        return self._handle

    def __enter__(self) -> Lease:
        handle = -1
        try:
            handle = open_private(self._path, os.O_RDWR)
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, write_lock())
            # One write of one width: whoever reads meanwhile sees a whole number.
            os.pwrite(handle, f"{os.getpid():<20}\n".encode(), 0)
            with suppress(FileNotFoundError):  # it was meant for an earlier worker
                self._path.with_name(CANCEL).unlink()
        except BlockingIOError:
            pid = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            raise LeaseHeld(
                f"the job {self._path.parent.name} is being run by process {pid or 'unknown'}",
                hint=f"wait for it, or stop it with: kill {pid}" if pid else "wait for it",
            ) from None
        except OSError as error:
            if handle >= 0:
                os.close(handle)
            raise OutputError(
                f"{self._path} can't be written: {error.strerror or error}",
                hint=f"make room, or check the permissions: ls -ld '{self._path.parent}'",
            ) from error
        self._handle = handle
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def held_by(folder: Path) -> int | None:
    """The process that runs the job now, or None. Takes and changes nothing."""
    try:
        handle = os.open(f"{folder}/lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if not _taken(handle):
            return None
        return int(os.pread(handle, 32, 0).decode().strip() or 0)
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a living process has locked the file. Takes and changes nothing."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return _taken(handle)
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    found = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, write_lock())
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


def write_lock() -> bytes:
    """A lock of a whole file, for `F_OFD_SETLK`."""
    return struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
