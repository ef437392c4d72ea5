"""An input of which nothing is left but the numbers of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from batchrun.jobs.rows.row import Chunk, Row, no_columns


class LostChunk:
    """Rows of which nothing is known.

    Args:
        first: Index of the first.
        num_rows: How many.
    """

    def __init__(self, first: int, num_rows: int) -> None:
        self.first, self.num_rows = first, num_rows

    def digests(self, columns: Sequence[str]) -> list[int | None]:
        """See `Chunk.digests`."""
        return [None] * self.num_rows

    def arrow(self, schema: pa.Schema) -> pa.RecordBatch:
        """See `Chunk.arrow`."""
        if not len(schema):
            return no_columns(self.num_rows)
        nulls = [pa.nulls(self.num_rows, field.type) for field in schema]
        return pa.RecordBatch.from_arrays(nulls, schema=schema)

    def objects(self, taken: Sequence[str] = ()) -> Iterator[str | dict[str, Any] | None]:
        """See `Chunk.objects`."""
        return iter([None] * self.num_rows)

    def delimited(self, delimiter: str, names: Sequence[str]) -> Iterator[str | None]:
        """See `Chunk.delimited`."""
        return iter([None] * self.num_rows)


class Lost:
    """A source without anything."""

    column_names: list[str] = []  # noqa: RUF012 - of all
    num_rows = 0

    def count(self) -> int:
        """See `Source.count`."""
        return 0

    def schema(self) -> pa.Schema:
        """See `Source.schema`."""
        return pa.schema([])

    def chunks(
        self, columns: Sequence[str] | None = None, start: int = 0, limit: int | None = None
    ) -> Iterator[Chunk]:
        """See `Source.chunks`."""
        return iter(())

    def rows(
        self, columns: Sequence[str] | None = None, start: int = 0, limit: int | None = None
    ) -> Iterator[Row]:
        """See `Source.rows`."""
        return iter(())
