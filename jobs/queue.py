"""One job at a time on a device, others after it in the order in which they came.

A place in the line is a numbered file that the process which waits or runs has locked: who died is
seen by its lock, no clock is asked, and nobody has to clean up.
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


class DeviceQueue:
    """A place in a device's line, from entry to exit; it is this one's turn when none is ahead.

    A child that inherits `fileno()` keeps the place too: it ends with the last of them.

    Args:
        root: What `batchrun.jobs.folder.home()` says.
        device: Such as `cpu` or `cuda:0`.

    Raises:
        OutputError: On entry, when no place can be taken.
    """

    def __init__(self, root: Path, device: str) -> None:
        self._folder = root / "queue" / device.replace("/", "_")
        self._handle: int | None = None
        self._number = 0

    def fileno(self) -> int:
        """The lock's handle, while the place is taken."""
        assert self._handle is not None
        return self._handle

    def ahead(self) -> list[int]:
        """The processes before this one, the one that runs first; none when it is its turn.

        The numbers are what those have noted, 0 where that is no number: no targets of signals.
        """
        before = sorted(number for number in self._numbers() if number < self._number)
        found = [_holder(self._folder / str(number)) for number in before]
        return [pid for pid in found if pid is not None]

    def __enter__(self) -> DeviceQueue:
        try:
            make_folders(self._folder)
            # Whoever sees the name finds the lock on it already.
            handle, name = tempfile.mkstemp(prefix=".", dir=self._folder)
            try:
                os.fchmod(handle, private_mode(self._folder) & 0o666 & ~current_umask())
                lock(handle)
                os.write(handle, str(os.getpid()).encode())
                self._take(name)
            except BaseException:
                os.close(handle)
                raise
            finally:
                os.unlink(name)
        except OSError as error:
            raise OutputError(
                f"no place can be taken in {self._folder}: {error.strerror or error}",
                hint=f"its file system has no locks or no hard links: {LOCAL_DISK}"
                if no_locks(error) or error.errno == errno.EPERM
                else ROOM,
            ) from error
        self._handle = handle
        return self

    def _take(self, name: str) -> None:
        """The number after the highest; taken anew if meanwhile someone has a higher one.

        With a lower number than one that is there, one might come before someone who runs already.
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
    """Remove the places of processes that were killed.

    Whoever takes one next would; where nobody does they would stay.
    """
    for path in (root / "queue").glob("*/[0-9]*"):
        with suppress(OSError):
            _holder(path)


def _holder(path: Path) -> int | None:
    """What the process has noted whose place this is; None, and it is removed, if it is dead."""
    # No one takes a lower number than one that is there: the place comes to be no one else's.
    with suppress(FileNotFoundError), path.open("rb") as file:
        if is_locked(file.fileno()):
            noted = file.read(20)
            return int(noted) if noted.isdigit() else 0
        path.unlink()
    return None
