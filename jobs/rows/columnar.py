"""Consecutive rows of a columnar file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from batchrun.jobs.rows.jsonable import Errors, json_values
from batchrun.jobs.rows.jsontext import encode_plain
from batchrun.jobs.rows.row import Row, digest_of


class ColumnarChunk:
    """Rows as an Arrow batch.

    Args:
        first: Index of the first.
        batch: The rows.
    """

    def __init__(self, first: int, batch: pa.RecordBatch) -> None:
        self.first, self.num_rows, self._batch = first, batch.num_rows, batch

    def rows(self) -> Iterator[Row]:
        """See `Chunk.rows`."""
        names = self._batch.schema.names
        for index, values in enumerate(self._values(names, "strict"), self.first):
            if isinstance(values, str):
                one = ColumnarChunk(index, self._batch.slice(index - self.first, 1))
                [replaced] = one._values(names, "replace")
                yield Row(index, {}, f"row {index}: {values}", _digest(replaced))
            else:
                yield Row(index, dict(zip(names, values, strict=True)), None, _digest(values))

    def digests(self, columns: Sequence[str]) -> Sequence[int | None]:
        """See `Chunk.digests`."""
        return [_digest(values) for values in self._values(columns, "replace")]

    def arrow(self, schema: pa.Schema) -> pa.RecordBatch:
        """See `Chunk.arrow`."""
        if not len(schema):
            return self._batch.select([])
        columns = [self._batch.column(name) for name in schema.names]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def objects(self, taken: Sequence[str] = ()) -> Iterator[str | dict[str, Any] | None]:
        """See `Chunk.objects`. Bytes that are not UTF-8 become U+FFFD."""
        names = self._batch.schema.names
        plain = not set(names) & set(taken)
        for values in self._values(names, "replace"):
            record = dict(zip(names, values, strict=True))
            yield encode_plain(record) if plain else record

    def cells(self, names: Sequence[str], delimiter: str) -> Iterator[str | Sequence[Any] | None]:
        """See `Chunk.cells`."""
        return self._values(names, "replace")

    def _values(self, names: Sequence[str], errors: Errors) -> Iterator[Sequence[Any] | str]:
        """The values of each row, or, with `strict`, an error text for a bad one."""
        chosen = [self._batch.column(name) for name in names]
        if not chosen:
            yield from [()] * self.num_rows
            return
        try:
            columns = [json_values(column, errors) for column in chosen]
        except UnicodeDecodeError:
            for i in range(self.num_rows):
                try:
                    yield [json_values(column.slice(i, 1), errors)[0] for column in chosen]
                except UnicodeDecodeError as error:
                    yield f"text that is not valid UTF-8: {error}"
            return
        yield from zip(*columns, strict=True)


def _digest(values: Sequence[Any] | str) -> int:
    return digest_of(repr(tuple(values)).encode())
