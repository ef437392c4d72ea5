"""The single source of truth on a job's progress: an SQLite database in its folder.

A result is durably there, or its row is still to do: there is no third state. One connection
writes, owned by one thread; any number read, even while the job runs. Each run has a number, its
fencing token: once a later run exists, it can't write any more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from batchrun.jobs.errors import Fenced, JournalError
from batchrun.jobs.files import fsync_directory, remove
from batchrun.jobs.journal import schema
from batchrun.jobs.journal.overview import Overview
from batchrun.jobs.journal.readings import CONDEMNED
from batchrun.jobs.journal.results import CopiedResult, Partial, Result, packed
from batchrun.jobs.journal.samples import Samples
from batchrun.jobs.journal.schema import KEYS, NAME, SEALS, TABLES, connect, sealed, transaction
from batchrun.jobs.lease import Lease

READ = "columns_read"  # key in `meta`: the columns that rows' digests cover
STATE = "state.json"  # a journal's summary for `list`, valid until somebody writes to it

_CHECKPOINT_BYTES = 4 << 20  # of results, before they move from the log into the database
_ROW_BYTES = 160  # of a result besides `_SIZED`
_DIGEST_BYTES = 16
# Where a record of a result has what takes more.
_SIZED = [TABLES["results"].index(name) for name in ("text", "token_ids", "logprobs", "scores")]
_INSERT = f"INSERT INTO results VALUES ({', '.join('?' * (len(TABLES['results']) + 1))})"
_COPIED = ", ".join(
    {"id": "?1", "run": "?3", "queue_s": "NULL", "prefill_s": "NULL", "decode_s": "NULL"}.get(c, c)
    for c in TABLES["results"]
)
_COPY = (
    f"INSERT INTO results SELECT {_COPIED}, checksum({_COPIED}) FROM results "
    f"WHERE id = ?2 AND status = 'ok' AND crc = {SEALS['results']}"
)
_TOKEN_BYTES = 9  # of a copied result, text and number
_PARTIAL = (
    "INSERT OR REPLACE INTO partials SELECT ?1, ?2, ?3, ?4, ?5 "
    "WHERE NOT EXISTS (SELECT 1 FROM results WHERE id = ?1)"
)
_REMOVE = {
    table: f"DELETE FROM {table} WHERE ({', '.join(key)}) = ({', '.join('?' * len(key))})"
    for table, key in KEYS.items()
}
# Deleting the last run would free its number for reuse.
_REMOVE["runs"] = (
    "UPDATE runs SET started_at = (julianday('now') - 2440587.5) * 86400, ended_at = NULL, "
    "state = 'interrupted', stats = '{}', reason = NULL, crc = NULL WHERE id = ?"
)
_SEAL_RUN = f"UPDATE runs SET crc = {SEALS['runs']} WHERE id = ?"


class Journal(Overview):
    """Open journal of one job.

    Args:
        folder: The job's folder.
        n: Samples per row.
        readonly: Read without taking any lock that a writer would notice.

    Raises:
        JournalError: It is missing or damaged, or a newer program wrote it.
    """

    def __init__(self, folder: Path, n: int, *, readonly: bool = False) -> None:
        path = folder / NAME
        super().__init__(path, n, connect(path, readonly=readonly))
        self._run = 0
        self._writer = not readonly
        self._named = False  # whether the log's name is certain to be on disk
        self._logged = 0  # bytes of results since the last checkpoint
        self._samples = Samples()
        if not readonly:
            try:
                remove(folder / STATE)
            except OSError as error:
                self._db.close()
                raise JournalError(
                    f"{folder / STATE} can't be removed: {error.strerror}",
                    hint=f"check the permissions: ls -ld '{folder}'",
                ) from error

    create = staticmethod(schema.create)

    def begin_run(self) -> int:
        """Begin a run; its results carry the returned number.

        From then on every earlier run is fenced off.
        """
        with self._transaction():
            cursor = self._db.execute("INSERT INTO runs (started_at) VALUES (?)", (time.time(),))
            self._db.execute(_SEAL_RUN, (cursor.lastrowid,))
            # The job's creator may have failed to make its name durable.
            for folder in self.path.parent.absolute().parents[:3]:
                with suppress(PermissionError):
                    fsync_directory(folder)
        self._run, self._samples = cursor.lastrowid or 0, Samples()
        return self._run

    def resume_run(self, run: int) -> None:
        """Continue writing for a run that another connection began."""
        self._run = run

    def write(
        self,
        results: Sequence[Result | CopiedResult],
        stats: dict[str, Any] | None = None,
        partials: Sequence[Partial] = (),
        digests: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Add results in one transaction: on return all of them are durable, or none is.

        Args:
            results: New results; their samples' partials are removed.
            stats: The run's figures so far; they replace earlier ones. Every few seconds a sample
                of them is kept.
            partials: Tokens so far; they replace those of the same samples. They are dropped for
                a sample that has a result.
            digests: Numbers of input rows, and digests of their content. A row's digest must be
                written no later than its result.

        Raises:
            Fenced: A later run has the job. Nothing was written.
            JournalError: A result exists already, its sample is out of range, or the one to copy is
                missing: nothing was written. Or the disk refuses: then the run must end, since
                what a failed fsync left on disk is unknown, and only what a resume finds there
                counts.
        """
        run = self._run
        rows = [self._record(result) for result in results if isinstance(result, Result)]
        copied = [result for result in results if isinstance(result, CopiedResult)]
        copies = [(self._number(c), c.of_row * self.n + c.of_sample, run) for c in copied]
        kept = [
            sealed(
                self._number(p),
                schema.int32(p.token_ids),
                schema.real(p.logprob),
                packed(p.logprobs),
            )
            for p in partials
        ]
        seen = [sealed(*digest) for digest in digests]
        with self._write():
            self._db.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", seen)
            self._db.executemany(_INSERT, rows)
            if copies and self._db.executemany(_COPY, copies).rowcount != len(copies):
                raise JournalError("the result to be copied is not in the journal")
            if kept:
                self._db.executemany(_PARTIAL, kept)
            if self._db.execute("SELECT 1 FROM partials LIMIT 1").fetchone():
                ended = [row[:1] for row in (*rows, *copies)]
                self._db.executemany("DELETE FROM partials WHERE id = ?", ended)
            if stats is not None:
                self._set_run(run, stats=json.dumps(stats))
                self._logged += self._samples.add(self._db, run, stats)
        self._logged += _DIGEST_BYTES * len(digests)
        self._logged += sum(_ROW_BYTES + sum(len(row[at] or b"") for at in _SIZED) for row in rows)
        self._logged += sum(_ROW_BYTES + len(r[1]) + len(r[3] or b"") for r in kept)
        self._logged += sum(_ROW_BYTES + _TOKEN_BYTES * c.tokens for c in copied)
        if self._logged >= _CHECKPOINT_BYTES:
            self._checkpoint()

    def end_run(self, state: str, stats: dict[str, Any], reason: str | None = None) -> None:
        """Record how the run ended, and why if it failed.

        Raises:
            Fenced: A later run has the job.
        """
        with self._write():
            how = {"state": state, "stats": json.dumps(stats), "reason": schema.storable(reason)}
            self._set_run(self._run, ended_at=time.time(), **how)

    def retry_failed(self) -> int:
        """Remove error results, so that their samples are done again; return how many.

        Forgets their rows' crashes. A finished job becomes an interrupted one.

        Raises:
            LeaseHeld: Another worker has the job.
        """
        self._db.execute("PRAGMA secure_delete=ON")  # so that freed pages keep no error texts
        with nullcontext() if self._run else Lease(self.path.parent), self._write(any_run=True):
            self._db.execute(
                "DELETE FROM crashes WHERE row IN "
                "(SELECT id / ? FROM results WHERE status = 'error')",
                (self.n,),
            )
            self._db.execute("DELETE FROM meta WHERE key = ?", (CONDEMNED,))
            count = self._db.execute("DELETE FROM results WHERE status = 'error'").rowcount
            if count:
                last = "SELECT id, state FROM runs ORDER BY id DESC LIMIT 1"
                for run, state in self._db.execute(last).fetchall():
                    if (state or "").startswith("done"):
                        self._set_run(run, state="interrupted")
        return count

    def mend(self) -> list[str]:
        """Remove damaged records, so that their work is done again; return a line for each.

        A damaged run loses its figures. Records hidden by structural damage are not found.

        Raises:
            JournalError: The file itself is damaged.
        """
        self.check_structure()
        damage = self.damage()
        if not damage:
            return []
        with self._write(any_run=True):
            for found in damage:
                self._db.execute(_REMOVE[found.table], found.key)
            # Without the note of the columns read, digests mean nothing.
            self._db.execute(
                "DELETE FROM rows WHERE NOT EXISTS (SELECT 1 FROM meta WHERE key = ?)", (READ,)
            )
            self._db.execute("DELETE FROM partials WHERE id IN (SELECT id FROM results)")
            # Each run with results keeps an entry, so that its number is not reused.
            self._db.execute(
                "INSERT OR IGNORE INTO runs (id, started_at, state) "
                "SELECT DISTINCT run, ?, 'interrupted' FROM results",
                (time.time(),),
            )
            self._db.execute(f"UPDATE runs SET crc = {SEALS['runs']} WHERE crc IS NULL")
        return [found.what for found in damage]

    def count_crash(self, rows: Iterable[int]) -> None:
        """Note that the latest run's process died with these rows in the engine.

        A death counts once, however often it is noted.
        """
        with self._write(any_run=True):
            self._db.executemany(
                "INSERT OR IGNORE INTO crashes SELECT ?1, max(id), checksum(?1, max(id)) "
                "FROM runs HAVING max(id) > 0",
                [(row,) for row in rows],
            )

    def condemn(self, row: int, reason: str) -> None:
        """Note that a row must not be tried again, because it ended a run, and why."""
        self.set_meta(CONDEMNED, {**(self.meta(CONDEMNED) or {}), str(row): reason})

    def set_meta(self, key: str, value: Any) -> None:
        """Remember a small JSON value."""
        with self._write(any_run=True):
            note = sealed(key, json.dumps(value))
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", note)

    def close(self) -> None:
        """Close the connection; everything written is durable already.

        Raises:
            JournalError: The disk refuses to move it from the log into the database.
        """
        try:
            if self._writer and self._failed is None:
                self._checkpoint()
        finally:
            self._close()

    def _record(self, result: Result) -> tuple[Any, ...]:
        """A result as it is stored."""
        return sealed(
            *(self._number(result), result.status, result.text, schema.int32(result.token_ids)),
            *(result.finish_reason, result.prompt_tokens, result.completion_tokens),
            *(schema.storable(result.error), result.error_kind),
            *(
                schema.real(result.queue_s),
                schema.real(result.prefill_s),
                schema.real(result.decode_s),
            ),
            *(self._run, schema.real(result.logprob), packed(result.logprobs)),
            result.scores and result.scores.packed(),
        )

    def _set_run(self, run: int, **values: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(f"UPDATE runs SET {names} WHERE id = ?", (*values.values(), run))
        self._db.execute(_SEAL_RUN, (run,))

    def _number(self, item: Result | CopiedResult | Partial) -> int:
        # Out of range it would be stored as another row's.
        if not (item.row >= 0 and 0 <= item.sample < self.n):
            raise JournalError(
                f"the job has no row {item.row}, sample {item.sample}: n is {self.n}"
            )
        return item.row * self.n + item.sample

    @contextmanager
    def _write(self, *, any_run: bool = False) -> Iterator[None]:
        """A transaction of this run; with `any_run` it needn't belong to a run."""
        with self._transaction():
            if self._run or not any_run:
                [(latest,)] = self._db.execute("SELECT max(id) FROM runs")
                if not self._run:
                    raise JournalError("no run has begun that could write results")
                if latest != self._run:
                    raise Fenced(
                        f"another process, run {latest}, took this job over from run {self._run}",
                        hint=f"see it with: batchrun show {self.path.parent.name}",
                    )
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors("written"):
            with transaction(self._db):
                yield
            if not self._named:
                # SQLite syncs the folder when it makes the log, but does not report a failure.
                fsync_directory(self.path.parent)
                self._named = True

    def _checkpoint(self) -> None:
        """Move results from the log into the database. Waits for no reader."""
        with self._errors("written"):
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        self._logged = 0

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self._close()  # the error being raised says more

    def _close(self) -> None:
        self._end_reading()
        if self._writer and self._failed is not None:
            # Closing the last writing connection syncs the log again, as if that could succeed
            # now; an open reading connection keeps SQLite from doing so.
            with suppress(JournalError), closing(connect(self.path, readonly=True)) as other:
                other.execute("SELECT max(id) FROM runs").fetchall()
                self._db.close()
        self._writer = False
        self._db.close()
