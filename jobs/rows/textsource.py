"""What text sources have in common: a row is a record of some bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.row import BATCH_BYTES, BATCH_ROWS, Row, digest_of, no_columns
from batchrun.jobs.rows.shape import InferredType, fitted
from batchrun.jobs.rows.store import Part

Asked = Callable[[dict[str, Any]], dict[str, Any]]

_SAMPLE = 100  # rows looked at before the job starts


@dataclass(frozen=True, slots=True)
class Header:
    """What applies to all records of a file.

    Args:
        names: Names of its columns.
        delimiter: What separates cells.
    """

    names: tuple[str, ...]
    delimiter: str
    key: bytes = field(init=False)  # its part of a record's digest

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", repr((self.names, self.delimiter)).encode())


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it is in a file.

    Args:
        line: The line where it begins, from 1.
        data: Its bytes.
        part: The file.
        header: The file's header, if it has one.
        cells: With a header: the values as found.
        error: What is wrong with it, if reading it showed that.
    """

    line: int
    data: bytes
    part: Part
    header: Header | None = None
    cells: Sequence[str] = ()
    error: str | None = None

    @property
    def digest(self) -> int:
        """Digest of the whole record."""
        if self.header is None:
            return digest_of(self.data.strip())
        # Blanks at the ends of a record are part of its cells.
        return digest_of(self.header.key + self.data.rstrip(b"\r\n"))


class TextSource(ABC):
    """Rows of text files.

    Args:
        parts: The files.
        asked: See `TextFormat.fields`.
        lenient: End the rows where a file can't be read; there may be none.

    Raises:
        InputError: There are no rows, the first 100 are all bad, or a file can't be read.
    """

    def __init__(
        self, parts: Sequence[Part], *, asked: Asked = lambda values: values, lenient: bool = False
    ) -> None:
        self._parts, self._asked, self._lenient = list(parts), asked, lenient
        self._partition = {name: None for part in self._parts for name in part.partition}
        self._schema: pa.Schema | None = None
        for part in self._parts:
            with suppress(*(InputError,) if lenient else ()):
                next(self.records(part), None)  # check that each one opens and begins to unpack
        names: dict[str, None] = {}
        errors = []
        rows = 0
        for row in islice(self.rows(), _SAMPLE):
            rows += 1
            names.update(dict.fromkeys(row.fields))
            if row.error is not None:
                errors.append(row.error)
        what = f"{len(parts)} input files" if len(parts) != 1 else str(parts[0].path)
        if rows == 0 and not lenient:
            raise InputError(f"{what}: the input has no rows", hint="check what wrote it")
        if len(errors) == rows and not lenient:
            raise InputError(
                f"{what}: {self.no_rows} in the first {rows} rows: {errors[0]}", hint=self.advice
            )
        self._column_names = list(names)

    typed = False
    num_rows = None  # unknown: see `count`
    no_rows: str  # what is missing if every row is bad
    advice: str

    @abstractmethod
    def records(self, part: Part) -> Iterator[Record]:
        """A file's records, in order."""

    @abstractmethod
    def parse(self, record: Record) -> dict[str, Any]:
        """A record's values by column.

        Raises:
            ValueError: It is a bad row; the message says why.
        """

    def carried(self, record: Record, taken: Sequence[str]) -> str | dict[str, Any] | None:
        """A record as it goes to a JSON output: see `Chunk.objects`."""
        fields, error = self.fields(record)
        return fields if error is None else None

    def cells(
        self, record: Record, names: Sequence[str], delimiter: str
    ) -> str | Sequence[Any] | None:
        """A record as it goes to a CSV output: see `Chunk.cells`."""
        fields, error = self.fields(record)
        return None if error else [fields.get(name) for name in names]

    @property
    def column_names(self) -> list[str]:
        """Columns of the first 100 rows, in order of appearance."""
        return self._column_names

    def count(self) -> int:
        """Number of rows, counted without parsing them."""
        return sum(1 for part in self._parts for _ in self.records(part))

    def schema(self) -> pa.Schema:
        """Types that hold the values of all rows, as `InferredType` finds them."""
        if self._schema is None:
            shapes: defaultdict[str, InferredType] = defaultdict(InferredType)
            for record in self._records():
                for name, value in self.fields(record)[0].items():
                    shapes[name].add(value)
            self._schema = pa.schema([(name, shape.type()) for name, shape in shapes.items()])
        return self._schema

    def rows(self, columns: Sequence[str] | None = None, limit: int | None = None) -> Iterator[Row]:
        """See `Source.rows`."""
        for index, record in enumerate(islice(self._records(), limit)):
            yield self.row(index, record, columns)

    def chunks(
        self, columns: Sequence[str] | None = None, limit: int | None = None
    ) -> Iterator[TextChunk]:
        """See `Source.chunks`; records always have all their columns."""
        pending: list[Record] = []
        size, first = 0, 0
        for record in islice(self._records(), limit):
            pending.append(record)
            size += len(record.data)
            if size >= BATCH_BYTES or len(pending) >= BATCH_ROWS:
                yield TextChunk(self, first, pending)
                first, pending, size = first + len(pending), [], 0
        if pending:
            yield TextChunk(self, first, pending)

    def row(self, index: int, record: Record, columns: Sequence[str] | None = None) -> Row:
        """A record as a row, with the fields that `asked` selects."""
        fields, error = self.fields(record)
        try:
            fields = self._asked(fields) if error is None else {}
        except ValueError as problem:
            error = str(problem)
        if error is not None:
            where = f"line {record.line} of {record.part.path.name}"
            return Row(index, {}, f"{where} {error}", record.digest)
        if columns is not None:
            fields = {name: fields.get(name) for name in columns}
        return Row(index, fields, None, record.digest)

    def fields(self, record: Record) -> tuple[dict[str, Any], str | None]:
        """A record's values, and what is wrong with it."""
        if record.error is not None:
            return {}, record.error
        try:
            fields = self.parse(record)
        except UnicodeDecodeError as error:
            byte = record.data[error.start]
            return {}, f"is not valid UTF-8: byte 0x{byte:02x} at byte {error.start + 1}"
        except ValueError as error:
            return {}, str(error)
        more = self.partition(record.part)
        return {**fields, **{k: v for k, v in more.items() if k not in fields}}, None

    def partition(self, part: Part) -> dict[str, Any]:
        """The columns from a file's folder names; a record's own fields take precedence."""
        return {**self._partition, **part.partition}

    def _records(self) -> Iterator[Record]:
        """The records of all files."""
        with suppress(*(InputError,) if self._lenient else ()):
            for part in self._parts:
                yield from self.records(part)


class TextChunk:
    """Consecutive records of a text source."""

    def __init__(self, source: TextSource, first: int, records: list[Record]) -> None:
        self.first, self.num_rows = first, len(records)
        self._source, self._records = source, records

    def rows(self) -> Iterator[Row]:
        """See `Chunk.rows`."""
        for index, record in enumerate(self._records, self.first):
            yield self._source.row(index, record)

    def digests(self, columns: Sequence[str]) -> list[int]:
        """See `Chunk.digests`: covers the whole record."""
        return [record.digest for record in self._records]

    def arrow(self, schema: pa.Schema) -> pa.RecordBatch:
        """See `Chunk.arrow`."""
        rows = [self._source.fields(record)[0] for record in self._records]
        arrays = [fitted([row.get(field.name) for row in rows], field.type) for field in schema]
        if not arrays:
            return no_columns(len(rows))
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def objects(self, taken: Sequence[str] = ()) -> Iterator[str | dict[str, Any] | None]:
        """See `Chunk.objects`."""
        for record in self._records:
            yield self._source.carried(record, taken)

    def cells(self, names: Sequence[str], delimiter: str) -> Iterator[str | Sequence[Any] | None]:
        """See `Chunk.cells`."""
        for record in self._records:
            yield self._source.cells(record, names, delimiter)
