"""One worker per job, by a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from jobs.errors import LeaseHeld


class Lease:
    """Holds a job's lock file: `flock` ends with the process, however it ends.

    Args:
        folder: The job's folder.

    Raises:
        LeaseHeld: On entry, when another process has it; the message names that process.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._handle: int | None = None

    def __enter__(self) -> Lease:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            raise LeaseHeld(
                f"the job {self._path.parent.name} is being run by process {pid or 'unknown'}",
                hint=f"wait for it, or stop it with: kill {pid}" if pid else "wait for it",
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
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
        handle = os.open(folder / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # A shared lock conflicts with a worker's and not with another look.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(handle, 32, 0).decode() or 0)
    finally:
        os.close(handle)
    return None
