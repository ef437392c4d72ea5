"""Arrow types for untyped values, and the values converted to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from batchrun.jobs.rows.jsontext import Number, as_text

_MAX_FIELDS = 1000  # of a nested object that becomes a struct
_MAX_LEVELS = 32  # of nested types; readers of Parquet stop at 49 lists
_EXACT = 1 << 53  # integers up to here are exact as float64


class InferredType:
    """What the values of one column have in common, learnt one value at a time.

    Integers and floats together become float64 if that is exact. Values with nothing in common,
    such as a string and a number, become text: strings as they are, other values as JSON. So do
    integers beyond 64 bits, floats that no float64 holds (see `Number.exact`), objects without keys
    or with over 1000 different ones, and values more than 32 levels deep.
    """

    def __init__(self) -> None:
        self._kinds: set[str] = set()
        self._items: InferredType | None = None
        self._fields: dict[str, InferredType] = {}

    def add(self, value: Any) -> None:
        """Learn a value."""
        if value is None:
            return
        kind = type(value).__name__
        if isinstance(value, Number):
            kind = "float" if value.exact else "huge"
        elif isinstance(value, int) and kind != "bool":
            far = "long" if -(1 << 63) <= value < 1 << 63 else "huge"
            kind = far if abs(value) > _EXACT else "int"
        self._kinds.add(kind)
        if len(self._kinds) > 1:
            return  # numbers or text, whatever follows
        if isinstance(value, list):
            self._items = self._items or InferredType()
            for item in value:
                self._items.add(item)
        elif isinstance(value, dict) and len(self._fields) <= _MAX_FIELDS:
            for name, item in value.items():
                self._fields.setdefault(name, InferredType()).add(item)

    def type(self, levels: int = _MAX_LEVELS) -> pa.DataType:
        """The Arrow type for all values so far; null where all were null."""
        plain = _PLAIN.get(frozenset(self._kinds))
        if plain is not None:
            return plain
        if self._kinds == {"list"} and self._items and levels:
            return pa.list_(pa.field("element", self._items.type(levels - 1)))
        if self._kinds == {"dict"} and 0 < len(self._fields) <= _MAX_FIELDS and levels:
            fields = self._fields.items()
            return pa.struct([(name, shape.type(levels - 1)) for name, shape in fields])
        return pa.string()


_PLAIN: dict[frozenset[str], pa.DataType] = {
    frozenset(): pa.null(),
    frozenset({"bool"}): pa.bool_(),
    frozenset({"int"}): pa.int64(),
    frozenset({"long"}): pa.int64(),
    frozenset({"int", "long"}): pa.int64(),
    frozenset({"float"}): pa.float64(),
    frozenset({"int", "float"}): pa.float64(),
}


def fitted(values: Sequence[Any], kind: pa.DataType) -> pa.Array[Any]:
    """JSON values as an array of a type of `InferredType`."""
    return pa.array(list(map(_fit(kind), values)), type=kind)


def _fit(kind: pa.DataType) -> Callable[[Any], Any]:
    """A function that converts a JSON value to what `pa.array` takes for an inferred type."""
    if pa.types.is_string(kind):
        return as_text
    if isinstance(kind, pa.ListType):
        item = _fit(kind.value_type)
        return lambda value: None if value is None else [item(inner) for inner in value]
    if isinstance(kind, pa.StructType):
        parts = [(field.name, _fit(field.type)) for field in kind]
        return lambda value: (
            None if value is None else {name: fit(value.get(name)) for name, fit in parts}
        )
    return lambda value: value
