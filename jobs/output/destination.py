"""Which live job owns a destination, and what that job may replace there.

Submitting and resuming take turns, so a decision about a destination holds until the job that got
it is live. Changes to the file itself are checked when the output is complete: it replaces only
what the job was allowed to replace, or wrote itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchrun import platforms
from batchrun.jobs.errors import LOCAL_DISK, ROOM, JobError, OutputError, OutputTaken, refused
from batchrun.jobs.files import (
    Identity,
    MayReplace,
    close_to_others,
    make_folders,
    open_private,
    write_json,
)
from batchrun.jobs.folder import JobFolder, list_jobs
from batchrun.jobs.identity import PLACES, places_with_output, set_limits
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.schema import NAME
from batchrun.jobs.lease import Lease, held_by
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.spec import FILE, JobSpec
from batchrun.objectstore.paths import Location, ObjectPath, location

_LIVE = ("new", "queued", "running")
_OWN_FOLDERS = ("jobs", "measured", "models", "queue", "verdicts")  # of `home()`
_LOCK = ".submitting"  # among the jobs
_WRITTEN = "output"  # in a journal: identities of files that are, or may be, the job's own output
_MAY_GO = "output_may_go"  # identity of the file that the user allowed to be replaced


@contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Keep others from submitting or resuming jobs until the block, or its process, ends.

    Raises:
        OutputError: The lock file can't be created or locked.
    """
    path = root / "jobs" / _LOCK
    with refused(OutputError, f"{path} can't be written", ROOM):
        make_folders(path.parent)
        close_to_others(path.parent)
        handle = open_private(path, os.O_RDWR)
    try:
        with refused(OutputError, f"{path} can't be locked", LOCAL_DISK):
            platforms.flock(handle)
        yield
    finally:
        os.close(handle)


def check_place(root: Path, destination: Location, inputs: Iterable[Location]) -> None:
    """Refuse a destination that no job with these inputs can have.

    Args:
        root: What `home()` returns.
        destination: The file.
        inputs: What the job reads.

    Raises:
        OutputError: It is an input, by whatever path, or among the files that batchrun keeps.
    """
    where = OUTPUTS.places(destination)
    if any(where & OUTPUTS.places(path) for path in inputs):
        raise OutputError(f"{destination} is an input of this job", hint="choose another --output")
    if isinstance(destination, ObjectPath):
        return
    real = Path(os.path.realpath(destination))
    ours = any(real.is_relative_to(os.path.realpath(root / name)) for name in _OWN_FOLDERS)
    if ours or any(_is_job(folder) for folder in real.parents):
        raise OutputError(
            f"{destination} is among batchrun's own files",
            hint="choose another --output",
        )


def check_apart(
    root: Path, destination: Location, inputs: Iterable[Location], job: JobFolder | None = None
) -> None:
    """Refuse conflicts with files that another new, queued or running job reads or writes.

    Args:
        root: What `home()` returns.
        destination: Where the output is to go.
        inputs: What the job reads.
        job: The job itself, if it exists already.

    Raises:
        OutputError: The message names the other job.
    """
    where = OUTPUTS.places(destination)
    read: dict[str | tuple[object, ...], Location] | None = None
    for other in list_jobs(root):
        try:
            state = other.state()
            if state not in _LIVE or (job is not None and other.path.samefile(job.path)):
                continue
            spec = other.spec()
        except (JobError, OSError):  # gone or damaged, so it writes nothing
            continue
        theirs = OUTPUTS.places(location(spec.output.path)) if spec.output.path else set()
        if where & theirs:
            raise _taken(f"{destination} is where", other, state, "writes its output")
        if any(where & OUTPUTS.places(path) for path in spec.input_paths):
            raise _taken(f"{destination} is what", other, state, "reads")
        if read is None:
            read = {place: path for path in inputs for place in OUTPUTS.places(path)}
        if changing := theirs & read.keys():
            raise _taken(f"the input {read[changing.pop()]} is what", other, state, "replaces")


class Claim:
    """Decides what a job's output may replace, and remembers what the job writes there.

    Called by `OutputStore.write` when the output is whole but does not have its name yet.

    Args:
        journal: The job's; must be open for writing for a call.
        path: The output.
        overwrite: Whether the job was submitted to replace whatever is there. It does so once,
            and then replaces only what it wrote itself.
    """

    def __init__(self, journal: Journal, path: Location, *, overwrite: bool) -> None:
        self._journal, self._path, self._overwrite = journal, path, overwrite

    def covers(self, there: Identity) -> bool:
        """Whether a file may be replaced."""
        written = self._journal.meta(_WRITTEN) or []
        asked = there == self._journal.meta(_MAY_GO) or (self._overwrite and not written)
        return asked or there in written

    def __call__(self, made: Identity) -> bool:
        """Whether what is there now may be replaced by this file."""
        there = OUTPUTS.identity(self._path)
        may = there is not None and self.covers(there)
        # Before it gets the name, so that after a crash the job knows it, and what it may replace.
        self._journal.set_meta(_WRITTEN, [*([there] if may else []), made])
        return may and there == OUTPUTS.identity(self._path)


@contextmanager
def resuming(
    root: Path,
    job: JobFolder,
    output: Location | None = None,
    *,
    overwrite: bool = False,
    limits: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[None]:
    """Let a job continue if it can have its destination; the block must make it live.

    Repairs first what can be repaired.

    Args:
        root: What `home()` returns.
        job: The job.
        output: Another file for its output, from now on.
        overwrite: Whether what is there may be replaced.
        limits: New limits from now on; see `batchrun.jobs.identity.set_limits`.
        tell: Told what was damaged, a line each.

    Raises:
        LeaseHeld: The job is running.
        JobError: It is damaged beyond repair.
        OutputError: Another job has the destination, or a file is there that is not the job's.
    """
    with one_at_a_time(root):
        with Lease(job.path):
            for line in job.mend():
                tell(line)
            submitted = job.submitted()
            places = places_with_output(job.path, submitted, output)
            spec = submitted.at(places).within(job.path)
            path, inputs = location(spec.output.path), spec.input_paths
            if output is not None:
                check_place(root, path, inputs)
            check_apart(root, path, inputs, job)
            OUTPUTS.check(path, overwrite=True)
            there = OUTPUTS.identity(path)
            if there is not None and not overwrite:
                _check_own(job, spec, there)
            if output is not None:
                job.note_destination(path)
                write_json(job.path / PLACES, places)
            if limits:
                set_limits(job.path, limits)
            if there is not None and overwrite:
                job.remember(_MAY_GO, there)
        yield


@contextmanager
def exporting(
    root: Path, job: JobFolder, destination: Location, *, overwrite: bool
) -> Iterator[MayReplace]:
    """Let a job's results be written to a file that is not another job's.

    If it is the job's own output, the job remembers it as such.

    Args:
        root: What `home()` returns.
        job: The job.
        destination: The file.
        overwrite: Whether what is there now may be replaced.

    Yields:
        The `may_replace` for `export`.

    Raises:
        OutputError: The file can't be written there.
        OutputTaken: It is another job's, or the running job will write it itself.
    """
    spec = job.spec()
    check_place(root, destination, spec.input_paths)
    check_apart(root, destination, [], job)
    OUTPUTS.check(destination, overwrite=overwrite)
    before = OUTPUTS.identity(destination) if overwrite else None

    def unchanged() -> bool:
        return before is not None and before == OUTPUTS.identity(destination)

    if not is_same(destination, location(spec.output.path)):
        job.note_destination(destination)
        yield lambda _: unchanged()
        return
    if held_by(job.path) is not None:
        raise _taken(f"{destination} is where", job, job.state(), "writes its output")

    def remembered(made: Identity) -> bool:
        written = [*([before] if before is not None else []), made]
        job.remember(_WRITTEN, written)
        return unchanged()

    with Lease(job.path):
        yield remembered


def is_same(path: Location, other: Location) -> bool:
    """Whether two paths lead, or would lead, to one file: through links, `..` or bind mounts."""
    return bool(OUTPUTS.places(path) & OUTPUTS.places(other))


def _check_own(job: JobFolder, spec: JobSpec, there: Identity) -> None:
    path = location(spec.output.path)
    with job.journal() as journal:
        if not Claim(journal, path, overwrite=spec.output.overwrite).covers(there):
            raise OutputTaken(
                f"{path} exists, and the job {job.id} did not write it",
                hint=f"batchrun resume {job.id} --output OTHER, or --overwrite to replace it",
            )


def _is_job(folder: Path) -> bool:
    return all(os.path.exists(folder / name) for name in (NAME, FILE))


def _taken(what: str, other: JobFolder, state: str, does: str) -> OutputTaken:
    hint = f"batchrun watch {other.id}, or batchrun cancel {other.id}"
    if state == "new":  # its submitter starts it at once, or is dead
        hint = f"batchrun resume {other.id} starts that job, batchrun rm {other.id} removes it"
    if does != "replaces":
        hint = f"choose another --output, or: {hint}"
    return OutputTaken(f"{what} the job {other.id}, which is {state}, {does}", hint=hint)
