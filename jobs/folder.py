"""Job folders: a directory is a job, and nothing outside it refers to it."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from batchrun import platforms
from batchrun.jobs import files
from batchrun.jobs.errors import (
    ROOM,
    JobError,
    JobNotFound,
    JournalError,
    OutputError,
    SpecDamaged,
    cause_of,
)
from batchrun.jobs.identity import LIMITS, load_limits, load_places
from batchrun.jobs.journal.journal import STATE, Journal
from batchrun.jobs.journal.results import Counts
from batchrun.jobs.journal.schema import COMMAND, NAME
from batchrun.jobs.lease import CANCEL, Lease, check_not_held, held_by
from batchrun.jobs.naming import matching, new_id
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.snapshot import WAITING, JobSnapshot, last_words, seconds_of
from batchrun.jobs.spec import FILE, JobSpec
from batchrun.objectstore.paths import Location, inside, location
from batchrun.trust import changed_by_others

_FULL = 1 << 20  # with fewer bytes left, a disk counts as full
_DESTINATIONS = "destinations"  # lists where its results were written, apart from its own output


def home(environment: Mapping[str, str] = os.environ) -> Path:
    """Where job folders and converted models are: `BATCHRUN_HOME`, or `~/.batchrun`.

    Raises:
        JobError: This user has no home folder.
    """
    try:
        return Path(environment.get("BATCHRUN_HOME") or Path.home() / ".batchrun").absolute()
    except RuntimeError as error:  # no HOME, and no entry in /etc/passwd
        who = f"user {os.getuid()}" if hasattr(os, "getuid") else "this user"
        raise JobError(
            f"{who} has no home folder", hint="set BATCHRUN_HOME to a folder of yours"
        ) from error


@dataclass(frozen=True)
class JobFolder:
    """A job on disk: `job.json`, `journal.db`, `lock`, `state.json`, `stats.json`, a log."""

    path: Path

    @property
    def id(self) -> str:
        """The job's name."""
        return self.path.name

    @property
    def created(self) -> float | None:
        """When it was submitted, in seconds since the epoch; None if its `job.json` is gone."""
        try:
            return (self.path / FILE).stat().st_mtime
        except OSError:
            return None

    def submitted(self) -> JobSpec:
        """The job's specification; the journal's copy if `job.json` is damaged.

        Raises:
            SpecDamaged: Neither has it.
            JournalError: The journal is damaged too.
        """
        try:
            return JobSpec.load(self.path)
        except SpecDamaged:
            with Journal(self.path, 1, readonly=True) as journal:
                kept = journal.meta("spec")
            if kept is None:
                raise
            return JobSpec.of(kept)

    def spec(self) -> JobSpec:
        """The job's specification, with the current places of its files and current limits."""
        spec = self.submitted().at(load_places(self.path)).within(self.path)
        limits: dict[str, Any] = load_limits(self.path)
        return replace(spec, runtime=replace(spec.runtime, **limits))

    def foreign(self) -> str | None:
        """Why what this job asks for may be somebody else's words, in one line, or None."""
        return changed_by_others(self.path, (FILE, LIMITS, NAME))

    def mend(self) -> list[str]:
        """Repair damaged files where possible; return a line per repair. Needs the lease.

        Damaged results in the journal are to be computed again. `job.json` is rewritten from the
        journal, and the other way round.

        Raises:
            JobError: No intact specification is left, or the journal is damaged as a whole.
        """
        spec, noted = self.submitted(), JobSnapshot.load(self.path)
        with self.journal(readonly=False) as journal:  # which removes state.json
            lines = [f"removed damaged data: {what}" for what in journal.mend()]
            if journal.meta("spec") is None:
                journal.set_meta("spec", asdict(spec))
        if noted is not None and not lines:
            noted.save(self.path)
        try:
            JobSpec.load(self.path)
        except SpecDamaged:
            if not spec.edits(self.path):
                spec.save(self.path)
                lines.append("job.json was damaged: it was rewritten from the journal")
        return lines

    def journal(self, *, readonly: bool = True) -> Journal:
        """The job's journal, open."""
        return Journal(self.path, self.spec().n, readonly=readonly)

    def state(self) -> str:
        """One of new, queued, running, interrupted, done, done-with-errors, failed, cancelled."""
        noted = JobSnapshot.load(self.path)
        if held_by(self.path) is not None:
            return noted.state if noted is not None and noted.state in WAITING else "running"
        if noted is not None and noted.state not in WAITING:
            return noted.state
        with self.journal() as journal:
            runs = journal.runs()
        if runs and runs[-1]["state"]:
            return str(runs[-1]["state"])
        if self.cancel_requested():  # and the worker had no time to note it
            return "cancelled"
        return "interrupted" if runs else "new"

    def set_state(self, state: str, reason: str | None = None, hint: str | None = None) -> None:
        """Note the job's state for lists and `show`. Only its worker may.

        Args:
            state: One of those that `state()` returns.
            reason: Why it failed.
            hint: What to do about it.

        Raises:
            OSError: It can't be written.
        """
        snapshot = JobSnapshot(state)
        if state not in WAITING:
            with suppress(JobError):  # a damaged job has only its state
                snapshot = self._counted(state)
        replace(snapshot, reason=reason, hint=hint).save(self.path)

    def snapshot(self) -> JobSnapshot:
        """The job's state and counts. Skips the journal if nothing ran since `set_state`.

        Raises:
            JobError: The folder is damaged.
        """
        noted = JobSnapshot.load(self.path)
        if held_by(self.path) is None and noted is not None and noted.state not in WAITING:
            return noted
        return self._counted(self.state())

    def failure(self) -> tuple[str, str | None] | None:
        """Why the job failed and what to do about it, or None if it did not."""
        noted = JobSnapshot.load(self.path)
        if noted is not None and noted.reason is not None:
            return noted.reason, noted.hint
        with self.journal() as journal:
            runs = journal.runs()
        if held_by(self.path) is not None or self.state() == "cancelled":
            return None
        last: dict[str, Any] = runs[-1] if runs else {"state": None, "started_at": 0.0}
        since = float(last["started_at"])
        waiting = noted is not None and noted.state in WAITING  # and nobody holds the lease
        if waiting:
            with suppress(OSError):
                since = max(since, (self.path / STATE).stat().st_mtime)
        if last["state"] is None or waiting:
            gone = "its processes are gone: they were killed, or the machine went down"
            if files.disk_of(self.path).free < _FULL:
                gone = "its processes are gone, and its disk is full"
            words = last_words(self.path, since)
            return words or ((gone, None) if runs else None)
        return None if last["reason"] is None else (last["reason"], None)

    def counts(self) -> Counts:
        """Results so far."""
        with self.journal() as journal:
            return journal.counts()

    def retry_failed(self) -> int:
        """Mark the failed samples to be done again; return how many there are.

        Raises:
            LeaseHeld: The job is running.
        """
        with self.journal(readonly=False) as journal:
            return journal.retry_failed()

    def remember(self, key: str, value: Any) -> None:
        """Note a small JSON value in the journal and keep `state.json`. Needs the lease.

        Raises:
            JobError: The journal or the state can't be written.
        """
        noted = JobSnapshot.load(self.path)
        with self.journal(readonly=False) as journal:  # which removes state.json
            journal.set_meta(key, value)
        if noted is not None:
            noted.save(self.path)

    def request_cancel(self) -> None:
        """Tell the job's worker that it ends because the user cancelled the job."""
        os.close(files.open_private(self.path / CANCEL, os.O_WRONLY))

    def cancel_requested(self) -> bool:
        """Whether someone requested it since the worker took the job."""
        return (self.path / CANCEL).exists()

    def check_removable(self) -> None:
        """Raise if `remove` would because the job runs, or is elsewhere."""
        if self.path.is_symlink():
            there, link = (shlex.quote(str(p)) for p in (self.path.resolve(), self.path))
            raise JobError(
                f"{self.path} is a symbolic link to {self.path.resolve()}",
                hint=f"batchrun rm {there} removes the job, rm {link} the link",
            )
        check_not_held(self.path)

    def remove(self) -> None:
        """Remove the folder with all results, and what killed writers left beside its outputs.

        Complete outputs stay.

        Raises:
            LeaseHeld: The job is running.
            JobError: The folder is a symbolic link: it is elsewhere.
        """
        self.check_removable()
        with Lease(self.path):
            for destination in self._destinations():
                OUTPUTS.sweep(destination)
            if not platforms.WINDOWS:
                grave = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=self.path.parent))
                self.path.rename(grave)  # else `list` could show half a job
                files.fsync_directory(grave.parent)
                shutil.rmtree(grave)
        if platforms.WINDOWS:  # it neither renames nor removes a folder with an open file in it
            shutil.rmtree(self.path)

    def note_destination(self, path: Location) -> None:
        """Remember where results are about to be written, for `remove`."""
        with (
            suppress(OSError),  # a read-only folder can't be removed either
            open(self.path / _DESTINATIONS, "ab", opener=files.open_private) as file,
        ):
            file.write(os.fsencode(str(path.absolute())) + b"\0")

    def _destinations(self) -> Iterator[Location]:
        for load in (JobSpec.load, lambda _: self.spec()):  # as submitted, and as it is now
            with suppress(JobError, OSError):
                if path := load(self.path).output.path:
                    yield inside(self.path, path)
        with suppress(OSError):
            for name in (self.path / _DESTINATIONS).read_bytes().split(b"\0")[:-1]:
                yield location(os.fsdecode(name))

    def _counted(self, state: str) -> JobSnapshot:
        spec = self.spec()
        with self.journal() as journal:
            counts, total = journal.counts(), journal.meta("rows_total")
            runs = journal.runs()
        return JobSnapshot(
            state,
            total=total,
            done=counts.rows,
            failed=counts.failed,
            skipped=counts.skipped,
            model=spec.model.name,
            output=spec.output.path,
            fingerprint=spec.fingerprint(),
            name=spec.about.name,
            tags=spec.about.tags,
            started=runs[0]["started_at"] if runs else None,
            ended=runs[-1]["ended_at"] if runs else None,
            seconds=sum(map(seconds_of, runs)) if runs else None,
        )


def create(
    root: Path, spec: JobSpec, own: Path | None = None, command: str | None = None
) -> JobFolder:
    """Make a job's folder: whole and durable on return, or absent.

    Args:
        root: What `home()` returns.
        spec: The job.
        own: An input to move into the folder.
        command: What submits it, to be remembered.

    Raises:
        OutputError: It can't be made.
    """
    folder = root / "jobs"
    try:
        files.make_folders(folder)
        building = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder))
        try:
            building.chmod(files.private_mode(folder) & ~files.current_umask())
            if own is not None:
                kept = f"stdin{own.suffix}"
                own.rename(building / kept)
                spec = spec.at({str(own): kept})
            spec.save(building)
            told = {} if command is None else {COMMAND: command}
            Journal.create(building, {"spec": asdict(spec), **told})
            JobFolder(building).set_state("new")
            files.fsync_directory(building)
            building = _rename_to_new_id(building, spec)
            files.fsync_directory(folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    except (OSError, JournalError) as error:
        cause = cause_of(error, folder) if isinstance(error, OSError) else error
        raise OutputError(f"no job folder can be made in {folder}: {cause}", hint=ROOM) from error
    return JobFolder(building)


def _rename_to_new_id(building: Path, spec: JobSpec) -> Path:
    """Give a finished folder a unique id; draw again if another job has it."""
    while True:
        try:
            return building.rename(building.parent / new_id(spec))
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise


def list_jobs(root: Path) -> list[JobFolder]:
    """All jobs, oldest first."""
    found = []
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(root / "jobs") as entries:
        for entry in entries:  # there may be thousands: every call counts
            with suppress(OSError):
                if not entry.name.startswith("."):
                    found.append((_made(entry.path), entry.name, entry.path))
    return [JobFolder(Path(path)) for _, _, path in sorted(found)]


def _made(folder: str) -> int:
    """When a job was submitted, in nanoseconds; a later time if its `job.json` is lost.

    Raises:
        OSError: The folder is not a job's.
    """
    try:
        return os.stat(f"{folder}/{FILE}").st_mtime_ns
    except FileNotFoundError:
        return os.stat(f"{folder}/{NAME}").st_mtime_ns


def find(root: Path, name: str | None = None) -> JobFolder:
    """A job by id, by a part of its id, or by its folder's path; by default the latest.

    A path has a slash: what lies in the working folder takes no job's name. A whole id counts
    first, then the beginning of one, then any other part.

    Raises:
        JobNotFound: No job matches, or several do; the message lists candidates.
    """
    if name is not None and Path(name).name != name and (Path(name) / NAME).exists():
        return JobFolder(Path(name).absolute())
    jobs = list_jobs(root)
    if not jobs:
        raise JobNotFound(f"there are no jobs in {root}", hint="batchrun submit prompts.parquet")
    if name is None:
        return jobs[-1]
    found = matching([job.id for job in jobs], name)
    if len(found) == 1:
        return next(job for job in jobs if job.id == found[0])
    near = ", ".join((found or [job.id for job in jobs])[-5:])
    if found:
        raise JobNotFound(f"{name!r} matches {len(found)} jobs: {near}", hint="type more of the id")
    raise JobNotFound(f"no job {name!r}; the latest are {near}", hint="batchrun list")
