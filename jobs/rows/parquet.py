"""Parquet as a source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice, takewhile, zip_longest
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.arrowtypes import is_text
from batchrun.jobs.rows.columnar import ColumnarChunk
from batchrun.jobs.rows.jsonable import json_values
from batchrun.jobs.rows.parquetfile import batches, column_chunks, opened
from batchrun.jobs.rows.row import (
    BATCH_BYTES,
    BATCH_ROWS,
    Row,
    missing_column,
    partition_fields,
    reading,
)
from batchrun.jobs.rows.rowformat import RowFormat
from batchrun.jobs.rows.store import Noted, Part, unnoted
from batchrun.jobs.rows.unify import conform
from batchrun.jobs.rows.united import united
from batchrun.objectstore.paths import Location

if TYPE_CHECKING:
    from batchrun.jobs.output.joined import Joined

_PROBE = 8  # rows
_GROUP_BYTES = 32 << 20  # of a row group before encoding
_GROUP_ROWS = 1 << 17


class ParquetFormat(RowFormat):
    """Parquet."""

    name, title, suffixes, columnar = "parquet", "Parquet", (".parquet", ".pq"), True

    def begins(self, head: bytes) -> bool:
        """See `RowFormat.begins`."""
        return head.startswith(b"PAR1")

    def open(
        self, parts: Sequence[Part], *, lenient: bool = False, noted: Noted = unnoted
    ) -> ParquetSource:
        """See `RowFormat.open`."""
        if lenient:
            parts = list(takewhile(lambda part: _opens(part, noted), parts))
            with suppress(InputError):
                return ParquetSource(parts, noted)
            parts = []
        return ParquetSource(parts, noted)

    def write(self, file: IO[bytes], joined: Joined, path: Location) -> None:
        """See `RowFormat.write`."""
        schema = joined.schema()
        # Names inside list types are part of a column's type, and stay as they are.
        writer = pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_compliant_nested_type=False,
            write_page_checksum=True,
        )
        try:
            for group in _groups(joined.batches()):
                writer.write_table(pa.Table.from_batches(group, schema), _GROUP_ROWS)
            writer.close()
        except BaseException:
            writer.is_open = False  # or its finaliser would write a footer to a closed file
            raise

    def differences(self, path: Location, joined: Joined, noted: Noted) -> Iterator[str]:
        """See `RowFormat.differences`: compares values."""
        schema = joined.schema()
        with opened(path, noted) as file:
            there = file.schema_arrow
            if there.names != schema.names:
                yield (
                    f"the output {path} has the columns {', '.join(there.names)}, "
                    f"not {', '.join(schema.names)}"
                )
                return
            written = _batches(path, file, noted)
            ahead = pa.Table.from_batches([], there)
            row = 0
            for batch in joined.batches():
                while ahead.num_rows < batch.num_rows and (more := next(written, None)) is not None:
                    ahead = pa.concat_tables([ahead, pa.Table.from_batches([more])])
                for name in schema.names:
                    found = _first_difference(batch[name], ahead[name].slice(0, batch.num_rows))
                    if found is not None:
                        at = f"'{name}' of row {row + found}"
                        yield f"the output {path} differs from the job in {at}"
                row += batch.num_rows
                ahead = ahead.slice(batch.num_rows)
            left = ahead.num_rows + sum(more.num_rows for more in written)
            if left:
                yield f"the output {path} has {left:,} more rows than the job"


class ParquetSource:
    """Parquet files with one schema, or with schemas that unite without changing a value.

    Raises:
        InputError: A file is damaged or can't be read, no schema holds the values of all, or there
            are no rows. With no files at all, the source is empty.
    """

    typed = True

    def __init__(self, parts: Sequence[Part], noted: Noted = unnoted) -> None:
        self._parts, self._noted = list(parts), noted
        self._schema, self._counts = united([part.path for part in parts], noted)
        for field in partition_fields(parts):
            if field.name not in self._schema.names:
                self._schema = self._schema.append(field)
            else:
                _check_partition(self._parts, self._schema.field(field.name))
        self.column_names = list(self._schema.names)  # the first file's first
        self.num_rows = sum(self._counts)
        if parts and self.num_rows == 0:
            raise InputError(f"{parts[0].path}: the input has no rows", hint="check what wrote it")

    def count(self) -> int:
        """The same as `num_rows`."""
        return self.num_rows

    def schema(self) -> pa.Schema:
        """Of all files: the first one's, metadata and all, unless others have more."""
        return self._schema

    def rows(self, columns: Sequence[str] | None = None, limit: int | None = None) -> Iterator[Row]:
        """See `Source.rows`.

        Raises:
            InputError: There is no such column, or a file turns out to be damaged.
        """
        for chunk in self.chunks(columns, limit):
            yield from chunk.rows()

    def chunks(
        self, columns: Sequence[str] | None = None, limit: int | None = None
    ) -> Iterator[ColumnarChunk]:
        """See `Source.chunks`. Reads these columns only, in this order.

        Raises:
            InputError: There is no such column, or a file turns out to be damaged.
        """
        names = self.column_names if columns is None else list(dict.fromkeys(columns))
        for name in names:
            if name not in self.column_names:
                raise missing_column(name, self.column_names)
        stop = self.num_rows if limit is None else min(self.num_rows, limit)
        schema = pa.schema([self._schema.field(name) for name in names])
        first = 0
        for part, count in zip(self._parts, self._counts, strict=True):
            if count and first < stop:
                with reading(part.path):
                    found = _read_file(part, schema, stop - first, noted=self._noted, before=first)
                    for batch in found:
                        yield ColumnarChunk(first, batch)
                        first += batch.num_rows


def _check_partition(parts: Sequence[Part], field: pa.Field[Any]) -> None:
    """Refuse folder names whose value doesn't fit the type of the column in other files."""
    for part in parts:
        value = part.partition.get(field.name)
        try:
            _constant(value, field.type)
        except (pa.ArrowException, OverflowError):
            with opened(part.path) as file:
                if field.name in file.schema_arrow.names:
                    continue
            raise InputError(
                f"the column '{field.name}' is {field.type} in some files, and the folder of "
                f"{part.path} says {value}",
                hint="submit them as separate jobs, or rename the folders",
            ) from None


def _constant(value: int | str | None, kind: pa.DataType) -> Any:
    return pa.scalar(str(value) if is_text(kind) and value is not None else value, kind)


def _read_file(
    part: Part, schema: pa.Schema, stop: int, *, noted: Noted, before: int
) -> Iterator[pa.RecordBatch]:
    """Batches of a file's first `stop` rows; `before` is the number of rows in earlier files."""
    with opened(part.path, noted) as file:
        there = set(file.schema_arrow.names)
        names = [name for name in schema.names if name in there]
        said = {name: part.partition[name] for name in schema.names if name in part.partition}
        first = 0  # of the row group, then of the batch
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if not rows or first >= stop:
                continue
            with noted(part.path, before + first, rows):
                size = _batch_rows(part.path, file, group, names, schema)
            found, end = batches(part.path, file, group, names, size), first + rows
            while True:
                with noted(part.path, before + first, min(size, end - first)):
                    batch = next(found, None)
                if batch is None:
                    break
                wanted = min(stop - first, batch.num_rows)
                first += batch.num_rows
                if wanted > 0:
                    rows_read = conform(batch.slice(0, wanted), schema)
                    for name in said.keys() - there:
                        rows_read = _with_constant(rows_read, name, said[name])
                    yield rows_read


def _with_constant(batch: pa.RecordBatch, name: str, value: int | str | None) -> pa.RecordBatch:
    """The batch with a column filled with one value."""
    i = batch.schema.get_field_index(name)
    array = pa.repeat(_constant(value, batch.schema.field(i).type), batch.num_rows)
    return batch.set_column(i, batch.schema.field(i), array)


def _batch_rows(
    path: Location, file: pq.ParquetFile, group: int, names: list[str], schema: pa.Schema
) -> int:
    """How many rows of a row group make a batch of bounded bytes."""
    chunks = column_chunks(path, file, group, names)
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    row_bytes = size / max(file.metadata.row_group(group).num_rows, 1)
    if any(chunk.has_dictionary_page for chunk in chunks):
        # The file holds each value once, the batch holds it in each row.
        for probe in islice(batches(path, file, group, names, _PROBE), 1):
            row_bytes = max(row_bytes, conform(probe, schema).nbytes / max(probe.num_rows, 1))
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(row_bytes, 1))))


def _groups(found: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Batches that make a row group each."""
    group: list[pa.RecordBatch] = []
    size = 0
    for batch in found:
        group.append(batch)
        size += batch.nbytes
        if size >= _GROUP_BYTES or len(group) * BATCH_ROWS >= _GROUP_ROWS:
            yield group
            group.clear()  # so that a consumer that keeps the list keeps no batches alive
            size = 0
    if group:
        yield group


def _opens(part: Part, noted: Noted) -> bool:
    try:
        with opened(part.path, noted):
            return True
    except InputError:
        return False


def _batches(path: Location, file: pq.ParquetFile, noted: Noted) -> Iterator[pa.RecordBatch]:
    for group in range(file.num_row_groups):
        found = batches(path, file, group, file.schema_arrow.names, BATCH_ROWS)
        while True:
            with noted(path):
                batch = next(found, None)
            if batch is None:
                break
            yield batch


def _first_difference(want: pa.Array[Any], got: pa.ChunkedArray[Any]) -> int | None:
    if pa.chunked_array([want]).equals(got):
        return None
    pairs = enumerate(zip_longest(_values([want]), _values(got.chunks)))
    # NaN beside NaN is not a difference, nor is another dictionary for the same values.
    differing = (i for i, (a, b) in pairs if a != b and repr(a) != repr(b))
    first = next(differing, None)
    return len(got) if first is None and len(got) < len(want) else first


def _values(arrays: Iterable[pa.Array[Any]]) -> list[Any]:
    try:
        return [value for array in arrays for value in array.to_pylist()]
    except ValueError:  # text that is not UTF-8
        return [value for array in arrays for value in json_values(array, "replace")]
