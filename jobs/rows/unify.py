"""One Arrow type for values of several types, if that changes no value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchrun.jobs.rows.arrowtypes import (
    is_binary,
    is_large_list,
    is_list,
    is_text,
    without_dictionary,
)

_INT64_MAX = (1 << 63) - 1
_DOUBLE_EXACT = 1 << 53  # float64 holds all integers up to this one
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_FIELD_ID = b"PARQUET:field_id"  # valid in one file only: in another it may mean another column


class TypeConflictError(Exception):
    """No type holds the values of both types.

    Args:
        name: The column, with dots before nested fields.
        was: The type in the first schema, or that it is not there.
        now: The type in the second.
        advice: What to do about it, if that is clear.
    """

    def __init__(self, name: str, was: object, now: object, advice: str | None = None) -> None:
        super().__init__(f"'{name}' is {was} and {now}")
        self.name, self.was, self.now, self.advice = name, str(was), str(now), advice


def unite_fields(was: Iterable[pa.Field[Any]], now: Iterable[pa.Field[Any]]) -> list[pa.Field[Any]]:
    """Fields for the rows of both: the first's in order, then what the second adds.

    A field that one lacks is null there. Names are unique in each.

    Raises:
        TypeConflictError: A field's types can't be united, or two names differ only in case.
    """
    old = {field.name: field for field in was}
    new = {field.name: field for field in now}
    lost = {name.casefold(): name for name in old if name not in new}
    united = [_united(field, new.get(field.name)) for field in old.values()]
    for name, field in new.items():
        if name in old:
            continue
        if name.casefold() in lost:
            raise TypeConflictError(
                name,
                "missing",
                field.type,
                f"'{lost[name.casefold()]}' and '{name}' differ only in case: rename one",
            )
        united.append(_united(field, None))
    return united


def _united(was: pa.Field[Any], now: pa.Field[Any] | None) -> Any:
    metadata = was.metadata or {}
    kept: Any = {key: text for key, text in metadata.items() if key != _FIELD_ID} or None
    field = was.with_metadata(kept)
    if now is None:
        return field.with_nullable(True)
    try:
        kind = unite(was.type, now.type)
    except TypeConflictError as error:
        error.name = f"{was.name}.{error.name}" if error.name else was.name
        raise
    return field.with_type(kind).with_nullable(was.nullable or now.nullable)


def unite(was: Any, now: Any) -> Any:  # noqa: PLR0911 - one for each kind of type
    """The type that holds the values of both, exactly within `exact_range`.

    Raises:
        TypeConflictError: There is none. Its `name` is that of a nested field, or empty.
    """
    if was == now or pa.types.is_null(now):
        return was
    if pa.types.is_null(was):
        return now
    if pa.types.is_dictionary(was) or pa.types.is_dictionary(now):
        return unite(without_dictionary(was), without_dictionary(now))
    if pa.types.is_struct(was) and pa.types.is_struct(now):
        if not _unique(was) or not _unique(now):
            raise TypeConflictError("", was, now)
        return pa.struct(unite_fields(was, now))
    if pa.types.is_map(was) and pa.types.is_map(now):
        return pa.map_(unite(was.key_type, now.key_type), _item(was.item_field, now.item_field))
    if is_list(was) and is_list(now):
        large = any(map(is_large_list, (was, now)))
        item = _item(was.value_field, now.value_field)
        return pa.large_list(item) if large else pa.list_(item)
    kind = _unite_values(was, now)
    if kind is None:
        raise TypeConflictError("", was, now)
    return kind


def _item(was: Any, now: Any) -> Any:
    return was.with_type(unite(was.type, now.type)).with_nullable(was.nullable or now.nullable)


def _unite_values(was: Any, now: Any) -> Any:
    """The same for types that are not nested; None if there is none."""
    types = pa.types
    if is_text(was) and is_text(now):
        large = types.is_large_string(was) or types.is_large_string(now)
        return pa.large_string() if large else pa.string()
    if is_binary(was) and is_binary(now):
        large = types.is_large_binary(was) or types.is_large_binary(now)
        return pa.large_binary() if large else pa.binary()
    integers = types.is_integer(was) + types.is_integer(now)
    floats = types.is_floating(was) + types.is_floating(now)
    if (integers, floats) == (1, 1):
        return pa.float64()
    same_zone = not types.is_timestamp(was) or not types.is_timestamp(now) or was.tz == now.tz
    if same_zone and any(is_kind(was) and is_kind(now) for is_kind in _WIDENING):
        try:
            schemas = [pa.schema([pa.field("x", kind)]) for kind in (was, now)]
            return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        except pa.ArrowException:  # decimals with more digits than Arrow has
            pass
    return None


# For these, Arrow's own rules lose nothing within `exact_range`.
_WIDENING = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_timestamp,
    pa.types.is_duration,
    pa.types.is_time,
    pa.types.is_date,
)


def exact_range(kind: Any, to: Any) -> tuple[int, int] | None:
    """The least and greatest integer of a type that `to` holds exactly; None if it holds all."""
    kind = without_dictionary(kind)
    if pa.types.is_int64(kind) or pa.types.is_uint64(kind):
        if pa.types.is_floating(to):
            return -_DOUBLE_EXACT, _DOUBLE_EXACT
        if pa.types.is_uint64(kind) and pa.types.is_int64(to):
            return 0, _INT64_MAX
    elif (pa.types.is_timestamp(kind) or pa.types.is_duration(kind)) and kind.unit != to.unit:
        most = _INT64_MAX // (_PER_SECOND[to.unit] // _PER_SECOND[kind.unit])
        return -most, most
    return None


def united_leaves(
    fields: Iterable[pa.Field[Any]], united: Iterable[pa.Field[Any]]
) -> Iterator[tuple[str, pa.DataType, pa.DataType]]:
    """Name, type and united type of each column that Parquet has for these fields, in its order."""
    to = {field.name: field.type for field in united}
    for field in fields:
        yield from _leaves(field.name, field.type, to[field.name])


def _leaves(name: str, kind: Any, to: Any) -> Iterator[tuple[str, pa.DataType, pa.DataType]]:
    if pa.types.is_struct(kind):
        for field in kind:  # names are unique unless both types are the same
            inner = field.type if kind == to else to.field(field.name).type
            yield from _leaves(f"{name}.{field.name}", field.type, inner)
    elif pa.types.is_map(kind):
        yield from _leaves(f"{name}.key", kind.key_type, to.key_type)
        yield from _leaves(f"{name}.value", kind.item_type, to.item_type)
    elif is_list(kind):
        yield from _leaves(name, kind.value_type, to.value_type)
    elif isinstance(kind, pa.BaseExtensionType):
        yield from _leaves(name, kind.storage_type, to.storage_type)
    else:
        yield name, kind, to


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch's rows with the columns of a united schema, or some of them.

    Raises:
        ArrowException: A value is not exact in its new type.
    """
    if batch.schema.equals(schema):
        return batch
    there = dict(zip(batch.schema.names, batch.columns, strict=True))
    return pa.RecordBatch.from_arrays(_all_of(schema, there, batch.num_rows), schema=schema)


def cast(array: Any, to: Any) -> Any:
    """The array in a united type; Arrow's own cast does not reorder or add nested fields.

    Raises:
        ArrowException: A value is not exact in that type.
    """
    kind = array.type
    if kind.equals(to):
        return array
    if pa.types.is_null(kind):
        return pa.nulls(len(array), to)
    if pa.types.is_struct(kind):
        parts = {field.name: array.field(i) for i, field in enumerate(kind)}
        columns = _all_of(to, parts, len(array))
        return pa.StructArray.from_arrays(columns, fields=list(to), mask=array.is_null())
    if pa.types.is_map(kind):
        pairs = [cast(array.keys, to.key_type), cast(array.items, to.item_type)]
        entries = pa.StructArray.from_arrays(pairs, fields=[to.key_field, to.item_field])
        buffers, offset = array.buffers()[:2], array.offset
        return pa.Array.from_buffers(to, len(array), buffers, offset=offset, children=[entries])
    if is_list(kind):
        return _cast_lists(array, to)
    return array.cast(to)


def _all_of(fields: Iterable[pa.Field[Any]], there: Mapping[str, Any], rows: int) -> list[Any]:
    """Arrays for these fields, in their types, with nulls for missing ones."""
    return [
        cast(there[field.name], field.type) if field.name in there else pa.nulls(rows, field.type)
        for field in fields
    ]


def _cast_lists(array: Any, to: Any) -> Any:
    large = pa.types.is_large_list(to)
    lengths = pc.if_else(array.is_valid(), pc.list_value_length(array), 0)
    ends = np.cumsum(lengths.to_numpy(zero_copy_only=False))
    offsets = pa.array(np.concatenate(([0], ends)), pa.int64() if large else pa.int32())
    items = cast(array.flatten(), to.value_type)  # `flatten` leaves out items beneath nulls
    make: Any = pa.LargeListArray if large else pa.ListArray
    return make.from_arrays(offsets, items, type=to, mask=array.is_null())


def _unique(kind: pa.StructType) -> bool:
    names = [field.name for field in kind]
    return len(set(names)) == len(names)
