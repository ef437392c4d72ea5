"""One job at a time on a device; others queue in the order in which they came.

A place in the queue is a numbered file, locked by the process that waits or runs. A lost lock shows
that the process died, so that this needs no clocks and no cleanup.
"""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from batchrun.jobs.errors import LOCAL_DISK, ROOM, OutputError, no_locks
from batchrun.jobs.files import current_umask, make_folders, private_mode
from batchrun.jobs.holders import is_locked, lock

_NOTE = 300  # bytes that a place's note has at most


class DeviceQueue:
    """A place in a device's queue, from entry to exit; its turn comes when none is ahead.

    A child that inherits `fileno()` keeps the place too: it ends with the last of them.

    Args:
        root: What `batchrun.jobs.folder.home()` returns.
        device: For example `cpu` or `cuda:0`.
        job: The job's id, for those behind it.

    Raises:
        OutputError: On entry, if no place can be taken.
    """

    def __init__(self, root: Path, device: str, job: str = "") -> None:
        self.device, self._job = device, job
        self._folder = root / "queue" / device.replace("/", "_")
        self._handle: int | None = None
        self._number = 0

    def fileno(self) -> int:
        """The lock's handle, while the place is taken."""
        assert self._handle is not None
        return self._handle

    def ahead(self) -> list[int]:
        """The PIDs ahead of this process, the running one first; empty when it is its turn.

        They come from the processes' own notes, 0 if unreadable: never signal them.
        """
        return [pid for pid, _ in self._ahead()]

    def jobs_ahead(self) -> list[str]:
        """The jobs ahead of this process, the running one first; "" for one that is unknown."""
        return [job for _, job in self._ahead()]

    def _ahead(self) -> list[tuple[int, str]]:
        before = sorted(number for number in self._numbers() if number < self._number)
        found = [_holder(self._folder / str(number)) for number in before]
        return [place for place in found if place is not None]

    def __enter__(self) -> DeviceQueue:
        try:
            make_folders(self._folder)
            # Locked before it gets its name, so that nobody finds it unlocked.
            handle, name = tempfile.mkstemp(prefix=".", dir=self._folder)
            try:
                os.fchmod(handle, private_mode(self._folder) & 0o666 & ~current_umask())
                lock(handle)
                os.write(handle, f"{os.getpid()} {self._job}".encode())
                self._take(name)
            except BaseException:
                os.close(handle)
                raise
            finally:
                os.unlink(name)
        except OSError as error:
            raise OutputError(
                f"the job can't queue in {self._folder}: {error.strerror or error}",
                hint=f"its file system lacks locks or hard links: {LOCAL_DISK}"
                if no_locks(error) or error.errno == errno.EPERM
                else ROOM,
            ) from error
        self._handle = handle
        return self

    def _take(self, name: str) -> None:
        """Take the number after the highest; retry if someone took a higher one meanwhile.

        With a lower number, this process might come before one that already runs.
        """
        while True:
            self._number = max(self._numbers(), default=0) + 1
            path = self._folder / str(self._number)
            try:
                os.link(name, path)
            except FileExistsError:
                continue
            if max(self._numbers()) <= self._number:
                return
            path.unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        return [int(name) for name in os.listdir(self._folder) if name.isdigit()]

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            (self._folder / str(self._number)).unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


def sweep(root: Path) -> None:
    """Remove the places of killed processes.

    The next process in a queue would do so too; without one, they would stay.
    """
    for path in (root / "queue").glob("*/[0-9]*"):
        with suppress(OSError):
            _holder(path)


def _holder(path: Path) -> tuple[int, str] | None:
    """The PID and job that the place's process noted; None if it is dead: its place is removed."""
    # Nobody takes a number below an existing one, so this place can't become another process's.
    with suppress(FileNotFoundError), path.open("rb") as file:
        if is_locked(file.fileno()):
            pid, _, job = file.read(_NOTE).decode(errors="replace").partition(" ")
            return int(pid) if pid.isdecimal() and pid.isascii() else 0, job
        path.unlink()
    return None
