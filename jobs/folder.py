"""Job folders: one directory is one job, and nothing outside of it knows of it."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jobs.errors import JobNotFound, JournalError, OutputError, SpecChanged
from jobs.files import current_umask, fsync_directory, make_folders
from jobs.journal import NAME, Counts, Journal
from jobs.lease import held_by
from jobs.spec import JobSpec


def home(environment: Mapping[str, str] = os.environ) -> Path:
    """Where job folders and converted models lie: `BATCHRUN_HOME`, or `~/.batchrun`."""
    return Path(environment.get("BATCHRUN_HOME") or Path.home() / ".batchrun").absolute()


@dataclass(frozen=True)
class JobFolder:
    """A job on disk: `job.json`, `journal.db`, `lock`, `log.txt`, `stats.json`."""

    path: Path

    @property
    def id(self) -> str:
        """The job's name."""
        return self.path.name

    def spec(self) -> JobSpec:
        """The job's specification."""
        return JobSpec.load(self.path)

    def journal(self, *, readonly: bool = True) -> Journal:
        """The job's journal, open."""
        return Journal(self.path, self.spec().n, readonly=readonly)

    def state(self) -> str:
        """One of new, running, interrupted, done, done-with-errors, failed."""
        if held_by(self.path) is not None:
            return "running"
        with self.journal() as journal:
            runs = journal.runs()
        if not runs:
            return "new"
        return runs[-1]["state"] or "interrupted"

    def total(self) -> int | None:
        """Rows of the job, or None while nobody has counted them."""
        with self.journal() as journal:
            found = journal.meta("rows_total")
        return None if found is None else int(found)

    def counts(self) -> Counts:
        """Results so far."""
        with self.journal() as journal:
            return journal.counts()


def create(root: Path, spec: JobSpec) -> JobFolder:
    """Make a job's folder: whole and durable on return, or not there at all.

    Args:
        root: What `home()` says.
        spec: The job.

    Raises:
        OutputError: It can't be made.
    """
    folder = root / "jobs"
    try:
        make_folders(folder)
        building = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder))
        try:
            spec.save(building)
            Journal.create(building)
            fsync_directory(building)
            building.chmod(0o777 & ~current_umask())  # mkdtemp is for secrets
            path = _rename_to_new_id(building, spec)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        fsync_directory(folder)
    except (OSError, JournalError) as error:
        cause = isinstance(error, OSError) and error.strerror
        raise OutputError(
            f"no job folder can be made in {folder}: {cause or error}",
            hint="make room there, or set BATCHRUN_HOME to a folder that can be written",
        ) from error
    return JobFolder(path)


def _rename_to_new_id(building: Path, spec: JobSpec) -> Path:
    """Give a finished folder an id that no other job has; two may draw the same one."""
    while True:
        try:
            return building.rename(building.parent / _new_id(spec))
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise


def list_jobs(root: Path) -> list[JobFolder]:
    """All jobs, the oldest first."""
    folder = root / "jobs"
    if not folder.is_dir():
        return []
    found = [
        p
        for p in folder.iterdir()
        if not p.name.startswith(".") and (p / "job.json").exists() and (p / NAME).exists()
    ]
    return [
        JobFolder(p)
        for p in sorted(found, key=lambda p: ((p / "job.json").stat().st_mtime_ns, p.name))
    ]


def find(root: Path, name: str | None = None) -> JobFolder:
    """A job by id, by the beginning of its id, by its folder's path, or the latest.

    Raises:
        JobNotFound: None, or more than one, is meant; the message lists candidates.
    """
    if name is not None and (Path(name) / NAME).exists():
        return JobFolder(Path(name).absolute())
    jobs = list_jobs(root)
    if not jobs:
        raise JobNotFound(f"there are no jobs in {root}", hint="batchrun submit prompts.parquet")
    if name is None:
        return jobs[-1]
    found = [j for j in jobs if j.id == name] or [j for j in jobs if j.id.startswith(name)]
    if len(found) == 1:
        return found[0]
    near = ", ".join(j.id for j in (found or jobs)[-5:])
    if found:
        raise JobNotFound(f"{name!r} could be {len(found)} jobs: {near}", hint="type more of it")
    raise JobNotFound(f"no job {name!r}; the latest are {near}", hint="batchrun list")


def check_unchanged(job: JobFolder) -> None:
    """Refuse to go on with inputs that are not those of the submission.

    Raises:
        SpecChanged: The message names what changed.
    """
    changed = job.spec().changed_inputs()
    if changed:
        raise SpecChanged(
            "the input changed since the job was submitted: " + "; ".join(changed),
            hint="restore the file, or submit the new one as a job of its own",
        )


def _new_id(spec: JobSpec) -> str:
    """Such as `prompts-20261121-0837-x7k2`."""
    stem = Path(spec.inputs[0].path).name.split(".")[0]
    stem = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:32] or "job"
    letters = "abcdefghijkmnpqrstuvwxyz23456789"
    suffix = "".join(secrets.choice(letters) for _ in range(4))
    return f"{stem}-{datetime.now(UTC).astimezone():%Y%m%d-%H%M}-{suffix}"
