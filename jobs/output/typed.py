"""Types for the JSON values of a column, and the values as Arrow takes them.

| type | Arrow | a value |
|---|---|---|
| `STRING`, `BOOLEAN`, `NULL` | string, bool, null | as it is |
| `INTEGER` | int64 | a whole number of 64 bits, such as 3 or 3.0 |
| `NUMBER` | float64 | any number, rounded to a float64 |
| `Struct` | struct | an object; absent properties are null, others than its own left out |
| `Map` | map of strings | an object with any keys |
| `List` | list | an array |
| `JsonText` | string | any value as its JSON, a string in its quotes |

JSON's null is null in every type, in `JsonText` too, which thus never holds the text `null`.

A map is Parquet's own type for this: pyarrow, polars, DuckDB and Spark read it as a map, pandas as
a list of pairs that `dict` takes, and its items keep their type.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cached_property
from typing import Any

import pyarrow as pa

from batchrun.jobs.rows.jsontext import Number, encode

_WORD = re.compile(r"[^\W\d]\w*")
_BITS = 1 << 63
_SHOWN = 40  # characters of a name or number, in a message
_TITLES: dict[type[Any], str] = {str: "a string", list: "an array", dict: "an object"}


class MisfitError(ValueError):
    """A value doesn't fit its type; the message says why."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.path: list[str | int] = []  # keys and indices, the innermost first

    def at(self, name: str) -> str:
        """The message after the value's place in a column: `name.items[3].price: ...`."""
        return f"{name}{''.join(map(_step, reversed(self.path)))}: {self}"


def inside(key: str | int, convert: Callable[[Any], Any], value: Any) -> Any:
    """The converted value, which is at that key of another; an error knows it."""
    try:
        return convert(value)
    except MisfitError as error:
        error.path.append(key)
        raise


@dataclass(frozen=True)
class ValueType(ABC):
    """The type of a JSON value.

    Args:
        nullable: Whether the value may be null.
    """

    nullable: bool = field(default=False, kw_only=True)

    @property
    @abstractmethod
    def arrow(self) -> pa.DataType:
        """Arrow's type."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What such a value is, in words."""

    @abstractmethod
    def stored(self, value: Any) -> Any:
        """The value, which is not null, as Arrow takes it; see `fitted`."""

    def fitted(self, value: Any) -> Any:
        """A value, with `Number` for numbers that are no integers, as Arrow takes it.

        Raises:
            MisfitError: It is not of this type.
        """
        if value is not None:
            return self.stored(value)
        if self.nullable:
            return None
        raise self.misfit(value)

    def misfit(self, value: Any) -> MisfitError:
        """The error for a value of another type."""
        return MisfitError(f"expected {self.title}, but found {_named(value)}")


@dataclass(frozen=True)
class Scalar(ValueType):
    """A value that holds no others.

    Args:
        name: JSON schema's name for it.
    """

    name: str

    @property
    def arrow(self) -> pa.DataType:
        """See `ValueType`."""
        return _SCALARS[self.name][0]

    @property
    def title(self) -> str:
        """See `ValueType`."""
        return _SCALARS[self.name][1]

    def stored(self, value: Any) -> Any:
        """See `ValueType`."""
        found = _SCALARS[self.name][2](value)
        if found is None:
            raise self.misfit(value)
        return found


@dataclass(frozen=True)
class Struct(ValueType):
    """An object with known properties.

    Args:
        fields: Name and type of each; at least one.
        required: Names that an object must have.
        closed: It may have no other properties.
    """

    fields: tuple[tuple[str, ValueType], ...]
    required: frozenset[str] = frozenset()
    closed: bool = False
    title = "an object"

    @cached_property
    def arrow(self) -> pa.DataType:
        """See `ValueType`."""
        return pa.struct([pa.field(name, kind.arrow) for name, kind in self.fields])

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.fields)

    def stored(self, value: Any) -> Any:
        """See `ValueType`."""
        if not isinstance(value, dict):
            raise self.misfit(value)
        if not self.required <= value.keys():
            lost = next(name for name in sorted(self.required) if name not in value)
            raise MisfitError(f"an object without {_quoted(lost)}, which the schema requires")
        if self.closed and not value.keys() <= self._names:
            more = next(name for name in value if name not in self._names)
            raise MisfitError(f"an object with {_quoted(more)}, which the schema does not allow")
        found, key = {}, ""
        try:
            for key, kind in self.fields:
                if key in value:
                    found[key] = kind.fitted(value[key])
        except MisfitError as error:
            error.path.append(key)
            raise
        return found


@dataclass(frozen=True)
class Map(ValueType):
    """An object with any keys, and values of one type."""

    item: ValueType
    title = "an object"

    @cached_property
    def arrow(self) -> pa.DataType:
        """See `ValueType`."""
        return pa.map_(pa.string(), self.item.arrow)

    def stored(self, value: Any) -> Any:
        """See `ValueType`."""
        if not isinstance(value, dict):
            raise self.misfit(value)
        return [(key, inside(key, self.item.fitted, item)) for key, item in value.items()]


@dataclass(frozen=True)
class List(ValueType):
    """An array whose items have one type."""

    item: ValueType
    title = "an array"

    @cached_property
    def arrow(self) -> pa.DataType:
        """See `ValueType`."""
        return pa.list_(pa.field("element", self.item.arrow))

    def stored(self, value: Any) -> Any:
        """See `ValueType`."""
        if not isinstance(value, list):
            raise self.misfit(value)
        return [inside(i, self.item.fitted, item) for i, item in enumerate(value)]


@dataclass(frozen=True)
class JsonText(ValueType):
    """A value that no other type holds.

    Args:
        only: The Python type that it must have: dict or list.
    """

    only: type[Any] = object
    arrow = pa.string()

    @property
    def title(self) -> str:
        """See `ValueType`."""
        return _TITLES.get(self.only, "a value")

    def stored(self, value: Any) -> str:
        """See `ValueType`."""
        if not isinstance(value, self.only):
            raise self.misfit(value)
        return encode(value)


def _integer(value: Any) -> int | None:
    found = value
    if isinstance(value, Number) and value.is_integer():
        try:
            exact = Decimal(value.text)
        except InvalidOperation:  # of 1e-9999999999999999999
            return None
        found = int(exact) if exact == exact.to_integral_value() else None
    if isinstance(found, bool) or not isinstance(found, int):
        return None
    if not -_BITS <= found < _BITS:
        raise MisfitError(f"{_shown(str(value))} does not fit in 64 bits")
    return int(found)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    check_finite(value)
    return float(value)


def _of(kind: type[Any]) -> Callable[[Any], Any]:
    return lambda value: value if isinstance(value, kind) else None


_SCALARS: dict[str, tuple[pa.DataType, str, Callable[[Any], Any]]] = {
    "string": (pa.string(), "a string", _of(str)),
    "integer": (pa.int64(), "an integer", _integer),
    "number": (pa.float64(), "a number", _number),
    "boolean": (pa.bool_(), "true or false", _of(bool)),
    "null": (pa.null(), "null", lambda _: None),
}
STRING, INTEGER, NUMBER, BOOLEAN = (Scalar(name) for name in list(_SCALARS)[:4])
NULL = Scalar("null", nullable=True)
ANY = JsonText(nullable=True)


def check_finite(value: Any) -> None:
    """Refuse numbers that readers of JSON can't hold, wherever they are in a value.

    Raises:
        MisfitError: One is NaN, infinite, or beyond float64.
    """
    if isinstance(value, dict | list):
        items: Any = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            inside(key, check_finite, item)
    elif isinstance(value, int | float):
        try:
            finite = math.isfinite(value)
        except OverflowError:
            finite = False
        if not finite:
            raise MisfitError(f"{_shown(str(value))} is not a finite 64-bit number")


def _shown(text: str) -> str:
    """A text as a message shows it: its beginning, if it is long."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _quoted(name: str) -> str:
    return json.dumps(_shown(name), ensure_ascii=False)


def _step(key: str | int) -> str:
    if isinstance(key, int):
        return f"[{key}]"
    return f".{key}" if _WORD.fullmatch(key) and len(key) <= _SHOWN else f"[{_quoted(key)}]"


def _named(value: Any) -> str:
    """A value's type, in words; of a number or a constant itself."""
    if value is None or isinstance(value, bool | int | float):
        return _shown(encode(value))
    return _TITLES[type(value)]
