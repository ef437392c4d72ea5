"""What a journal says: the same questions for its writer and for any number of readers."""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.errors import JournalError
from jobs.results import Counts, DoneSet, Partial, Result

_SELECT = (
    "SELECT id, status, text, token_ids, finish_reason, prompt_tokens, completion_tokens, error, "
    "error_kind, queue_s, prefill_s, decode_s, logprob FROM results WHERE id >= ? ORDER BY id"
)
_CONTRADICTIONS = {
    "a sample has both a result and tokens to go on from": (
        "SELECT 1 FROM partials JOIN results USING (id) LIMIT 1"
    ),
    "a result is of a run that never was": (
        "SELECT 1 FROM results WHERE run NOT IN (SELECT id FROM runs) LIMIT 1"
    ),
    "a result has a status that no program gives": (
        "SELECT 1 FROM results WHERE status NOT IN ('ok', 'error', 'skipped') LIMIT 1"
    ),
}


class Readings:
    """Reads an open journal.

    Args:
        path: The database, for messages.
        n: Samples a row.
        db: A connection to it.
    """

    def __init__(self, path: Path, n: int, db: sqlite3.Connection) -> None:
        self.path, self.n, self._db = path, n, db
        self._failed: Exception | None = None  # the write after which nothing is certain

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

    def partials(self) -> dict[tuple[int, int], Partial]:
        """Tokens so far of samples that have no result, by (row, sample)."""
        found = self._all("SELECT id, token_ids, logprob FROM partials ORDER BY id")
        partials = (
            Partial(number // self.n, number % self.n, _tokens(ids), logprob)
            for number, ids, logprob in found
        )
        return {(p.row, p.sample): p for p in partials}

    def crash_counts(self) -> dict[int, int]:
        """In how many crashes a row was in the engine, by row."""
        return dict(self._all("SELECT row, count(*) FROM crashes GROUP BY row"))

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
                row, sample = divmod(number, self.n)
                yield Result(row, sample, status, text, _tokens(ids), *rest)

    def digests(self, first: int, count: int) -> dict[int, int]:
        """Digests of the input rows that were read, of `count` from row `first` on, by row."""
        query = "SELECT row, digest FROM rows WHERE row >= ? AND row < ?"
        return dict(self._all(query, first, first + count))

    def runs(self) -> list[dict[str, Any]]:
        """Every worker's run: `id`, `started_at`, `ended_at`, `state`, `stats`, `reason`."""
        names = ("id", "started_at", "ended_at", "state", "stats", "reason")
        return [
            {**dict(zip(names, run, strict=True)), "stats": json.loads(run[4])}
            for run in self._all(f"SELECT {', '.join(names)} FROM runs ORDER BY id")
        ]

    def beyond(self, rows: int) -> int:
        """Results of rows that a job of so many rows hasn't."""
        [(count,)] = self._all("SELECT count(*) FROM results WHERE id >= ?", rows * self.n)
        return int(count)

    def check(self) -> None:
        """Verify the database's integrity, and that nothing in it contradicts itself.

        Raises:
            JournalError: It is damaged; the message says how.
        """
        try:
            found = [row[0] for row in self._db.execute("PRAGMA integrity_check(3)")]
        except sqlite3.DatabaseError as error:
            found = [str(error)]
        if found == ["ok"]:
            found = [what for what, query in _CONTRADICTIONS.items() if self._all(query)] or found
        if found != ["ok"]:
            raise JournalError(f"{self.path} is damaged: {'; '.join(found)}")

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._errors("read"):
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """SQLite's errors as the user's: what could not be `done`, and what to do."""
        if self._failed is not None:
            raise JournalError(
                f"{self.path} can't be {done}: an earlier write failed: {self._failed}",
                hint="batchrun resume",
            )
        try:
            yield
        except OSError as error:
            self._failed = error
            raise JournalError(
                f"{self.path} can't be {done}: {error.strerror}",
                hint="when the disk is in order again: batchrun resume",
            ) from error
        except sqlite3.IntegrityError as error:
            raise JournalError(f"a result was about to be journalled twice: {error}") from error
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (
                sqlite3.SQLITE_IOERR,
                sqlite3.SQLITE_FULL,
            ):
                self._failed = error
            raise JournalError(
                f"{self.path} can't be {done}: {error}",
                hint="make room on the disk, then: batchrun resume",
            ) from error
        except sqlite3.DatabaseError as error:
            raise JournalError(
                f"{self.path} is damaged: {error}",
                hint="restore the job's folder from a copy, or submit the job again",
            ) from error


def _tokens(data: bytes) -> tuple[int, ...]:
    tokens = array("i")
    tokens.frombytes(data)
    return tuple(tokens)
