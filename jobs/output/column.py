"""A column that an output adds to the input's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchrun.jobs.journal.results import Result

Value = Callable[[Result], Any]


@dataclass(frozen=True)
class Column:
    """A column that the output adds.

    Args:
        kind: Its type in Arrow.
        value: A result's value, as JSON has it.
        stored: The value as Arrow takes it; default: the same.
        cell: The value as CSV has it; default: the same.
        categories: The values that `stored` has the indices of, if the type is a dictionary.
    """

    kind: pa.DataType
    value: Value
    stored: Value | None = None
    cell: Value | None = None
    categories: Sequence[str] | None = None

    def array(self, stored: Sequence[Any]) -> pa.Array[Any]:
        """The column, made of what `stored` returned for each result."""
        if self.categories is None:
            return pa.array(stored, self.kind)
        indices, categories = pa.array(stored, pa.int32()), pa.array(self.categories, pa.string())
        return pa.DictionaryArray.from_arrays(indices, categories)
