"""From a specification to a running job: makes its folder and starts its supervisor."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from batchrun import platforms
from batchrun.jobs.errors import ROOM, InputError, JobError, OptionError, OutputError, refused
from batchrun.jobs.fleet import check_fleet
from batchrun.jobs.folder import JobFolder, create
from batchrun.jobs.lease import Lease
from batchrun.jobs.output.destination import check_apart, one_at_a_time, resuming
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.rows.jsonable import json_values
from batchrun.jobs.same import find_same
from batchrun.jobs.snapshot import WAITING
from batchrun.jobs.spec import LIMIT_NAMES, OPTIONS, JobSpec
from batchrun.jobs.sweep import sweep
from batchrun.objectstore.paths import location
from batchrun.runner import supervisor
from batchrun.runner.ahead import Ahead
from batchrun.runner.live import publish_start


@contextmanager
def kept_input(
    root: Path, what: str, write: Callable[[BinaryIO], None], kind: Callable[[Path], str]
) -> Iterator[Path]:
    """Keep rows that are not in a file yet in one that a job may move into its folder.

    If no job does, it is removed when the block ends.

    Args:
        root: What `home()` returns.
        what: What the rows are, for messages.
        write: Writes them.
        kind: Returns the suffix for what was written.

    Raises:
        OutputError: They can't be kept.
    """
    folder = root / "jobs"
    with _room(folder, what), one_at_a_time(root):  # so that no sweep removes it before the lock
        handle, name = tempfile.mkstemp(prefix=".stdin-", suffix=".tmp", dir=folder)
        platforms.flock(handle)
    path = Path(name)
    try:
        with _room(folder, what), os.fdopen(handle, "wb", closefd=False) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # The job is named after it, and its suffix says how to read it.
        path = path.rename(path.with_name(f"{path.stem}{kind(path)}"))
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def as_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as lines of JSON; values that JSON lacks, such as times, are converted as from Arrow.

    Raises:
        InputError: A row is not a dict, or has a value that can't be written as JSON.
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
    """A table or DataFrame of any library that speaks Arrow; None for anything else.

    Raises:
        InputError: It is not a table but, say, a single column.
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
    return refused(OutputError, f"{what} can't be stored in {folder}", ROOM, folder)


def submit(
    root: Path,
    spec: JobSpec,
    own: Path | None = None,
    *,
    again: bool = False,
    command: str = "",
    ahead: Ahead | None = None,
) -> supervisor.Started:
    """Make a job and start it, while nobody else submits or resumes one.

    Args:
        root: What `home()` returns.
        spec: The job.
        own: An input to move into its folder.
        again: Do so even if another job does the same work.
        command: What asks for it, to be remembered.
        ahead: A supervisor that waits for it.

    Raises:
        MachineError: This is not Linux.
        JobError: Another job does the same work, or has the destination; or it can't be made.
    """
    platforms.need_linux()
    with one_at_a_time(root):
        sweep(root)
        check_free(root, spec, again=again)
        return _start(create(root, spec, own, command or None), ahead)


def resume(
    root: Path,
    job: JobFolder,
    *,
    retry_failed: bool,
    output: str | os.PathLike[str] | None,
    overwrite: bool,
    limits: Mapping[str, Any],
    tell: Callable[[str], None],
) -> supervisor.Started:
    """Start a job that was stopped; see `batchrun.jobs.output.destination.resuming`.

    Args:
        root: What `home()` returns.
        job: The job.
        retry_failed: Do the failed rows again.
        output: Another file for its output, from now on.
        overwrite: Replace what is there.
        limits: New limits from now on, by option name; None changes nothing.
        tell: Told what was damaged, and how much will be done again, with the job's name.

    Raises:
        MachineError: This is not Linux.
        OptionError: An option is not a limit, or has an invalid value.
        JobError: It is running, can't go on, or can't have its output.
    """
    platforms.need_linux()
    if unknown := limits.keys() - set(LIMIT_NAMES):
        raise OptionError("{} can't be changed when a job is resumed", min(unknown))
    told = {name: OPTIONS[name].read(v) for name, v in limits.items() if v is not None}
    if "devices" in told:  # instead of Ray
        told = dict.fromkeys(("ray", "workers", "gpus_per_worker", "cpus_per_worker")) | told
    elif "ray" in told:
        told = {"devices": None, **told}
    runtime = vars(job.spec().runtime)
    if runtime["device"] != "auto" and (told.get("devices") or told.get("ray")):
        told["device"] = "auto"
    check_fleet({**runtime, **told})
    path = location(os.fspath(output)).absolute() if output else None

    def say(line: str) -> None:
        tell(f"{job.id}: {line}")

    with resuming(root, job, path, overwrite=overwrite, limits=told, tell=say):
        if retry_failed:
            say(f"failed results to compute again: {job.retry_failed():,}")
        return _start(job)


def _start(job: JobFolder, ahead: Ahead | None = None) -> supervisor.Started:
    with Lease(job.path) as lease:  # refuses at once, and names the holder
        publish_start(job.path)
        job.set_state("queued")
        return supervisor.start(job, lease, ahead)


def check_free(root: Path, spec: JobSpec, *, again: bool) -> None:
    """Refuse a job whose work, or destination, is another job's.

    Raises:
        JobError: The message says which job.
    """
    same = None if again else find_same(root, spec)
    if same is not None:
        now = same.snapshot()
        if now.state in WAITING:
            raise JobError(
                f"the job {same.id} is the same work, and is {now.state}, with {now.done or 0:,} "
                f"of {_number(now.total)} rows done",
                hint=f"batchrun watch {same.id} shows it, batchrun cancel {same.id} stops it; or "
                "submit with --again to start another one",
            )
        only_failed = " --retry-failed" if now.state == "done-with-errors" else ""
        raise JobError(
            f"the job {same.id} is the same work, {now.state} with {now.done or 0:,} of "
            f"{_number(now.total)} rows done"
            + (f", {now.failed:,} of them failed" if now.failed else ""),
            hint=f"batchrun resume {same.id}{only_failed}{_told_limits(spec, same)}, or submit "
            "with --again to start over",
        )
    if not spec.output.stdout:
        check_apart(root, location(spec.output.path), spec.input_paths)
        # The output may exist by now.
        OUTPUTS.check(location(spec.output.path), overwrite=spec.output.overwrite)


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _told_limits(spec: JobSpec, job: JobFolder) -> str:
    """The options of `resume` that would make an old job run like this one."""
    now, was = vars(spec.runtime), vars(job.spec().runtime)
    changed = [n for n in LIMIT_NAMES if now[n] not in (None, was[n]) and now[n] is not False]
    return "".join(
        f" {OPTIONS[name].flag}"
        + (f" {shlex.quote(str(now[name]))}" if now[name] is not True else "")
        for name in changed
    )
