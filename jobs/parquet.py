"""Parquet as a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import InputError
from jobs.jsonable import Errors, json_values, jsonable
from jobs.row import BATCH_BYTES, BATCH_ROWS, Row, missing_column, reading

__all__ = ["ParquetSource", "jsonable"]

_BUFFER = 1 << 18  # bytes read ahead a column, instead of whole column chunks
_PROBE = 8  # rows


class ParquetSource:
    """Parquet files of one schema.

    Raises:
        InputError: A file is damaged or can't be read, schemas differ, or there are no rows.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._counts: list[int] = []
        schemas: list[pa.Schema] = []
        for path in self._paths:
            with reading(path), pq.ParquetFile(path) as file:
                self._counts.append(file.metadata.num_rows)
                schemas.append(file.schema_arrow)
        self._schema = schemas[0]
        for path, schema in zip(self._paths, schemas, strict=True):
            _check_same(self._schema, schema, self._paths[0], path)
        names = self.column_names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(
                f"{self._paths[0]} has more than one column named '{twice[0]}'",
                hint="give its columns different names",
            )
        if self.num_rows == 0:
            raise InputError(f"{self._paths[0]}: the input has no rows", hint="check what wrote it")

    @property
    def column_names(self) -> list[str]:
        """Columns, in the file's order."""
        return list(self._schema.names)

    @property
    def num_rows(self) -> int:
        """Rows, from the files' own metadata."""
        return sum(self._counts)

    def count(self) -> int:
        """The same as `num_rows`."""
        return self.num_rows

    def schema(self) -> pa.Schema:
        """The first file's schema, metadata and all."""
        return self._schema

    def rows(
        self, columns: Sequence[str] | None = None, start: int = 0, limit: int | None = None
    ) -> Iterator[Row]:
        """See `Source.rows`. Reads these columns only, and no row group that ends before `start`.

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
        first = 0
        for path, count in zip(self._paths, self._counts, strict=True):
            if first < stop and first + count > start:
                with reading(path):
                    yield from _read_file(path, columns, start - first, stop - first)
            first += count


def _read_file(
    path: Path, columns: Sequence[str], start: int, stop: int
) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, buffer_size=_BUFFER) as file:
        first = 0  # of the row group, then of the batch
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if not rows or first >= stop or first + rows <= start:
                first += rows
                continue
            size = _batch_rows(file, group, columns)
            for batch in file.iter_batches(
                size, row_groups=[group], columns=list(columns), use_threads=False
            ):
                low, high = max(start - first, 0), min(stop - first, batch.num_rows)
                first += batch.num_rows
                if low < high:
                    # `a.b` asked for is also field b of a column a: take the column alone.
                    yield batch.slice(low, high - low).select(list(columns))


def _batch_rows(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> int:
    """How many rows of a row group make a batch of bounded bytes."""
    meta = file.metadata.row_group(group)
    size, dictionaries = 0, False
    for i in range(meta.num_columns):
        chunk = meta.column(i)
        if any(
            chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.")
            for name in columns
        ):
            size += chunk.total_uncompressed_size
            dictionaries |= chunk.has_dictionary_page
    row_bytes = size / max(meta.num_rows, 1)
    if dictionaries:  # the file has each value once, the batch has it in each row
        probe = next(
            file.iter_batches(_PROBE, row_groups=[group], columns=list(columns), use_threads=False)
        )
        row_bytes = max(row_bytes, probe.nbytes / max(probe.num_rows, 1))
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(row_bytes, 1))))


def _check_same(expected: pa.Schema, schema: pa.Schema, first: Path, path: Path) -> None:
    if schema.equals(expected):
        return
    for name in dict.fromkeys([*expected.names, *schema.names]):
        was = expected.field(name) if name in expected.names else None
        now = schema.field(name) if name in schema.names else None
        if was is None or now is None or was != now:  # a Field compares with Fields only
            there = f"{was.type}{'' if was.nullable else ' not null'}" if was else "not there"
            here = f"{now.type}{'' if now.nullable else ' not null'}" if now else "not there"
            break
    else:
        name, there, here = expected.names[0], "in another order", "in this order"
    raise InputError(
        f"the Parquet files differ in their columns: '{name}' is {there} in {first}, "
        f"{here} in {path}",
        hint="submit them as separate jobs, or write them with one schema",
    )


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
