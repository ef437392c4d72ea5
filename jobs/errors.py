"""Errors that a user can cause. Library code raises them; the command line prints them."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Formatter

from batchrun.errors import UserError


class JobError(UserError):
    """A job that can't be made, run, or read."""


class OptionError(JobError):
    """An option is unknown or has an invalid value.

    Args:
        message: Has `{name}` for each option that it mentions, and `{}` for each of `values`.
        values: What the user passed.
    """

    def __init__(self, message: str, *values: object) -> None:
        super().__init__(message)
        self.args = (message, *values)

    def __str__(self) -> str:
        return self.spelled(str)

    def spelled(self, spell: Callable[[str], str]) -> str:
        """The message with option names spelled by `spell`."""
        message, *values = self.args
        names = {name for _, name, _, _ in Formatter().parse(message) if name}
        return str(message).format(*values, **{name: spell(name) for name in names})


class InputError(JobError):
    """An input is missing, unreadable, or not what it claims to be."""


class OutputError(JobError):
    """An output can't be written."""


class OutputTaken(OutputError):  # noqa: N818 - a state of the file, not a failure of it
    """The output would replace another job's file, or one that it may not overwrite."""


class JournalError(JobError):
    """A journal is damaged, has a newer version, or would lose a result."""


class Fenced(JournalError):  # noqa: N818 - a state of the job, not a failure of it
    """Another worker took over the job: this one may no longer write its results."""


class LeaseHeld(JobError):  # noqa: N818 - likewise
    """Another worker holds the job."""


class SpecChanged(JobError):  # noqa: N818 - likewise
    """A job would continue with work other than what was submitted."""


def input_changed(what: str) -> SpecChanged:
    """The error for an input that has changed since it was read."""
    return SpecChanged(
        f"{what}: the input has changed since the job read it; the results are safe in the job",
        hint="restore the input, then: batchrun resume",
    )


class SpecDamaged(JobError):  # noqa: N818 - likewise
    """A job's specification can no longer be read."""


class JobNotFound(JobError):  # noqa: N818 - likewise
    """No job has that name."""


# Errors of file systems without locks, such as NFS without its lock daemon, and some FUSE ones.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
ROOM = "make room there, or set BATCHRUN_HOME to a folder that can be written"
LOCAL_DISK = "set BATCHRUN_HOME to a folder on a disk of this machine"


def cause_of(error: OSError, place: str | os.PathLike[str]) -> str:
    """Why the system refused something; of a full disk, which one it is and what it has left.

    Args:
        error: The system's error.
        place: What was to be written, or the folder that it was to be in.
    """
    told = error.strerror or str(error)
    if error.errno not in _NO_ROOM:
        return told
    path = Path(error.filename if isinstance(error.filename, str) else place).absolute()
    try:
        folder = next(p for p in (path, *path.parents) if p.is_dir())
        disk = os.statvfs(folder)
    except (OSError, StopIteration):
        return told
    free, size = (blocks * disk.f_frsize / 2**20 for blocks in (disk.f_bavail, disk.f_blocks))
    return f"{told} (the disk of {folder} has {free:,.1f} of {size:,.1f} MiB left)"


def no_locks(error: OSError) -> bool:
    """Whether this locking error says that the file system has no locks."""
    return error.errno in _NO_LOCKS


@contextmanager
def refused(
    kind: type[JobError], what: str, hint: str, place: str | os.PathLike[str] = "."
) -> Iterator[None]:
    """Turn an OSError in the block into a user's error: what was refused, the cause, a hint.

    `place` is where something was to be written.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, UserError):  # an object store's
            hint = error.hint or hint
        raise kind(f"{what}: {cause_of(error, place)}", hint) from error
