"""The common schema of an input's Parquet files, or the reason there is none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.parquetfile import opened
from batchrun.jobs.rows.row import check_names, reading
from batchrun.jobs.rows.store import INPUTS, Noted, unnoted
from batchrun.jobs.rows.stream import text_of
from batchrun.jobs.rows.unify import (
    TypeConflictError,
    cast,
    exact_range,
    unite_fields,
    united_leaves,
)
from batchrun.objectstore.paths import Location

_OTHERS = (b"pandas", b"huggingface")  # metadata that describes columns one by one
_MAGIC = (b"PAR1", b"PARE")  # the latter for an encrypted footer
_UNITS = {"milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns"}


@dataclass(frozen=True)
class _SchemaFiles:
    """A schema, and the files that have it."""

    schema: pa.Schema
    paths: list[Location]


class _Leaf(NamedTuple):
    """A column of the file format; a nested field has several.

    Args:
        number: Its place in the file, from 0.
        name: Its name, with dots before nested fields.
        kind: Its type.
        to: The united type.
        limits: Least and greatest value that is exact in the united type.
    """

    number: int
    name: str
    kind: Any
    to: Any
    limits: tuple[int, int]


def united(paths: Sequence[Location], noted: Noted = unnoted) -> tuple[pa.Schema, list[int]]:
    """One schema that holds the values of all files, and each file's number of rows.

    The first file's columns come first, then others in order of appearance. A column that a file
    lacks is null there. Integers and floats, or times in different units, become one column if the
    files' statistics prove that every value is exact in the wider type. Reads metadata only.

    Raises:
        InputError: A file is damaged or can't be read, or a column would change its values.
    """
    counts: list[int] = []
    found: dict[tuple[pa.Field[Any], ...], _SchemaFiles] = {}
    for path in paths:
        try:
            with opened(path, noted) as file:
                counts.append(file.metadata.num_rows)
                schema = file.schema_arrow
        except InputError:
            _check_kind(path)
            raise
        found.setdefault(tuple(schema), _SchemaFiles(schema, [])).paths.append(path)
    kinds = list(found.values())
    if not kinds:
        return pa.schema([]), []
    for kind in kinds:
        check_names(kind.paths[0], kind.schema.names, "give its columns different names")
    fields = list(kinds[0].schema)
    for i, kind in enumerate(kinds[1:], 1):
        try:
            fields = unite_fields(fields, kind.schema)
        except TypeConflictError as conflict:
            raise _conflict(kinds[:i], kind, conflict) from None
    if fields == list(kinds[0].schema):
        schema = kinds[0].schema
    else:
        metadata = kinds[0].schema.metadata or {}
        kept: Any = {key: value for key, value in metadata.items() if key not in _OTHERS}
        schema = pa.schema(fields, kept or None)
    for kind in kinds:
        if not kind.schema.equals(schema):
            _check_casts(kind, schema)
            _check_values(kind, kinds, schema)
    return schema, counts


def _check_kind(path: Location) -> None:
    """Refuse a file of another kind, and name the kind.

    Raises:
        InputError: It is of another kind, or can't be read.
    """
    with reading(path), INPUTS.open(path) as file:
        head = file.read(4)
    if not head or head in _MAGIC:
        return
    with text_of(path) as _:  # recognises many other kinds of files
        pass
    raise InputError(f"{path} is not a Parquet file", hint="give it a name that says what it is")


def _conflict(
    earlier: Sequence[_SchemaFiles], kind: _SchemaFiles, conflict: TypeConflictError
) -> InputError:
    """The error, naming the first file whose schema conflicts with this one's."""
    first = earlier[0]
    for other in earlier:
        try:
            unite_fields(other.schema, kind.schema)
        except TypeConflictError as alone:
            conflict, first = alone, other
            break
    how = f"{conflict.was} in {first.paths[0]}, {conflict.now} in {kind.paths[0]}"
    return _differ(conflict.name, how, conflict.advice)


def _differ(name: str, how: str, advice: str | None = None) -> InputError:
    return InputError(
        f"the Parquet files differ in their columns: '{name}' is {how}",
        hint=advice or "submit them as separate jobs, or write them with one schema",
    )


def _check_casts(kind: _SchemaFiles, schema: pa.Schema) -> None:
    """Check that Arrow has the casts, before rows need them."""
    for field in kind.schema:
        to = schema.field(field.name).type
        try:
            cast(pa.nulls(1, field.type), to)
        except pa.ArrowException as error:
            how = f"{field.type} in {kind.paths[0]}, which can't be read as {to}: {error}"
            raise _differ(field.name, how) from error


def _check_values(kind: _SchemaFiles, kinds: Sequence[_SchemaFiles], schema: pa.Schema) -> None:
    """Prove by the files' statistics that their values are exact in the united types."""
    leaves = [
        _Leaf(i, name, was, to, limits)
        for i, (name, was, to) in enumerate(united_leaves(kind.schema, schema))
        if (limits := exact_range(was, to))
    ]
    for path in kind.paths if leaves else ():
        with opened(path) as file:
            doubts = [(leaf, why) for leaf in leaves if (why := _doubt(file.metadata, leaf))]
        if doubts:
            leaf, why = doubts[0]
            other, there = _cause(kind, kinds, leaf)
            how = f"{leaf.kind} in {path}, {there} in {other}, and {path} {why}"
            raise _differ(leaf.name, how)


def _doubt(metadata: pq.FileMetaData, leaf: _Leaf) -> str | None:
    """Why a column's values may not be exact in the united type, by the file's statistics."""
    low, high = leaf.limits
    for group in range(metadata.num_row_groups):
        found = _least_and_greatest(metadata, group, leaf)
        if found is None:
            return f"has no statistics that prove its values exact in {leaf.to}"
        for value in found:
            if not low <= value <= high:
                return f"has the value {value}, but {leaf.to} is exact only from {low} to {high}"
    return None


def _least_and_greatest(
    metadata: pq.FileMetaData, group: int, leaf: _Leaf
) -> tuple[int, ...] | None:
    """A column's extremes in a row group, in its units; empty if all are null, None if unknown."""
    chunk = metadata.row_group(group).column(leaf.number)
    statistics: Any = chunk.statistics
    if chunk.num_values == 0:
        return ()
    if statistics is None or chunk.physical_type != "INT64":
        return None
    if not statistics.has_min_max:
        nulls = statistics.null_count if statistics.has_null_count else 0
        return () if nulls == chunk.num_values else None
    if pa.types.is_timestamp(leaf.kind):
        logical = json.loads(metadata.schema.column(leaf.number).logical_type.to_json())
        if _UNITS.get(logical.get("timeUnit")) != leaf.kind.unit:
            return None
    found = int(statistics.min_raw), int(statistics.max_raw)
    if pa.types.is_uint64(leaf.kind):  # stored in the bits of signed integers
        return tuple(value % (1 << 64) for value in found)
    return found


def _cause(kind: _SchemaFiles, kinds: Iterable[_SchemaFiles], leaf: _Leaf) -> tuple[Location, Any]:
    """The first file, and its type, because of which a column must change its type."""
    for other in kinds:
        pair = unite_fields(kind.schema, other.schema)
        name, was, to = list(united_leaves(kind.schema, pair))[leaf.number]
        if exact_range(was, to):
            there = {name: found for name, found, _ in united_leaves(other.schema, other.schema)}
            return other.paths[0], there.get(name, to)
    return kind.paths[0], leaf.to
