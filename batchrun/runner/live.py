"""What a running job publishes for watchers: its progress and its log.

Neither is durable, nor needed for anything but watching.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from batchrun.jobs.checksums import sealed
from batchrun.jobs.files import open_private, read_json

LOG = "log.jsonl"
NOTE, STORY = "note", "story"  # levels of its lines: whoever watches sees notes alone
_PROGRESS = "progress.json"
_EVERY_S = 0.2
START = "start"  # the phase before a run says anything
HOOK = "hook"  # the phase of a command of --on-done


@dataclass(frozen=True)
class Progress:
    """Where a job is. Rows count those of earlier runs too, tokens only this run's.

    Args:
        rows_total: None until they are counted.
        rows_resumed: Rows that earlier runs finished.
        completion_tokens: Generated so far, those of unfinished rows included.
        elapsed_s: Since the run began.
        phase: `start`, `load`, `compile`, `check`, `run`, `export` or `hook`.
        running, waiting: Sequences in the engine.
        phase_done, phase_total: How far the phase is: bytes of weights, or rows written; 0 of 0 if
            that is unknown.
        reason: The most frequent kind of error of failed rows.
        tokens_per_s, mean_tokens_per_s: Over the last seconds, and since the engine began.
        kv_live, kv_mapped, kv_budget: Bytes of KV memory that hold tokens, that are mapped, and
            that may be; 0 if unknown.
        seconds_left: Estimated time to the end; `least_left` to `most_left` in 8 of 10 cases.
        submitted_at: When the job was started or resumed, in seconds since the epoch.
    """

    rows_total: int | None = None
    rows_done: int = 0
    rows_failed: int = 0
    rows_resumed: int = 0
    completion_tokens: int = 0
    running: int = 0
    waiting: int = 0
    elapsed_s: float = 0.0
    phase: str = START
    phase_done: int = 0
    phase_total: int = 0
    reason: str = ""
    tokens_per_s: float | None = None
    mean_tokens_per_s: float | None = None
    kv_live: int = 0
    kv_mapped: int = 0
    kv_budget: int = 0
    seconds_left: float | None = None
    least_left: float | None = None
    most_left: float | None = None
    submitted_at: float = 0.0


class Reporter:
    """Writes a run's progress and log where others can read them.

    Failed writes are ignored: on a full disk the journal's error is the better one.

    Args:
        folder: The job's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._progress = folder / _PROGRESS
        self._log = open_private(folder / LOG, os.O_WRONLY | os.O_APPEND)
        self._lock = threading.Lock()
        self._written = 0.0
        self._phase = ""
        started = read_progress(folder)
        self._submitted_at = 0.0 if started is None else started.submitted_at

    def update(self, progress: Progress) -> None:
        """Publish the newest state, a few times a second; where a phase begins and ends, always."""
        now = time.monotonic()
        ends = bool(progress.phase_total) and progress.phase_done >= progress.phase_total
        if now - self._written >= _EVERY_S or progress.phase != self._phase or ends:
            self._written, self._phase = now, progress.phase
            _publish(self._progress, replace(progress, submitted_at=self._submitted_at))

    def message(self, text: str, level: str = NOTE) -> None:
        """Add a line to the log."""
        entry = {"time": round(time.time(), 3), "level": level, "message": text}
        line = json.dumps(entry, ensure_ascii=False)
        with self._lock, suppress(OSError):
            os.write(self._log, f"{line}\n".encode(errors="backslashreplace"))

    def story(self, text: str) -> None:
        """Add a line that says what views of the job show themselves."""
        self.message(text, STORY)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._log)


def publish_start(folder: Path) -> None:
    """Replace what an earlier run published: another one is about to start."""
    _publish(folder / _PROGRESS, Progress(submitted_at=time.time()))


def _publish(path: Path, progress: Progress) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        with open(temporary, "w", encoding="ascii", opener=open_private) as file:
            file.write(json.dumps(sealed(asdict(progress))))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)


def read_progress(folder: Path) -> Progress | None:
    """What a run last published; None if it has published nothing, or that is damaged."""
    try:
        return Progress(**read_json(folder / _PROGRESS))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _entry(line: bytes) -> dict[str, Any]:
    """A log line's entry; a damaged line becomes a message as it is, with an unknown time."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        entry = json.loads(line)
        text = str(entry["message"]).encode(errors="backslashreplace").decode()
        level = STORY if entry.get("level") == STORY else NOTE
        return {"time": float(entry["time"]), "level": level, "message": text}
    return {
        "time": math.nan,
        "level": NOTE,
        "message": ascii(line.rstrip().decode(errors="replace")),
    }


class LogTail:
    """Reads a job's log as it grows.

    Args:
        folder: The job's folder.
        begin: Where to begin, in bytes.
    """

    def __init__(self, folder: Path, begin: int = 0) -> None:
        self._path, self._at = folder / LOG, begin

    @classmethod
    def at_end(cls, folder: Path) -> LogTail:
        """A tail of what is added from now on."""
        path = folder / LOG
        return cls(folder, path.stat().st_size if path.exists() else 0)

    def lines(self) -> Iterator[dict[str, Any]]:
        """What was added since the last call, whole lines only."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._at += len(line)
                yield _entry(line)
