"""Arrow's values as JSON, by the type of the column and never by a value.

| type | in JSON |
|---|---|
| text, booleans, integers, null | as they are |
| floats of 16, 32 and 64 bits | numbers; null for NaN and infinities, which JSON does not have |
| timestamps | ISO 8601 text, `2026-01-02T03:04:05.678`, and with a zone its offset, `+01:00` |
| dates, times | ISO 8601 text, `2026-01-02`, `03:04:05.678` |
| durations | seconds as text, `-90.500`: no float holds all nanoseconds of a long one |
| decimals | text without an exponent, `1.10` |
| binary | base64 text |
| lists, structs | arrays, objects |
| maps | arrays of `[key, value]` |
| dictionary, run-end encoded, extension types | what their values are |
| `arrow.uuid`, `arrow.bool8` | a UUID's usual text, a boolean |

Fractions of seconds have the digits of the type's unit: none for s, 3 for ms, 6 for us, 9 for ns.
Years beyond 0000 to 9999 have a sign, as ISO 8601 wants it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc

from batchrun.jobs.rows.arrowtypes import any_of, is_binary, is_list, is_text
from batchrun.jobs.rows.moments import (
    clock_text,
    date_text,
    seconds_text,
    timestamp_text,
    zone_named,
)

Errors = Literal["strict", "replace"]
Rule = Callable[[Any, Errors], list[Any]]

_is_simple = any_of(is_text, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)


def json_values(array: pa.Array[Any], errors: Errors = "strict") -> list[Any]:
    """The array as Python values that JSON can hold, by the rules above.

    Args:
        array: Of any type that Parquet can give.
        errors: What to do about text that is not UTF-8; `replace` inserts U+FFFD.

    Raises:
        UnicodeDecodeError: Text is not UTF-8, and `errors` is `strict`.
    """
    kind = array.type
    if _is_plain(kind):
        try:
            return array.to_pylist()
        except ValueError:  # text that is not UTF-8, a struct with two fields of one name
            pass
    rule = next((rule for applies, rule in _RULES if applies(kind)), None)
    return rule(array, errors) if rule else _each(str, array.to_pylist())


def _each(convert: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    return [None if value is None else convert(value) for value in values]


def _text(array: pa.Array[Any], errors: Errors) -> list[Any]:
    cells: Any = array
    return [
        cell.as_buffer().to_pybytes().decode(errors=errors) if cell.is_valid else None
        for cell in cells
    ]


def _by_value(convert: Callable[[Any], Any]) -> Rule:
    """A rule that converts each Python value to JSON's."""
    return lambda array, errors: _each(convert, array.to_pylist())


def _by_unit(text: Callable[[int, str], str]) -> Rule:
    """A rule that turns each integer number of units into text."""
    return lambda array, errors: _each(lambda value: text(value, array.type.unit), _integers(array))


def _timestamp(array: pa.Array[Any], errors: Errors) -> list[Any]:
    kind: Any = array.type
    unit, zone = kind.unit, zone_named(kind.tz) if kind.tz else None
    return _each(lambda value: timestamp_text(value, unit, zone), _integers(array))


def _date(array: pa.Array[Any], errors: Errors) -> list[Any]:
    day = 86_400_000 if pa.types.is_date64(array.type) else 1
    return _each(lambda value: date_text(value // day), _integers(array))


def _integers(array: pa.Array[Any]) -> list[Any]:
    """Arrow's underlying integers; Python's own types lack nanoseconds and distant years."""
    return array.cast(pa.int32() if array.type.bit_width == 32 else pa.int64()).to_pylist()


def _dictionary(array: Any, errors: Errors) -> list[Any]:
    # Not the whole dictionary, which may cover many more rows.
    return json_values(array.dictionary.take(array.indices), errors)


def _run_ends(array: Any, errors: Errors) -> list[Any]:
    return json_values(pc.call_function("run_end_decode", [array]), errors)


def _extension(array: Any, errors: Errors) -> list[Any]:
    storage = array.storage
    if array.type.extension_name == "arrow.uuid":
        return _each(lambda value: str(UUID(bytes=value)), storage.to_pylist())
    if array.type.extension_name == "arrow.bool8":
        return _each(bool, storage.to_pylist())
    return json_values(storage, errors)


def _struct(array: Any, errors: Errors) -> list[Any]:
    names = [field.name for field in array.type]
    columns = [json_values(array.field(i), errors) for i in range(len(names))]
    rows: Iterable[Any] = zip(*columns, strict=True) if names else [()] * len(array)
    return _valid(array, [dict(zip(names, row, strict=True)) for row in rows])


def _list(array: Any, errors: Errors) -> list[Any]:
    items = json_values(array.flatten(), errors)  # `flatten` leaves out items beneath nulls
    lengths = pc.if_else(array.is_valid(), pc.list_value_length(array), None)
    return _cut(items, lengths.to_pylist())


def _map(array: Any, errors: Errors) -> list[Any]:
    offsets = array.offsets.to_pylist()
    low, length = offsets[0], offsets[-1] - offsets[0]
    keys = json_values(array.keys.slice(low, length), errors)
    items = json_values(array.items.slice(low, length), errors)
    lengths = [after - before for before, after in pairwise(offsets)]
    return _valid(array, _cut([list(pair) for pair in zip(keys, items, strict=True)], lengths))


def _valid(array: pa.Array[Any], values: Sequence[Any]) -> list[Any]:
    """The values, and None where the array is null."""
    valid = array.is_valid().to_pylist()
    return [value if there else None for value, there in zip(values, valid, strict=True)]


def _cut(items: Sequence[Any], lengths: Iterable[int | None]) -> list[Any]:
    """The items in lists of these lengths; None for None."""
    lists: list[Any] = []
    low = 0
    for length in lengths:
        lists.append(None if length is None else items[low : low + length])
        low += length or 0
    return lists


def _is_plain(kind: Any) -> bool:
    """Whether JSON can hold the type's Python values as they are."""
    if _is_simple(kind):
        return True
    if pa.types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    return is_list(kind) and _is_plain(kind.value_type)


def _is_extension(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType)


_RULES: list[tuple[Callable[[Any], bool], Rule]] = [
    (is_text, _text),
    (pa.types.is_floating, _by_value(lambda value: float(value) if math.isfinite(value) else None)),
    (pa.types.is_struct, _struct),
    (is_list, _list),
    (pa.types.is_dictionary, _dictionary),
    (pa.types.is_timestamp, _timestamp),
    (pa.types.is_date, _date),
    (pa.types.is_time, _by_unit(clock_text)),
    (pa.types.is_duration, _by_unit(seconds_text)),
    (pa.types.is_decimal, _by_value("{:f}".format)),
    (is_binary, _by_value(lambda value: base64.b64encode(value).decode())),
    (pa.types.is_map, _map),
    (_is_extension, _extension),
    (pa.types.is_run_end_encoded, _run_ends),
]
