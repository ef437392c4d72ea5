"""The journal's tables, and how they are created and opened."""

from __future__ import annotations

import errno
import json
import math
import os
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from batchrun.jobs.checksums import checksum
from batchrun.jobs.errors import LOCAL_DISK, JournalError, cause_of
from batchrun.jobs.files import open_private

NAME = "journal.db"
VERSION = 2
COMMAND = "command"  # key in `meta`: what submitted the job; older jobs have none
SETUP = "setup of run {}"  # likewise: what a run ran with and on
_HEADER, _WRITE_VERSION = 100, 18  # size and offset in bytes (sqlite.org/fileformat2, 1.3)
_APPLICATION = 0x62617463  # "batc"
BEYOND_REPAIR = "restore the job's folder from a copy, or submit the job again"

# Tables, in the order in which damage is reported.
_NAMES = ("results", "partials", "crashes", "rows", "runs", "samples", "meta")
_SCHEMA = """
CREATE TABLE results (
    id INTEGER PRIMARY KEY,               -- row * n + sample
    status TEXT NOT NULL,                 -- 'ok', 'error' or 'skipped'
    text TEXT,
    token_ids BLOB NOT NULL,              -- little-endian int32
    finish_reason TEXT,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    error TEXT,
    error_kind TEXT,
    queue_s REAL, prefill_s REAL, decode_s REAL,
    run INTEGER NOT NULL,
    logprob REAL,                         -- sum over its tokens; null where no one asked for it
    logprobs BLOB,                        -- each of them: `results.packed`; null likewise
    scores BLOB,                          -- of known tokens: `Scores.packed`; null likewise
    crc INTEGER
);
CREATE TABLE runs (                       -- one a worker's life; the id is its fencing token
    id INTEGER PRIMARY KEY,
    started_at REAL NOT NULL,             -- unix time
    ended_at REAL,
    state TEXT,                           -- null while it runs or after it was killed
    stats TEXT NOT NULL DEFAULT '{}',
    reason TEXT,                          -- why it failed
    crc INTEGER
);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, crc INTEGER);
CREATE TABLE partials (                   -- tokens of samples that have no result yet
    id INTEGER PRIMARY KEY,               -- row * n + sample
    token_ids BLOB NOT NULL,              -- little-endian int32
    logprob REAL,
    logprobs BLOB,
    crc INTEGER
);
CREATE TABLE crashes (                    -- rows that were in the engine as a run's process died
    row INTEGER NOT NULL,
    run INTEGER NOT NULL,
    crc INTEGER,
    PRIMARY KEY (row, run)
) WITHOUT ROWID;
CREATE TABLE rows (                       -- input rows as they were read
    row INTEGER PRIMARY KEY,
    digest INTEGER NOT NULL,              -- 64 bits
    crc INTEGER
);
CREATE TABLE samples (                    -- a run's figures over time
    id INTEGER PRIMARY KEY,
    run INTEGER NOT NULL,
    figures TEXT NOT NULL,                -- JSON; seconds since the run began are its wall_s
    crc INTEGER
);
"""


def _columns(db: sqlite3.Connection, table: str) -> list[tuple[str, str, int]]:
    """Name, type and place in the key."""
    info = db.execute(f"PRAGMA table_info({table})")
    return [(name, kind, key) for _, name, kind, _, _, key in info]


with closing(sqlite3.connect(":memory:")) as _db:
    _db.executescript(_SCHEMA)
    _MADE = {table: _columns(_db, table) for table in _NAMES}

# Every table's columns; each record ends with the checksum of its values.
TABLES = {table: tuple(name for name, _, _ in made[:-1]) for table, made in _MADE.items()}
SEALS = {table: f"checksum({', '.join(columns)})" for table, columns in TABLES.items()}
KEYS = {table: tuple(name for name, _, key in made if key) for table, made in _MADE.items()}


def create(folder: Path, meta: Mapping[str, Any] | None = None) -> None:
    """Make an empty journal that remembers `meta`; its content is durable on return.

    Raises:
        JournalError: It can't be made.
    """
    try:
        os.close(open_private(folder / NAME, os.O_RDWR))  # SQLite gives its other files this mode
        with closing(sqlite3.connect(folder / NAME, isolation_level=None)) as db:
            _set_modes(db)
            db.executescript(
                f"BEGIN;{_SCHEMA}"
                f"PRAGMA user_version={VERSION};PRAGMA application_id={_APPLICATION};"
            )
            notes = [sealed(key, json.dumps(value)) for key, value in (meta or {}).items()]
            db.executemany("INSERT INTO meta VALUES (?, ?, ?)", notes)
            db.execute("COMMIT")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # `close` would not report a failure
    except (sqlite3.Error, OSError) as error:
        raise refusal(folder / NAME, "made", error) from error


def connect(path: Path, *, readonly: bool) -> sqlite3.Connection:
    """Open a journal. A reader takes no lock that a writer would notice.

    Raises:
        JournalError: It is missing or damaged, or another version of the program wrote it.
    """
    if not path.exists():
        raise JournalError(f"{path} is missing", hint="submit the job again")
    mode = "ro" if readonly else "rw"
    wal = path.with_name(f"{NAME}-wal")
    if readonly and not wal.exists() and not os.access(path.parent, os.W_OK):
        mode = "ro&immutable=1"  # otherwise SQLite would have to create files beside it
    address = f"{path.absolute().as_uri()}?mode={mode}"
    try:
        db = sqlite3.connect(address, uri=True, isolation_level=None, timeout=30)
        try:
            db.create_function("checksum", -1, lambda *values: checksum(values), deterministic=True)
            if readonly:
                db.execute("PRAGMA temp_store=MEMORY")
            else:
                _set_modes(db)
                _settle_log(db, wal)
            _check_schema(db, path)
        except BaseException:
            db.close()
            raise
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        hint = "check free disk space and permissions, or restore the job's folder from a copy"
        raise refusal(path, "opened", error, hint) from error
    return db


def refusal(path: Path, done: str, error: Exception, hint: str | None = None) -> JournalError:
    """An error of SQLite or the system, as a user's error.

    Args:
        path: The journal.
        done: What could not be done with it.
        error: The cause. Without a code it is Python's own: text that is not UTF-8.
        hint: What to do, unless the file system lacks locks or shared memory.
    """
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    damage = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
    if code in damage and not isinstance(error, OSError):
        return JournalError(f"{path} is damaged: {error}", BEYOND_REPAIR)
    name, told = getattr(error, "sqlite_errorname", ""), str(error)
    if code == sqlite3.SQLITE_FULL:
        told = cause_of(OSError(errno.ENOSPC, told), path)
    if isinstance(error, OSError) and error.filename is None:
        told = error.strerror or told
    elif name.startswith("SQLITE_IOERR"):  # SQLite's message alone says too little
        told = f"{told} ({name})"
    if any(part in name for part in ("LOCK", "_SHMMAP", "_SHMOPEN", "SQLITE_PROTOCOL")):
        hint = LOCAL_DISK
    return JournalError(f"{path} can't be {done}: {told}", hint)


def _set_modes(db: sqlite3.Connection) -> None:
    [(mode,)] = db.execute("PRAGMA journal_mode=WAL")
    if mode != "wal":  # no error is raised when a sync fails inside
        raise OSError(f"its write-ahead log can't be created: the journal mode is {mode!r}")
    # With FULL every commit is on disk before it returns, so that an acknowledged result survives
    # power loss.
    db.execute("PRAGMA synchronous=FULL")
    # SQLite's automatic checkpoints don't report failures.
    db.execute("PRAGMA wal_autocheckpoint=0")


def _settle_log(db: sqlite3.Connection, log: Path) -> None:
    """Safely move what an earlier process left in the log into the database.

    After a failed fsync a log may look whole but have holes on disk, which no later fsync fills:
    its pages count as written (Rebello et al., ATC 2020). So it is rewritten before SQLite relies
    on it, and emptied before anything is appended to it.
    """
    if log.exists() and log.stat().st_size:
        with transaction(db), log.open("r+b") as file:  # no one else writes meanwhile
            data = file.read()
            file.seek(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # waits for readers as for a lock


def _check_schema(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != VERSION:
        raise JournalError(
            f"{path} has version {version}; this batchrun reads version {VERSION}",
            hint="pip install --upgrade batchrun-llm" if version > VERSION else BEYOND_REPAIR,
        )
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if len(header) == _HEADER and header[_WRITE_VERSION] > 2:  # SQLite would refuse to write it
        raise JournalError(f"{path} is damaged: its header is not SQLite's", BEYOND_REPAIR)
    # If a column lost its key flag, SQLite would silently find no records by it.
    for table, columns in _MADE.items():
        if _columns(db, table) != columns:
            raise JournalError(
                f"{path} is damaged: its table {table} has the wrong columns", BEYOND_REPAIR
            )


def sealed(*values: Any) -> tuple[Any, ...]:
    """A record as it is stored."""
    return (*values, checksum(values))


def int32(tokens: Iterable[int]) -> bytes:
    """Tokens as they are stored."""
    return array("i", tokens).tobytes()


def real(value: float | None) -> float | None:
    """A number as SQLite returns it: SQLite has no NaN."""
    return None if value is None or math.isnan(value) else float(value)


def storable(text: str | None) -> str | None:
    """Text without lone surrogates, which file names may contain and SQLite refuses."""
    return text and text.encode(errors="backslashreplace").decode()


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """A transaction: all that the block writes is durable after it, or none of it is there."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            with suppress(sqlite3.Error):  # the error being raised says more
                db.execute("ROLLBACK")
        raise
