"""What a user can cause. Library code raises these; the command line prints them."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from string import Formatter

from batchrun.errors import UserError


class JobError(UserError):
    """A job that can't be made, run, or read."""


class OptionError(JobError):
    """An option is not known, or has a value that it cannot have.

    Args:
        message: With `{name}` where an option is meant, and `{}` for each of `values`.
        values: What a user said.
    """

    def __init__(self, message: str, *values: object) -> None:
        super().__init__(message)
        self.args = (message, *values)

    def __str__(self) -> str:
        return self.spelled(str)

    def spelled(self, spell: Callable[[str], str]) -> str:
        """The message with the names of options as `spell` writes them."""
        message, *values = self.args
        names = {name for _, name, _, _ in Formatter().parse(message) if name}
        return str(message).format(*values, **{name: spell(name) for name in names})


class InputError(JobError):
    """An input is missing, unreadable, or not what it claims to be."""


class OutputError(JobError):
    """An output can't be written."""


class OutputTaken(OutputError):  # noqa: N818 - a state of the file, not a failure of it
    """What an output would replace is another job's, or something that nobody said may go."""


class JournalError(JobError):
    """A journal is damaged, of a newer version, or would lose a result."""


class Fenced(JournalError):  # noqa: N818 - a state of the job, not a failure of it
    """Another worker took the job over: what this one has may no longer be written."""


class LeaseHeld(JobError):  # noqa: N818 - likewise
    """Another worker has the job."""


class SpecChanged(JobError):  # noqa: N818 - likewise
    """A job would go on with other work than it was submitted with."""


def input_changed(what: str) -> SpecChanged:
    """The error for an input that is found to have changed since it was read."""
    return SpecChanged(
        f"{what}: it was changed meanwhile; the results are safe in the job",
        hint="restore the input, then: batchrun resume",
    )


class SpecDamaged(JobError):  # noqa: N818 - likewise
    """What a job was submitted with can't be read any more."""


class JobNotFound(JobError):  # noqa: N818 - likewise
    """No job of that name."""


# What file systems say that have no locks, such as NFS without its lock daemon, and some of FUSE.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
ROOM = "make room there, or set BATCHRUN_HOME to a folder that can be written"
LOCAL_DISK = "set BATCHRUN_HOME to a folder on a disk of this machine"


def no_locks(error: OSError) -> bool:
    """Whether this error of a lock says that its file system has none."""
    return error.errno in _NO_LOCKS


@contextmanager
def refused(kind: type[JobError], what: str, hint: str) -> Iterator[None]:
    """The system's refusals within are errors for a user: what is refused, the cause, a hint."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}", hint) from error
