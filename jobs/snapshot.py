"""What is kept of a job beside its journal: its state, and why it failed.

`state.json` is there for people and for lists of thousands of jobs; the journal is the truth.
Opening the journal for writing removes it first, so it is never out of date.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from batchrun.jobs.files import read_json, write_json
from batchrun.jobs.journal.journal import STATE

WAITING = ("queued", "running")  # states of a job that has a worker
STATES = (  # all there are
    *("new", "queued", "running", "interrupted"),
    *("done", "done-with-errors", "failed", "cancelled"),
)
FINISHED = ("done", "done-with-errors")  # states of a job that has nothing left to do
WORKER_LOG = "worker.log"  # in a job's folder: what its processes print
_WORDS = 1 << 16  # bytes at its end that are searched for last words


@dataclass(frozen=True)
class JobSnapshot:
    """A job's state and counts, enough for a line in a list.

    Args:
        state: queued, running, interrupted, done, done-with-errors, failed, cancelled, or new.
        reason: Why it failed.
        hint: What to do about it.
        total: Number of rows; None until they are counted.
        done: Rows that have all their results; None if they were not counted.
        failed: Of these, rows that failed.
        skipped: Of these, rows that were left out.
        model: Its name.
        output: The output's path.
        fingerprint: Of the specification.
        name: What the user called the job.
        tags: The user's tags.
        started: When its first run began, in seconds since the epoch.
        ended: When its last run ended.
        seconds: How long its runs lasted together.
    """

    state: str
    reason: str | None = None
    hint: str | None = None
    total: int | None = None
    done: int | None = None
    failed: int = 0
    skipped: int = 0
    model: str = ""
    output: str = ""
    fingerprint: str = ""
    name: str | None = None
    tags: tuple[str, ...] = ()
    started: float | None = None
    ended: float | None = None
    seconds: float | None = None

    def save(self, folder: Path) -> None:
        """Write `state.json`; durable if the job has ended."""
        write_json(folder / STATE, asdict(self), durable=self.state not in WAITING)

    @classmethod
    def load(cls, folder: Path) -> JobSnapshot | None:
        """Read `state.json`; None if it is missing or can't be read."""
        try:
            data = read_json(f"{folder}/{STATE}")
            # One that was written before there were all of these fields says what it can.
            known = {name: data[name] for name in _FIELDS if name in data}
            return cls(**{**known, "tags": tuple(known.get("tags", ()))})
        except (OSError, ValueError, KeyError, TypeError):  # power loss may leave anything
            return None


_FIELDS = [f.name for f in fields(JobSnapshot)]


def seconds_of(run: Mapping[str, Any]) -> float:
    """How long a run of the journal lasted; if it was killed, or goes on, until its last figures.

    Args:
        run: From `Journal.runs`.
    """
    if run["ended_at"] is not None:
        return max(0.0, float(run["ended_at"]) - float(run["started_at"]))
    return float(run["stats"].get("wall_s") or 0.0)


def last_words(folder: Path, since: float = 0.0, at: int = 0) -> tuple[str, str | None] | None:
    """The last error and hint printed by a process that could not note how it ended.

    Args:
        folder: The job's folder.
        since: Seconds since the epoch; a log last written before that is ignored.
        at: Where in the log to begin, in bytes.
    """
    try:
        with (folder / WORKER_LOG).open("rb") as file:
            if os.fstat(file.fileno()).st_mtime < since:
                return None
            file.seek(max(at, os.fstat(file.fileno()).st_size - _WORDS))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    _, error, words = text.rpartition("error: ")
    reason, _, rest = words.strip().partition("\n")
    if error:
        return reason, rest.removeprefix("hint: ").partition("\n")[0] or None
    # A process that dies during startup leaves a traceback, and nothing after it.
    _, traceback, frames = words.rpartition("Traceback (most recent call last):\n")
    raised = [line for line in frames.splitlines() if line[:1].strip()]
    return (raised[0], None) if traceback and len(raised) == 1 else None
