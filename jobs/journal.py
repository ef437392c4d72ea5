"""The one truth of a job's progress: an SQLite database in its folder.

A result is there, durably, or its row is still to do: there is no third state. One connection
writes, owned by one thread; any number read, also while the job runs.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from array import array
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from jobs.errors import JournalError

NAME = "journal.db"
_VERSION = 1
_APPLICATION = 0x62617463  # "batc"

_SCHEMA = """
CREATE TABLE results (
    id INTEGER PRIMARY KEY,               -- row * n + sample
    status TEXT NOT NULL,                 -- 'ok' or 'error'
    text TEXT,
    token_ids BLOB NOT NULL,              -- little-endian int32
    finish_reason TEXT,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    error TEXT,
    error_kind TEXT,
    queue_s REAL, prefill_s REAL, decode_s REAL,
    run INTEGER NOT NULL
);
CREATE TABLE runs (                       -- one a worker's life
    id INTEGER PRIMARY KEY,
    started_at REAL NOT NULL,             -- unix time
    ended_at REAL,
    state TEXT,                           -- null while it runs or after it was killed
    stats TEXT NOT NULL DEFAULT '{}'
);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

_INSERT = "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_SELECT = "SELECT * FROM results WHERE id >= ? ORDER BY id"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one sample of one row. Times in seconds; None where it never got there."""

    row: int
    sample: int
    status: str
    text: str | None = None
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    error_kind: str | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Results so far.

    `rows` counts rows all of whose samples have a result, `failed` rows any of whose failed.
    """

    rows: int
    samples: int
    failed: int
    prompt_tokens: int
    completion_tokens: int


class DoneSet(Container[tuple[int, int]]):
    """Which (row, sample) have a result: one bit each, whatever the job's length."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._bits = bytearray()

    def __contains__(self, key: object) -> bool:
        row, sample = cast("tuple[int, int]", key)
        number = row * self._n + sample
        byte = number >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (number & 7) & 1)

    @property
    def nbytes(self) -> int:
        """Memory of the bitmap, in bytes."""
        return len(self._bits)

    def add(self, number: int) -> None:
        """Mark `row * n + sample`."""
        byte = number >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits) + (len(self._bits) >> 1)))
        self._bits[byte] |= 1 << (number & 7)


class Journal:
    """Open journal of one job.

    Args:
        folder: The job's folder.
        n: Samples a row.
        readonly: Look without taking any lock that a writer would notice.

    Raises:
        JournalError: There is none, it is damaged, or a newer program wrote it.
    """

    def __init__(self, folder: Path, n: int, *, readonly: bool = False) -> None:
        self.path = folder / NAME
        self.n = n
        self._run = 0
        if not self.path.exists():
            raise JournalError(f"{self.path} is missing", hint="submit the job again")
        mode = "ro" if readonly else "rw"
        wal = self.path.with_name(f"{NAME}-wal")
        if readonly and not wal.exists() and not os.access(folder, os.W_OK):
            mode = "ro&immutable=1"  # SQLite would need to make files beside it
        try:
            self._db = sqlite3.connect(
                f"file:{_quote(self.path)}?mode={mode}", uri=True, isolation_level=None, timeout=30
            )
            if not readonly:
                self._db.execute("PRAGMA journal_mode=WAL")
                # With FULL every commit is on disk before it returns: an acknowledged result
                # survives power loss.
                self._db.execute("PRAGMA synchronous=FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise JournalError(
                f"{self.path} can't be opened: {error}",
                hint="check free disk space and permissions; a copy of the folder may help",
            ) from error
        if version != _VERSION:
            self._db.close()
            raise JournalError(
                f"{self.path} has version {version}, this program knows {_VERSION}",
                hint="upgrade batchrun" if version > _VERSION else "submit the job again",
            )

    @staticmethod
    def create(folder: Path) -> None:
        """Make an empty journal; it is durable on return.

        Raises:
            JournalError: It can't be made.
        """
        db = sqlite3.connect(folder / NAME, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.executescript(
                f"BEGIN;{_SCHEMA}PRAGMA user_version={_VERSION};"
                f"PRAGMA application_id={_APPLICATION};COMMIT;"
            )
        except sqlite3.Error as error:
            raise JournalError(f"{folder / NAME} can't be made: {error}") from error
        finally:
            db.close()

    def begin_run(self) -> int:
        """Note that a worker begins; its results carry the number that is returned."""
        with self._errors("written"):
            cursor = self._db.execute("INSERT INTO runs (started_at) VALUES (?)", (time.time(),))
        self._run = cursor.lastrowid or 0
        return self._run

    def resume_run(self, run: int) -> None:
        """Go on writing for a run that another connection began."""
        self._run = run

    def write(self, results: Sequence[Result], stats: dict[str, Any] | None = None) -> None:
        """Add results in one transaction: all of them are durable on return, or none is.

        Args:
            results: New results.
            stats: The run's statistics so far; they replace those written before.

        Raises:
            JournalError: A result is there already or of a sample that the job hasn't, or the disk
                refuses. Nothing was written.
        """
        run, n = self._run, self.n
        for r in results:
            # Out of range it would be stored as another row's.
            if not (r.row >= 0 and 0 <= r.sample < n):
                raise JournalError(f"the job has no row {r.row}, sample {r.sample}: n is {n}")
        rows = [
            (
                r.row * n + r.sample,
                r.status,
                r.text,
                array("i", r.token_ids).tobytes(),
                r.finish_reason,
                r.prompt_tokens,
                r.completion_tokens,
                r.error,
                r.error_kind,
                r.queue_s,
                r.prefill_s,
                r.decode_s,
                run,
            )
            for r in results
        ]
        with self._errors("written"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany(_INSERT, rows)
                if stats is not None:
                    self._db.execute(
                        "UPDATE runs SET stats = ? WHERE id = ?", (json.dumps(stats), run)
                    )
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def end_run(self, state: str, stats: dict[str, Any]) -> None:
        """Close the run's entry with how it ended."""
        with self._errors("written"):
            self._db.execute(
                "UPDATE runs SET ended_at = ?, state = ?, stats = ? WHERE id = ?",
                (time.time(), state, json.dumps(stats), self._run),
            )

    def set_meta(self, key: str, value: Any) -> None:
        """Remember a small JSON value."""
        with self._errors("written"):
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def meta(self, key: str) -> Any:
        """A value remembered by `set_meta`, or None."""
        found = self._all("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(found[0][0]) if found else None

    def done(self) -> DoneSet:
        """Which results there are, as a bitmap."""
        done = DoneSet(self.n)
        with self._errors("read"):
            for (number,) in self._db.execute("SELECT id FROM results ORDER BY id"):
                done.add(number)
        return done

    def counts(self) -> Counts:
        """Results so far."""
        [(samples, failed, prompt, completion)] = self._all(
            "SELECT count(*), count(DISTINCT CASE status WHEN 'error' THEN id / ? END), "
            "ifnull(sum(prompt_tokens), 0), ifnull(sum(completion_tokens), 0) FROM results",
            self.n,
        )
        rows = samples
        if self.n > 1:
            [(rows,)] = self._all(
                "SELECT count(*) FROM (SELECT 1 FROM results GROUP BY id / ? HAVING count(*) = ?)",
                self.n,
                self.n,
            )
        return Counts(rows, samples, failed, prompt, completion)

    def tally(self, column: str) -> dict[str, int]:
        """Samples by `finish_reason` or rows by `error_kind`, most frequent first."""
        what = {"finish_reason": "*", "error_kind": f"DISTINCT id / {self.n}"}[column]
        return dict(
            self._all(
                f"SELECT {column}, count({what}) FROM results WHERE {column} IS NOT NULL "
                "GROUP BY 1 ORDER BY 2 DESC, 1"
            )
        )

    def quantiles(self, column: str, shares: Sequence[float]) -> list[float] | None:
        """Quantiles (nearest rank) of `queue_s`, `prefill_s` or `decode_s`; None without any."""
        assert column in {"queue_s", "prefill_s", "decode_s"}
        [(count,)] = self._all(f"SELECT count({column}) FROM results")
        if not count:
            return None
        ranks = [min(count - 1, int(share * count)) for share in shares]
        ranked = f"row_number() OVER (ORDER BY {column}) - 1 AS rank"
        found = dict(
            self._all(
                f"SELECT rank, {column} FROM (SELECT {column}, {ranked} FROM results "
                f"WHERE {column} IS NOT NULL) WHERE rank IN ({', '.join(map(str, ranks))})"
            )
        )
        return [found[rank] for rank in ranks]

    def results(self, first_row: int = 0) -> Iterator[Result]:
        """Results in (row, sample) order, streamed."""
        with self._errors("read"):
            cursor = self._db.execute(_SELECT, (first_row * self.n,))
            for number, status, text, ids, *rest in cursor:
                tokens = array("i")
                tokens.frombytes(ids)
                row, sample = divmod(number, self.n)
                yield Result(row, sample, status, text, tuple(tokens), *rest[:-1])

    def runs(self) -> list[dict[str, Any]]:
        """Every worker's run: `id`, `started_at`, `ended_at`, `state`, `stats`."""
        names = ("id", "started_at", "ended_at", "state", "stats")
        return [
            {**dict(zip(names, run, strict=True)), "stats": json.loads(run[4])}
            for run in self._all(f"SELECT {', '.join(names)} FROM runs ORDER BY id")
        ]

    def check(self) -> None:
        """Verify the database's integrity.

        Raises:
            JournalError: It is damaged; the message says how.
        """
        try:
            found = [row[0] for row in self._db.execute("PRAGMA integrity_check(3)")]
        except sqlite3.DatabaseError as error:
            found = [str(error)]
        if found != ["ok"]:
            raise JournalError(f"{self.path} is damaged: {'; '.join(found)}")

    def close(self) -> None:
        """Close the connection; everything written is durable already."""
        self._db.close()

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._errors("read"):
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """SQLite's errors as the user's: what could not be `done`, and what to do."""
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise JournalError(f"a result was about to be journalled twice: {error}") from error
        except sqlite3.OperationalError as error:
            raise JournalError(
                f"{self.path} can't be {done}: {error}",
                hint="make room on the disk, then: batchrun resume",
            ) from error
        except sqlite3.DatabaseError as error:
            raise JournalError(
                f"{self.path} is damaged: {error}",
                hint="restore the job's folder from a copy, or submit the job again",
            ) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _quote(path: Path) -> str:
    from urllib.parse import quote  # noqa: PLC0415 - only here

    return quote(str(path.absolute()))
