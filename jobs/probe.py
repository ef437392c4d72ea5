"""What a file system can do of that which jobs rely on, found out by trying it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from batchrun.jobs.errors import LOCAL_DISK, JobError
from batchrun.jobs.files import fsync_directory
from batchrun.jobs.holders import write_lock
from batchrun.jobs.journal.schema import create


def lacks(folder: Path) -> list[str]:
    """What jobs would miss in a folder, and what to do; leaves nothing there.

    Raises:
        OSError: The folder can't be written.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix=".batchrun-doctor-", dir=folder) as name:
        for what, tried in _TRIALS.items():
            try:
                tried(Path(name))
            except (OSError, JobError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                found.append(f"{folder}: its file system has no {what} ({why}); {LOCAL_DISK}")
    return found


def _lock(folder: Path) -> None:
    with (folder / "lock").open("w") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, write_lock())
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _link(folder: Path) -> None:
    with suppress(FileExistsError):
        (folder / "file").touch(exist_ok=False)
    os.link(folder / "file", folder / "link")


_TRIALS: dict[str, Callable[[Path], None]] = {
    "locks": _lock,
    "hard links": _link,
    "sync of folders": fsync_directory,
    "memory that processes share, which SQLite's log needs": create,
}
