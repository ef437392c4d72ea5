"""What a source yields, and what every kind of source can do."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from batchrun.errors import first_line
from batchrun.jobs.errors import InputError, JobError
from batchrun.jobs.rows.store import INPUTS, Part
from batchrun.objectstore.paths import Location, StoreError

BATCH_BYTES = 16 << 20  # a chunk of input rows is about this large, whatever a row's size
BATCH_ROWS = 256  # and never has more rows: an average says little if lengths are skewed

AGAIN = "copy or write the file again, then submit the job again"  # what to do about damage

_FAULTS = (OSError, pa.ArrowException)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Row:
    """One input row.

    Args:
        index: Number of the row across all input files, from 0.
        fields: Values by column.
        error: Why the row can't be used; then `fields` is empty.
        digest: Digest of what was read of it: 64 bits, signed.
    """

    index: int
    fields: dict[str, Any]
    error: str | None = None
    digest: int = 0


class Chunk(Protocol):
    """Consecutive input rows, of bounded size.

    Attributes:
        first: Index of the first.
        num_rows: Number of rows.
    """

    first: int
    num_rows: int

    def rows(self) -> Iterator[Row]:
        """The rows as Python values: see `Source.rows`. A digest covers the chunk's columns."""

    def digests(self, columns: Sequence[str]) -> Sequence[int | None]:
        """The `digest` of each row, for these columns; None if unknown."""

    def arrow(self, schema: pa.Schema) -> pa.RecordBatch:
        """The rows in the types of `Source.schema()`; a bad row is nulls."""

    def objects(self, taken: Sequence[str] = ()) -> Iterator[str | dict[str, Any] | None]:
        """Each row as JSON can hold it; None for a bad one.

        A row that is already a JSON object is its text, if it has none of the names in `taken`.
        """

    def cells(self, names: Sequence[str], delimiter: str) -> Iterator[str | Sequence[Any] | None]:
        """Each row's values of these columns; None for a bad one.

        A row that is already a record of just these columns, with this delimiter, is its text.
        """


class Source(Protocol):
    """Rows of one or several files of one format, numbered in the order of the files.

    Every method streams: memory does not grow with the number of rows. Every one may raise
    `InputError` when a file turns out to be damaged or is gone.

    Attributes:
        typed: Whether the files or the format give columns types. Otherwise each row has its own.
    """

    typed: bool

    @property
    def column_names(self) -> list[str]:
        """Columns; of JSON Lines, those of the first 100 rows."""

    @property
    def num_rows(self) -> int | None:
        """Number of rows if known without reading them, else None."""

    def count(self) -> int:
        """Number of rows; reads them all if necessary."""

    def schema(self) -> pa.Schema:
        """Types that hold all values; an untyped source reads all rows once to find them."""

    def chunks(
        self, columns: Sequence[str] | None = None, limit: int | None = None
    ) -> Iterator[Chunk]:
        """The rows, `limit` at most.

        Args:
            columns: No others are asked for; all by default.
            limit: Rows at most.
        """

    def rows(self, columns: Sequence[str] | None = None, limit: int | None = None) -> Iterator[Row]:
        """Rows as Python values, `limit` at most.

        Text is valid Unicode: lone surrogates become U+FFFD. Values are those that JSON has: NaN
        is None, times are ISO 8601.

        Args:
            columns: The columns wanted; default: all. One that a row lacks is None.
            limit: Rows at most.
        """


def partition_fields(parts: Sequence[Part]) -> list[pa.Field[Any]]:
    """The columns that folder names define: integers if all values are."""
    names = dict.fromkeys(name for part in parts for name in part.partition)
    texts = {n for part in parts for n, value in part.partition.items() if isinstance(value, str)}
    return [pa.field(name, pa.string() if name in texts else pa.int64()) for name in names]


def check_names(path: Location, names: Sequence[str], advice: str) -> None:
    """Refuse a file that has a column twice.

    Raises:
        InputError: A column is there twice; `advice` is its hint.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path} has more than one column named '{twice[0]}'", hint=advice)


def no_columns(rows: int) -> pa.RecordBatch:
    """A batch of this many rows without columns."""
    return pa.RecordBatch.from_arrays([pa.nulls(rows)], [""]).select([])


def digest_of(data: bytes) -> int:
    """A 64-bit digest that shows whether a row changed, signed like SQLite's integers."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)


@contextmanager
def reading(path: Location, faults: tuple[type[Exception], ...] = _FAULTS) -> Iterator[None]:
    """Turn errors while a file is read into an InputError that names it.

    Args:
        path: The file.
        faults: Errors to blame on the file: every `Exception` if the block calls no code of ours.
    """
    try:
        yield
    except JobError:
        raise
    except StoreError as error:
        raise InputError(str(error), error.hint) from error
    except faults as error:
        code = error.errno if isinstance(error, OSError) else None
        if code is not None:
            raise InputError(
                f"{path} can't be read: {os.strerror(code)}",
                hint=f"check it with: ls -ld '{path}'" if isinstance(path, Path) else None,
            ) from error
        raise damaged(path, first_line(error)) from error


def damaged(path: Location, cause: object) -> InputError:
    """The error for a file that is not what was written."""
    try:
        size = INPUTS.stat(path).size
    except OSError:
        size = 0
    return InputError(f"{path} is damaged or cut short ({size} bytes): {cause}", hint=AGAIN)


def valid_text(text: str) -> str:
    """The text with lone surrogates, which no encoding can hold, as U+FFFD."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def missing_column(name: str, available: Sequence[str]) -> InputError:
    """The error for a column that the input does not have: those it has, and the closest one."""
    there = ", ".join(available[:20]) or "none"
    more = f" and {len(available) - 20} more" if len(available) > 20 else ""
    lowered = {column.lower(): column for column in reversed(available)}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1)
    return InputError(
        f"the input has no column '{name}'; its columns: {there}{more}",
        hint=f"did you mean '{lowered[close[0]]}'?" if close else None,
    )
