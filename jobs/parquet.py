"""Parquet as a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import InputError
from jobs.jsonable import Errors, json_values, jsonable
from jobs.parts import united
from jobs.row import BATCH_BYTES, BATCH_ROWS, Row, missing_column, reading
from jobs.unify import conform

__all__ = ["ParquetSource", "jsonable"]

_BUFFER = 1 << 18  # bytes read ahead a column, instead of whole column chunks
_PROBE = 8  # rows


class ParquetSource:
    """Parquet files whose schemas are one, or become one without a value changed.

    Raises:
        InputError: A file is damaged or can't be read, no schema holds the values of all, or there
            are no rows.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._schema, self._counts = united(self._paths)
        if self.num_rows == 0:
            raise InputError(f"{self._paths[0]}: the input has no rows", hint="check what wrote it")

    @property
    def column_names(self) -> list[str]:
        """Columns, the first file's first."""
        return list(self._schema.names)

    @property
    def num_rows(self) -> int:
        """Rows, from the files' own metadata."""
        return sum(self._counts)

    def count(self) -> int:
        """The same as `num_rows`."""
        return self.num_rows

    def schema(self) -> pa.Schema:
        """Of all files: the first one's, metadata and all, unless others have more."""
        return self._schema

    def rows(
        self, columns: Sequence[str] | None = None, start: int = 0, limit: int | None = None
    ) -> Iterator[Row]:
        """See `Source.rows`; the values are those that `jobs.jsonable` makes.

        Reads these columns only, and no row group that ends before `start`.

        Raises:
            InputError: There is no such column, or a file turns out to be damaged.
        """
        names = self.column_names if columns is None else list(dict.fromkeys(columns))
        for name in names:
            if name not in self.column_names:
                raise missing_column(name, self.column_names)
        if not names:
            stop = self.num_rows if limit is None else min(self.num_rows, start + limit)
            yield from (Row(index, {}) for index in range(start, stop))
            return
        index = start
        for batch in self._read(names, start, limit):
            for values in _json_rows(batch, errors="strict"):
                if isinstance(values, str):
                    yield Row(index, {}, f"row {index}: {values}")
                else:
                    yield Row(index, dict(zip(names, values, strict=True)))
                index += 1

    def batches(self, schema: pa.Schema, limit: int | None = None) -> Iterator[pa.RecordBatch]:
        """See `Source.batches`."""
        for batch in self._read(schema.names, 0, limit):
            yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)

    def objects(self, limit: int | None = None) -> Iterator[dict[str, Any] | None]:
        """See `Source.objects`. Text that is not UTF-8 has U+FFFD in place of what is not."""
        names = self.column_names
        for batch in self._read(names, 0, limit):
            for values in _json_rows(batch, errors="replace"):
                yield dict(zip(names, values, strict=True))

    def _read(
        self, columns: Sequence[str], start: int, limit: int | None
    ) -> Iterator[pa.RecordBatch]:
        """Batches of bounded size of rows `start` on, columns in the order asked for."""
        stop = self.num_rows if limit is None else min(self.num_rows, start + limit)
        schema = pa.schema([self._schema.field(name) for name in columns])
        first = 0
        for path, count in zip(self._paths, self._counts, strict=True):
            if first < stop and first + count > start:
                with reading(path):
                    yield from _read_file(path, schema, start - first, stop - first)
            first += count


def _read_file(path: Path, schema: pa.Schema, start: int, stop: int) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, buffer_size=_BUFFER) as file:
        there = set(file.schema_arrow.names)
        names = [name for name in schema.names if name in there]
        first = 0  # of the row group, then of the batch
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if not rows or first >= stop or first + rows <= start:
                first += rows
                continue
            size = _batch_rows(file, group, names, schema)
            for batch in _batches(file, group, names, size):
                low, high = max(start - first, 0), min(stop - first, batch.num_rows)
                first += batch.num_rows
                if low < high:
                    yield conform(batch.slice(low, high - low), schema)


def _batches(
    file: pq.ParquetFile, group: int, names: list[str], size: int
) -> Iterator[pa.RecordBatch]:
    """A row group's rows with these columns, of which there may be none."""
    if not names:
        rows = file.metadata.row_group(group).num_rows
        for first in range(0, rows, size):
            yield pa.RecordBatch.from_arrays([pa.nulls(min(size, rows - first))], [""]).select([])
        return
    for batch in file.iter_batches(size, row_groups=[group], columns=names, use_threads=False):
        # `a.b` asked for is also field b of a column a: take the column alone.
        yield batch.select(names)


def _batch_rows(file: pq.ParquetFile, group: int, names: list[str], schema: pa.Schema) -> int:
    """How many rows of a row group make a batch of bounded bytes."""
    meta = file.metadata.row_group(group)
    size, dictionaries = 0, False
    for i in range(meta.num_columns):
        chunk = meta.column(i)
        if any(
            chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.")
            for name in names
        ):
            size += chunk.total_uncompressed_size
            dictionaries |= chunk.has_dictionary_page
    row_bytes = size / max(meta.num_rows, 1)
    if dictionaries:  # the file has each value once, the batch has it in each row
        probe = conform(next(_batches(file, group, names, _PROBE)), schema)
        row_bytes = max(row_bytes, probe.nbytes / max(probe.num_rows, 1))
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(row_bytes, 1))))


def _json_rows(batch: pa.RecordBatch, errors: Errors) -> Iterator[Sequence[Any] | str]:
    """Values of each row, or, with `strict`, what is wrong with it."""
    try:
        columns = [json_values(column, errors) for column in batch.columns]
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield [json_values(column.slice(i, 1), errors)[0] for column in batch.columns]
            except UnicodeDecodeError as error:
                yield f"text that is not valid UTF-8: {error}"
        return
    yield from zip(*columns, strict=True)
