"""From a specification to a job that runs: its folder is made, its supervisor started."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from batchrun.jobs.errors import ROOM, InputError, JobError, OutputError, refused
from batchrun.jobs.folder import JobFolder, create, find_same, sweep
from batchrun.jobs.lease import Lease
from batchrun.jobs.output.destination import check_apart, one_at_a_time
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.rows.jsonable import json_values
from batchrun.jobs.spec import LIMIT_NAMES, OPTIONS, JobSpec
from batchrun.runner import supervisor
from batchrun.runner.live import forget_progress


@contextmanager
def kept_input(
    root: Path, what: str, write: Callable[[BinaryIO], None], kind: Callable[[Path], str]
) -> Iterator[Path]:
    """A file of rows that are in none, until the block ends or a job has it.

    Args:
        root: What `home()` says.
        what: They are, for messages.
        write: Writes them.
        kind: Says how the name of what was written ends.

    Raises:
        OutputError: They can't be kept.
    """
    folder = root / "jobs"
    with _room(folder, what), one_at_a_time(root):  # nobody sweeps it away before it is locked
        handle, name = tempfile.mkstemp(prefix=".stdin-", suffix=".tmp", dir=folder)
        fcntl.flock(handle, fcntl.LOCK_EX)
    path = Path(name)
    try:
        with _room(folder, what), os.fdopen(handle, "wb", closefd=False) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # Its name is that of the job, and its suffix says how to read it.
        path = path.rename(path.with_name(f"{path.stem}{kind(path)}"))
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def as_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as lines of JSON; values that JSON lacks, such as times, become what they do from Arrow.

    Raises:
        InputError: A row is no dict, or has a value that JSON can't hold.
    """
    lines = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise InputError(f"row {number} is of type {type(row).__name__}, not a dict")
        try:
            lines.append(json.dumps(dict(row), default=_jsonable).encode() + b"\n")
        except (TypeError, ValueError, RecursionError, pa.ArrowException) as error:
            raise InputError(f"row {number} can't be written as JSON: {error}") from error
    return b"".join(lines)


def _jsonable(value: object) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):  # base64 would pass for a prompt's text
        raise TypeError(f"it holds {type(value).__name__}; decode them first")
    return json_values(pa.array([value]))[0]


def table_of(data: object) -> pa.Table | None:
    """A table or DataFrame of any library that speaks Arrow; None where it is none.

    Raises:
        InputError: It is no table, but one column, say.
    """
    if isinstance(data, pa.Table):
        return data
    if not hasattr(data, "__arrow_c_stream__"):
        return None
    try:
        return pa.table(data)
    except (TypeError, ValueError, pa.ArrowException) as error:
        kind = type(data).__name__
        raise InputError(f"rows of type {kind} can't be read as a table: {error}") from error


def _room(folder: Path, what: str) -> AbstractContextManager[None]:
    return refused(OutputError, f"{what} can't be kept in {folder}", ROOM)


@contextmanager
def submitting(
    root: Path, spec: JobSpec, own: Path | None = None, *, again: bool = False
) -> Iterator[JobFolder]:
    """A new job, which is to be started in the block; nobody else decides anything meanwhile.

    Args:
        root: What `home()` says.
        spec: The job.
        own: An input that is to lie in its folder.
        again: Also where another job does the same work.

    Raises:
        JobError: Another job does the same work, or has the destination; or it can't be made.
    """
    with one_at_a_time(root):
        sweep(root)
        check_free(root, spec, again=again)
        yield create(root, spec, own)


def start(job: JobFolder) -> supervisor.Started:
    """Start a job's supervisor.

    Raises:
        LeaseHeld: It has one.
    """
    with Lease(job.path) as lease:  # refused at once, by name of who has it
        forget_progress(job.path)
        job.set_state("queued")
        return supervisor.start(job, lease)


def check_free(root: Path, spec: JobSpec, *, again: bool) -> None:
    """Refuse what another job does, or whose destination is another job's by now.

    Raises:
        JobError: The message says which job.
    """
    same = None if again else find_same(root, spec)
    if same is not None:
        counts, total, state = same.counts(), same.total(), same.state()
        only_failed = " --retry-failed" if state == "done-with-errors" else ""
        raise JobError(
            f"the job {same.id} is the same work, {state} with {counts.rows:,} of "
            f"{'?' if total is None else format(total, ',')} rows done"
            + (f", {counts.failed:,} of them failed" if counts.failed else ""),
            hint=f"batchrun resume {same.id}{only_failed}{_told_limits(spec, same)}, or submit "
            "with --again to begin anew",
        )
    if spec.output.stdout:
        return
    destination = Path(spec.output.path)
    check_apart(root, destination, [Path(file.path) for file in spec.inputs])
    OUTPUTS.check(destination, overwrite=spec.output.overwrite)  # it may be there by now


def _told_limits(spec: JobSpec, job: JobFolder) -> str:
    """The options of `resume` by which a job would run as another that is the same work."""
    now, was = vars(spec.runtime), vars(job.spec().runtime)
    return "".join(
        f" {OPTIONS[name].flag} {now[name]}"
        for name in LIMIT_NAMES
        if now[name] not in (None, was[name])
    )
