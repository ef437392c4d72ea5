"""Queries on a journal, the same for its writer and for any number of readers."""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from weakref import WeakSet

from batchrun.jobs.checksums import checksum
from batchrun.jobs.errors import JournalError
from batchrun.jobs.journal.results import Counts, DoneSet, Partial, Result, Scores, unpacked
from batchrun.jobs.journal.schema import BEYOND_REPAIR, KEYS, TABLES, refusal

_SELECTS = {t: f"SELECT {', '.join(columns)}, crc FROM {t}" for t, columns in TABLES.items()}
_SHOWN = 5  # damaged records shown in a message
_WHAT = {  # what a record of each table is called, to be followed by its key
    "results": "the result of row",
    "partials": "the unfinished result of row",
    "crashes": "the crash of row",
    "rows": "the digest of row",
    "runs": "the figures of run",
    "samples": "the figures over time, sample",
    "meta": "the note",
}
_CONTRADICTIONS = {
    "a sample has both a result and partial tokens": (
        "SELECT 1 FROM partials JOIN results USING (id) LIMIT 1"
    ),
    "a result belongs to a run that does not exist": (
        "SELECT 1 FROM results WHERE run NOT IN (SELECT id FROM runs) LIMIT 1"
    ),
    "a result has an unknown status": (
        "SELECT 1 FROM results WHERE status NOT IN ('ok', 'error', 'skipped') LIMIT 1"
    ),
}


@dataclass(frozen=True)
class Damage:
    """A record of a journal that is not what was written.

    Args:
        table: Its table.
        key: Its key, which may itself be damaged.
        what: The record in words.
    """

    table: str
    key: tuple[Any, ...]
    what: str


CONDEMNED = "condemned"  # in meta: rows that must not be tried again, by number, and why


class Readings:
    """Reads an open journal.

    Args:
        path: The database, for messages.
        n: Samples per row.
        db: A connection to it.
    """

    def __init__(self, path: Path, n: int, db: sqlite3.Connection) -> None:
        self.path, self.n, self._db = path, n, db
        self._failed: Exception | None = None  # a failed write, after which nothing is certain
        self._cursors = WeakSet[sqlite3.Cursor]()

    def meta(self, key: str) -> Any:
        """A value remembered by `set_meta`, or None.

        Raises:
            JournalError: It is damaged.
        """
        found = self._proven("meta", "WHERE key = ?", key)
        return json.loads(found[0][1]) if found else None

    def done(self) -> DoneSet:
        """The samples that have a result, as a bitmap."""
        done = DoneSet(self.n)
        with self._errors("read"):
            for (number,) in self._streamed("SELECT id FROM results ORDER BY id"):
                done.add(number)
        return done

    def partials(self) -> dict[tuple[int, int], Partial]:
        """Tokens so far of samples without a result, by (row, sample), without damaged ones."""
        partials = (
            Partial(number // self.n, number % self.n, _tokens(ids), logprob, unpacked(logprobs))
            for number, ids, logprob, logprobs in self._sound("partials")
        )
        return {(p.row, p.sample): p for p in partials}

    def crash_counts(self) -> dict[int, int]:
        """By row, how often it was in the engine in a crash, without damaged records."""
        return Counter(row for row, _ in self._sound("crashes"))

    def condemned(self) -> dict[int, str]:
        """Rows that must not be tried again, and why."""
        return {int(row): reason for row, reason in (self.meta(CONDEMNED) or {}).items()}

    def counts(self) -> Counts:
        """Results so far."""
        [(samples, failed, skipped, prompt, completion)] = self._all(
            "SELECT count(*), count(DISTINCT CASE status WHEN 'error' THEN id / ?1 END), "
            "count(DISTINCT CASE status WHEN 'skipped' THEN id / ?1 END), "
            "ifnull(sum(prompt_tokens), 0), ifnull(sum(completion_tokens), 0) FROM results",
            self.n,
        )
        rows = samples
        if self.n > 1:
            [(rows,)] = self._all(
                "SELECT count(*) FROM "
                "(SELECT 1 FROM results GROUP BY id / ?1 HAVING count(*) = ?1)",
                self.n,
            )
        return Counts(rows, samples, failed, skipped, prompt, completion)

    def whole_rows(self) -> Iterator[int]:
        """The rows all of whose samples have an answer, in order, streamed."""
        with self._errors("read"):
            found = self._streamed("SELECT id FROM results WHERE status = 'ok' ORDER BY id")
            for row, samples in groupby(number // self.n for (number,) in found):
                if sum(1 for _ in samples) == self.n:
                    yield row

    def finished(self, rows: range | None = None, *, failed: bool = False) -> Iterator[int]:
        """The rows that have a result, in order, streamed.

        Args:
            rows: Only those of these consecutive rows.
            failed: Only those with a failed sample.
        """
        span = () if rows is None else (rows.start * self.n, rows.stop * self.n)
        which = ["id >= ? AND id < ?"] * bool(span) + ["status = 'error'"] * failed
        query = f"SELECT id FROM results {'WHERE ' * bool(which)}{' AND '.join(which)} ORDER BY id"
        with self._errors("read"):
            found = self._streamed(query, *span)
            for row, _ in groupby(number // self.n for (number,) in found):
                yield row

    def answering_runs(self) -> set[int]:
        """The runs that have answers here."""
        return {run for (run,) in self._all("SELECT DISTINCT run FROM results WHERE status = 'ok'")}

    def results(self, rows: range | None = None, *, skip_damaged: bool = False) -> Iterator[Result]:
        """Results in (row, sample) order, streamed.

        Args:
            rows: Only those of these consecutive rows.
            skip_damaged: Leave out damaged results.

        Raises:
            JournalError: One is damaged; the message says which.
        """
        span = () if rows is None else (rows.start * self.n, rows.stop * self.n)
        which = "WHERE id >= ? AND id < ? " * bool(span)
        for record, sound in self._records("results", f"{which}ORDER BY id", *span):
            if sound:
                number, status, text, ids, *rest, _, logprob, logprobs, scores = record
                rest += logprob, unpacked(logprobs), scores and Scores.unpacked(scores)
                row, sample = divmod(number, self.n)
                yield Result(row, sample, status, text, _tokens(ids), *rest)
            elif not skip_damaged:
                raise self._damaged(self.damage())

    def first_failure(self, kind: str) -> Result | None:
        """The first failed sample of this `error_kind`; None if there is none, or it is damaged."""
        where = "WHERE error_kind = ? ORDER BY id LIMIT 1"
        for record, sound in self._records("results", where, kind):
            if sound:
                row, sample = divmod(record[0], self.n)
                return next(r for r in self.results(range(row, row + 1)) if r.sample == sample)
        return None

    def kept(self, run: int) -> int:
        """Number of samples that earlier runs ended."""
        [(count,)] = self._all("SELECT count(*) FROM results WHERE run < ?", run)
        return int(count)

    def answers(self, most: int) -> Iterator[tuple[int, ...]]:
        """Tokens of the last answers, the last row's first, until they are `most` tokens or more.

        Leaves out damaged ones.
        """
        records = self._records("results", "WHERE status = 'ok' ORDER BY id DESC")
        for ids in (_tokens(record[3]) for record, sound in records if sound):
            yield ids
            if (most := most - len(ids)) <= 0:
                return

    def digests(self, first: int, count: int) -> dict[int, int]:
        """Digests of the input rows read, by row, for `count` rows from `first` on.

        Leaves out damaged ones, whose content is unknown.
        """
        return dict(self._sound("rows", "WHERE row >= ? AND row < ?", first, first + count))

    def runs(self) -> list[dict[str, Any]]:
        """Every worker's run: `id`, `started_at`, `ended_at`, `state`, `stats`, `reason`.

        Raises:
            JournalError: One is damaged.
        """
        return [
            {**dict(zip(TABLES["runs"], run, strict=True)), "stats": json.loads(run[4])}
            for run in self._proven("runs", "ORDER BY id")
        ]

    def samples(self, run: int) -> list[dict[str, Any]]:
        """A run's figures over time, by metric name, without damaged records."""
        found = self._sound("samples", "WHERE run = ? ORDER BY id", run)
        return [json.loads(figures) for _, _, figures in found]

    def beyond(self, rows: int) -> int:
        """Number of results for rows beyond the job's number of rows."""
        [(count,)] = self._all("SELECT count(*) FROM results WHERE id >= ?", rows * self.n)
        return int(count)

    def check(self) -> None:
        """Verify the database's integrity, every record, and that no two contradict each other.

        Raises:
            JournalError: It is damaged; the message says how.
        """
        self.check_structure()
        damage = self.damage()
        if damage:
            raise self._damaged(damage)
        found = [what for what, query in _CONTRADICTIONS.items() if self._all(query)]
        if found:
            raise JournalError(f"{self.path} is damaged: {'; '.join(found)}")

    def check_structure(self) -> None:
        """Verify the file's structure by SQLite's own check.

        Raises:
            JournalError: It is damaged; the message says how.
        """
        try:
            with self._lenient():
                found = [row[0] for row in self._db.execute("PRAGMA integrity_check(3)")]
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            found = [str(error)]
        if found != ["ok"]:
            raise JournalError(f"{self.path} is damaged: {'; '.join(found)}", hint=BEYOND_REPAIR)

    def damage(self) -> list[Damage]:
        """Records that are not what was written. Reads all of them.

        Raises:
            JournalError: The file can't be read.
        """
        return [
            self._damage(table, record)
            for table in TABLES
            for record, sound in self._records(table)
            if not sound
        ]

    def _damage(self, table: str, record: tuple[Any, ...]) -> Damage:
        key, what = record[: len(KEYS[table])], _WHAT[table]
        if table not in {"results", "partials"}:
            return Damage(table, key, f"{what} {key[0]!r}")
        row, sample = divmod(key[0], self.n)
        which = f", sample {sample}" if self.n > 1 else ""
        return Damage(table, key, f"{what} {row}{which}")

    def _damaged(self, damage: Sequence[Damage]) -> JournalError:
        shown = [found.what for found in damage[:_SHOWN]]
        if len(damage) > _SHOWN:
            shown.append(f"{len(damage) - _SHOWN:,} more")
        name = self.path.parent.name
        return JournalError(
            f"{self.path} is damaged: wrong checksum for {', '.join(shown)}",
            hint=f"batchrun resume {name} removes and computes again what is damaged, "
            f"batchrun export {name} --partial leaves it out",
        )

    def _sound(self, table: str, which: str = "", *values: Any) -> list[tuple[Any, ...]]:
        """Records of a table that are not damaged."""
        return [record for record, sound in self._records(table, which, *values) if sound]

    def _proven(self, table: str, which: str, *values: Any) -> list[tuple[Any, ...]]:
        """Records of a table; raises JournalError if one is damaged."""
        found = list(self._records(table, which, *values))
        if damage := [self._damage(table, record) for record, sound in found if not sound]:
            raise self._damaged(damage)
        return [record for record, _ in found]

    def _records(
        self, table: str, which: str = "", *values: Any
    ) -> Iterator[tuple[tuple[Any, ...], bool]]:
        """Records of a table, and whether each is what was written."""
        with self._errors("read"), self._lenient():
            for row in self._streamed(f"{_SELECTS[table]} {which}", *values):
                record = row[:-1]
                yield record, checksum(record) == row[-1]

    def _streamed(self, query: str, *values: Any) -> sqlite3.Cursor:
        """What a query finds, until it has been read or the journal is closed."""
        cursor = self._db.execute(query, values)
        self._cursors.add(cursor)
        return cursor

    def _end_reading(self) -> None:
        """End what is read in part: as long as it lives it would hold up other processes."""
        for cursor in [*self._cursors]:
            cursor.close()
        self._cursors.clear()

    @contextmanager
    def _lenient(self) -> Iterator[None]:
        """Allow reading text that is not UTF-8: its checksum shows that it is damaged."""
        before = self._db.text_factory
        self._db.text_factory = lambda data: data.decode(errors="replace")
        try:
            yield
        finally:
            self._db.text_factory = before

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._errors("read"):
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """Turn SQLite's errors into a user's: what could not be `done`, and what to do."""
        if self._failed is not None:
            raise JournalError(
                f"{self.path} can't be {done}: an earlier write failed: {self._failed}",
                hint="batchrun resume",
            )
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise JournalError(f"a result was about to be journalled twice: {error}") from error
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            code, hint = getattr(error, "sqlite_errorcode", 0) & 0xFF, "make room on the disk, then"
            if isinstance(error, OSError):
                hint = "when the disk is in order again"
            if isinstance(error, OSError) or code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL):
                self._failed = error
            raise refusal(self.path, done, error, f"{hint}: batchrun resume") from error


def _tokens(data: bytes) -> tuple[int, ...]:
    tokens = array("i")
    tokens.frombytes(data)
    return tuple(tokens)
