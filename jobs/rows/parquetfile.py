"""One Parquet file, checked for contradictions between its parts.

Arrow may raise any type of error for a damaged file, and some of its readers just end early: here
all of that becomes an InputError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.row import AGAIN, no_columns, reading
from batchrun.jobs.rows.store import INPUTS, Noted, unnoted
from batchrun.objectstore.paths import Location

_ANY = (Exception,)
_BUFFER = 1 << 18  # bytes read ahead per column, instead of whole column chunks


@contextmanager
def opened(path: Location, noted: Noted = unnoted) -> Iterator[pq.ParquetFile]:
    """A Parquet file with a consistent footer; checks pages that have checksums.

    Args:
        path: The file.
        noted: Told that it is being opened.

    Raises:
        InputError: It is damaged or can't be read.
    """
    with noted(path), reading(path, _ANY):
        file = pq.ParquetFile(
            INPUTS.for_arrow(path),
            buffer_size=_BUFFER,
            pre_buffer=False,  # of whole column chunks, by threads that may outlive the interpreter
            page_checksum_verification=True,
        )
    with file:
        with noted(path), reading(path, _ANY):
            _check_names(file.schema_arrow)
            _check_numbers(path, file)
        yield file


def batches(
    path: Location, file: pq.ParquetFile, group: int, names: list[str], size: int
) -> Iterator[pa.RecordBatch]:
    """A row group's rows, `size` at a time, with these columns; there may be none.

    Raises:
        InputError: It is damaged, or holds more or fewer rows than it says.
    """
    rows = file.metadata.row_group(group).num_rows
    if not names:
        for first in range(0, rows, size):
            yield no_columns(min(size, rows - first))
        return
    with reading(path, _ANY):
        found = file.iter_batches(size, row_groups=[group], columns=names, use_threads=False)
    read = 0
    while True:
        with reading(path, _ANY):
            batch = next(found, None)
            if batch is None:
                break
            # Arrow takes `a.b` for field b of a column a too: keep only the column.
            batch = batch.select(names)
            batch.validate()
        read += batch.num_rows
        if read <= rows:
            yield batch
    if read != rows:
        raise _contradiction(path, f"row group {group} declares {rows:,} rows but holds {read:,}")


def column_chunks(
    path: Location, file: pq.ParquetFile, group: int, names: Sequence[str]
) -> list[Any]:
    """Metadata of a row group's chunks of these columns."""
    wanted = set(names)
    with reading(path, _ANY):
        meta = file.metadata.row_group(group)
        chunks = [meta.column(i) for i in range(meta.num_columns)]
        return [chunk for chunk in chunks if not wanted.isdisjoint(_paths(chunk.path_in_schema))]


def _paths(path: str) -> Iterator[str]:
    """A column, and the columns that it may be inside; names may contain dots themselves."""
    yield path
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _check_names(fields: Any) -> None:
    """Read all names, inside types too: those that are not UTF-8 raise an error."""
    pending = list(fields)
    while pending:
        field = pending.pop()
        kind = field.name and field.type
        pending += [kind.field(i) for i in range(getattr(kind, "num_fields", 0))]


def _check_numbers(path: Location, file: pq.ParquetFile) -> None:
    meta, schema = file.metadata, file.schema
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != meta.num_rows:
        raise _contradiction(
            path,
            f"its footer declares {meta.num_rows:,} rows, but its {len(rows):,} row groups have "
            f"{sum(rows):,}",
        )
    flat = [schema.column(i).max_repetition_level == 0 for i in range(meta.num_columns)]
    for number, (group, of_group) in enumerate(zip(groups, rows, strict=True)):
        for i, is_flat in enumerate(flat):
            chunk = group.column(i)
            values = chunk.num_values
            if values != of_group if is_flat else values < of_group:
                raise _contradiction(
                    path,
                    f"row group {number} has {of_group:,} rows but {values:,} values in its "
                    f"column '{chunk.path_in_schema}'",
                )


def _contradiction(path: Location, what: str) -> InputError:
    return InputError(f"{path} is damaged: {what}", hint=AGAIN)
