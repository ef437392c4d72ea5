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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batchrun.jobs.checksums import sealed
from batchrun.jobs.files import open_private, read_json

LOG = "log.jsonl"
_PROGRESS = "progress.json"
_EVERY_S = 0.25


@dataclass(frozen=True)
class Progress:
    """Where a job is. Rows and samples count those of earlier runs too, tokens only this run's."""

    rows_total: int | None
    rows_done: int
    rows_failed: int
    rows_resumed: int
    completion_tokens: int
    running: int
    waiting: int
    elapsed_s: float
    phase: str


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

    def update(self, progress: Progress) -> None:
        """Publish the newest state, a few times a second."""
        now = time.monotonic()
        if now - self._written >= _EVERY_S or progress.phase != self._phase:
            self._written, self._phase = now, progress.phase
            temporary = self._progress.with_suffix(f".{os.getpid()}")
            try:
                with open(temporary, "w", encoding="ascii", opener=open_private) as file:
                    file.write(json.dumps(sealed(asdict(progress))))
                temporary.replace(self._progress)
            except OSError:
                temporary.unlink(missing_ok=True)

    def message(self, text: str) -> None:
        """Add a line to the log."""
        line = json.dumps({"time": round(time.time(), 3), "message": text}, ensure_ascii=False)
        with self._lock, suppress(OSError):
            os.write(self._log, f"{line}\n".encode(errors="backslashreplace"))

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._log)


def forget_progress(folder: Path) -> None:
    """Remove what an earlier run published."""
    (folder / _PROGRESS).unlink(missing_ok=True)


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
        return {"time": float(entry["time"]), "message": text}
    return {"time": math.nan, "message": ascii(line.rstrip().decode(errors="replace"))}


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
