"""Results beside their input rows, in input order: what an output file holds.

Before a result is put beside an input row, the row is proven to be the one that was computed, by
the journal's digest of what was read.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from batchrun.jobs.errors import InputError, SpecChanged, input_changed
from batchrun.jobs.journal.results import Result
from batchrun.jobs.output.columns import Added
from batchrun.jobs.output.result_reader import ResultReader
from batchrun.jobs.rows.columnar import ColumnarChunk
from batchrun.jobs.rows.row import BATCH_ROWS, Chunk, Source, no_columns
from batchrun.jobs.rows.rowformat import ROW

Digests = Callable[[int, int], Mapping[int, int]]  # (first row, number of rows) -> by row


@dataclass
class Joined:
    """An output's rows: those of the input beside their results.

    Args:
        source: The input.
        answers: The results.
        added: From `output_columns`.
        limit: Maximum number of input rows; with `numbered`, their number, whatever the input has.
        digests: Returns digests of the rows that were read; rows without one are left out.
        read: The columns that the digests cover.
        numbered: Put a column `row` first, and null the input's columns of rows that are not the
            ones computed. Otherwise such a row is an error.
        columns: The input's columns that the output has; default: all.
        whole: Called for a row that has results but no digest; raises if any of the input has
            changed.
        check: Called when all rows were read, for a final check of the input.
        told: Called now and then with `count`.

    Attributes:
        count: Output rows so far, one per sample.
        unknown: Of these, rows whose input row is not the one computed.

    Raises:
        SpecChanged: From any iteration over rows: a row is not the one that was computed.
        JobError: Likewise: a result is missing, or belongs to no row.
    """

    source: Source
    answers: ResultReader
    added: Added
    limit: int | None = None
    digests: Digests | None = None
    read: Sequence[str] = ()
    numbered: bool = False
    columns: Sequence[str] | None = None
    whole: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None
    told: Callable[[int], None] = lambda count: None
    count: int = 0
    unknown: int = 0

    def finish(self) -> None:
        """Check, after all rows were read, that no result is left and the input was right."""
        self.answers.finish()
        self.check()

    def schema(self) -> pa.Schema:
        """The output's schema: the input's columns, renamed if they clash, and the added ones."""
        fields = list(self.input_schema())
        names = [field.name for field in fields]
        named = [field.with_name(self.free(field.name, names)) for field in fields]
        if self.numbered:
            named = [pa.field(ROW, pa.int64()), *(field.with_nullable(True) for field in named)]
        named += [pa.field(name, column.kind) for name, column in self.added.items()]
        return pa.schema(named).with_metadata(self.input_schema().metadata)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in the types of `schema`."""
        given, schema = self.input_schema(), self.schema()
        for chunk in self._chunks():
            batch = chunk.arrow(given)
            # Each row is repeated for its n samples: cut pieces so that batches don't grow.
            step = max(1, chunk.num_rows // self.answers.n)
            known = self._known(chunk)
            for low in range(0, chunk.num_rows, step):
                rows = range(low, min(low + step, chunk.num_rows))
                yield self._batch(batch, chunk.first, rows, known, schema)

    @cached_property
    def taken(self) -> list[str]:
        """Names that the input's columns must not have."""
        return [*self.added, *([ROW] if self.numbered else [])]

    def free(self, name: str, used: Container[str]) -> str:
        """A column's name, prefixed with `input_` as often as needed if it is taken."""
        renamed = name
        while renamed in self.taken or (renamed != name and renamed in used):
            renamed = f"input_{renamed}"
        return renamed

    def input_schema(self) -> pa.Schema:
        """The schema of the input's columns that the output has, with the input's names."""
        schema = self.source.schema()
        if self.columns is None:
            return schema
        return pa.schema([schema.field(name) for name in self.columns]).with_metadata(
            schema.metadata
        )

    def _chunks(self) -> Iterator[Chunk]:
        if not self.numbered:
            yield from self.source.chunks(self.columns, self.limit)
            return
        row, rows = 0, self.limit or 0
        with suppress(InputError):  # the rest of the input is lost
            for chunk in self.source.chunks(self.columns, self.limit):
                yield chunk
                row += chunk.num_rows
        for first in range(row, rows, BATCH_ROWS):
            yield _Lost.of(first, min(BATCH_ROWS, rows - first), self.input_schema())

    def rows(
        self, records: Callable[[Chunk], Iterator[Any]]
    ) -> Iterator[tuple[int, Any, list[Result]]]:
        """For each row its index, its record (None if bad or unknown), and its results.

        Args:
            records: Makes the records of a chunk's rows.
        """
        for chunk in self._chunks():
            known = self._known(chunk)
            for row, (record, sure) in enumerate(zip(records(chunk), known, strict=True)):
                index = chunk.first + row
                yield index, None if sure is False else record, self._results(index, sure)

    def _known(self, chunk: Chunk) -> list[bool | None]:
        """Whether each row is the one computed; None if only the whole input can prove it."""
        self.told(self.count)
        unsaid = False if self.numbered else None
        was = {} if self.digests is None else self.digests(chunk.first, chunk.num_rows)
        if not was:
            return [unsaid] * chunk.num_rows
        now = enumerate(chunk.digests(self.read), chunk.first)
        return [was[row] == digest if row in was else unsaid for row, digest in now]

    def _results(self, row: int, known: bool | None) -> list[Result]:
        results = self.answers.take(row)
        if results and known is None:
            self.whole()
        self.count += len(results)
        if results and known is False:
            self.unknown += len(results)
            if not self.numbered:
                raise row_changed(row)
        return results

    def _batch(
        self,
        batch: pa.RecordBatch,
        first: int,
        rows: range,
        known: Sequence[bool | None],
        schema: pa.Schema,
    ) -> pa.RecordBatch:
        """Some input rows of a batch beside their results."""
        found = [(row, result) for row in rows for result in self._results(first + row, known[row])]
        arrays = list(batch.columns)
        indices = [None if known[row] is False else row for row, _ in found]
        if indices != list(range(batch.num_rows)):
            arrays = [array.take(pa.array(indices, pa.int64())) for array in arrays]
        if self.numbered:
            arrays.insert(0, pa.array([first + row for row, _ in found], pa.int64()))
        columns = [*self.added.values()]
        values: list[list[Any]] = [[] for _ in columns]
        for _, result in found:  # by row: an answer is parsed once for all of its columns
            for column, of_column in zip(columns, values, strict=True):
                of_column.append((column.stored or column.value)(result))
        arrays += [column.array(of) for column, of in zip(columns, values, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def row_changed(row: int) -> SpecChanged:
    """The error for a row that has changed since it was first read."""
    return input_changed(f"row {row:,} of the input is not the row that the job read")


class _Lost(ColumnarChunk):
    """Rows of a lost input: only their numbers are left."""

    @classmethod
    def of(cls, first: int, num_rows: int, schema: pa.Schema) -> _Lost:
        nulls = [pa.nulls(num_rows, field.type) for field in schema]
        batch = pa.RecordBatch.from_arrays(nulls, schema=schema) if nulls else no_columns(num_rows)
        return cls(first, batch)

    def digests(self, columns: Sequence[str]) -> list[int | None]:
        """See `Chunk.digests`."""
        return [None] * self.num_rows
