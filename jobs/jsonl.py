"""JSON Lines as a source: one object a line, plain or compressed."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa

from jobs.errors import InputError
from jobs.row import BATCH_BYTES, BATCH_ROWS, Row, reading, valid_value

_CODECS: dict[str, Literal["gzip", "zstd"]] = {".gz": "gzip", ".zst": "zstd"}
_MAX_LINE = 256 << 20  # bytes; more is no line but a file of another kind
_MAX_DEPTH = 64  # levels, well below where Python's own JSON gives up
_MAX_FIELDS = 1000  # of a nested object, to get a struct type
_SAMPLE = 100  # rows looked at before the job starts
_EXACT = 1 << 53  # integers up to here are exact as float64
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonlSource:
    """JSON Lines files. A blank line is no row; a line that is no JSON object is a bad row.

    Raises:
        InputError: There are no rows, the first 100 hold no object, or a file can't be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._schema: pa.Schema | None = None
        for path in self._paths:
            next(lines(path), None)  # each one opens, and its beginning unpacks
        names: dict[str, None] = {}
        errors = []
        rows = 0
        for row in islice(self.rows(), _SAMPLE):
            rows += 1
            names.update(dict.fromkeys(row.fields))
            if row.error is not None:
                errors.append(row.error)
        what = str(self._paths[0]) if len(self._paths) == 1 else f"{len(self._paths)} input files"
        if rows == 0:
            raise InputError(f"{what}: the input has no rows", hint="check what wrote it")
        if len(errors) == rows:
            raise InputError(
                f"{what}: no JSON object in the first {rows} rows: {errors[0]}",
                hint="write one JSON object a line; an array becomes that with: "
                "jq -c '.[]' array.json > rows.jsonl",
            )
        self._column_names = list(names)

    @property
    def column_names(self) -> list[str]:
        """Columns of the first 100 rows, in order of appearance."""
        return self._column_names

    @property
    def num_rows(self) -> None:
        """Unknown: see `count`."""
        return

    def count(self) -> int:
        """Rows, counted without parsing them."""
        return sum(1 for path in self._paths for _ in lines(path))

    def schema(self) -> pa.Schema:
        """Types that hold the values of all rows, as `Shape` finds them."""
        if self._schema is None:
            shapes: dict[str, Shape] = {}
            for row in self.rows():
                for name, value in row.fields.items():
                    if name not in shapes:
                        shapes[name] = Shape()
                    shapes[name].add(value)
            self._schema = pa.schema([(name, shape.type()) for name, shape in shapes.items()])
        return self._schema

    def rows(
        self, columns: Sequence[str] | None = None, start: int = 0, limit: int | None = None
    ) -> Iterator[Row]:
        """See `Source.rows`."""
        for index, where, line in self._records(start, limit):
            text, fields, error = _parse(line)
            if error is not None:
                yield Row(index, {}, f"{where} {error}")
                continue
            if _ESCAPED_SURROGATE.search(text):
                fields = valid_value(fields)
            if columns is not None:
                fields = {name: fields.get(name) for name in columns}
            yield Row(index, fields)

    def batches(self, schema: pa.Schema, limit: int | None = None) -> Iterator[pa.RecordBatch]:
        """See `Source.batches`."""
        fits = [(field.name, field.type, _fit(field.type)) for field in schema]
        pending: list[dict[str, Any]] = []
        size = 0

        def batch() -> pa.RecordBatch:
            arrays = [
                pa.array([fit(fields.get(name)) for fields in pending], type=kind)
                for name, kind, fit in fits
            ]
            if not arrays:
                empty = pa.array([{}] * len(pending), type=pa.struct([]))
                return pa.RecordBatch.from_struct_array(cast(pa.StructArray, empty))
            return pa.RecordBatch.from_arrays(arrays, schema=schema)

        for _, _, line in self._records(0, limit):
            text, fields, _ = _parse(line)
            pending.append(valid_value(fields) if _ESCAPED_SURROGATE.search(text) else fields)
            size += len(line)
            if size >= BATCH_BYTES or len(pending) >= BATCH_ROWS:
                yield batch()
                pending, size = [], 0
        if pending:
            yield batch()

    def objects(self, limit: int | None = None) -> Iterator[dict[str, Any] | None]:
        """See `Source.objects`; strings are as they were, lone surrogates and all."""
        for _, _, line in self._records(0, limit):
            _, fields, error = _parse(line)
            yield fields if error is None else None

    def _records(self, start: int, limit: int | None) -> Iterator[tuple[int, str, bytes]]:
        """(row index, where it is, line) from row `start` on."""
        stop = None if limit is None else start + limit
        records = ((path, number, line) for path in self._paths for number, line in lines(path))
        for index, (path, number, line) in enumerate(islice(records, start, stop), start):
            yield index, f"line {number} of {path.name}", line


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of all lines that are not blank."""
    with reading(path), path.open("rb") as raw:
        codec = _CODECS.get(path.suffix.lower())
        file: IO[bytes] = raw
        if codec is not None and path.stat().st_size:
            unpacked = pa.CompressedInputStream(raw, codec)
            file = io.BufferedReader(cast(io.RawIOBase, unpacked), 1 << 18)
        number = 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise InputError(
                    f"line {number} of {path} is longer than {_MAX_LINE >> 20} MiB",
                    hint="check that this is JSON Lines: one object a line",
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
            if line and not line.isspace():
                yield number, line


def _parse(line: bytes) -> tuple[str, dict[str, Any], str | None]:
    """(text, fields, what is wrong with the line)."""
    try:
        text = line.decode()
        return text, _object(text), None
    except UnicodeDecodeError as error:
        reason = f"is not valid UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        reason = f"is not valid JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
    except RecursionError:
        reason = f"is nested more than {_MAX_DEPTH} levels deep"
    except ValueError as error:
        reason = str(error)
    return "", {}, reason


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # Python's own limit against quadratic time
        raise ValueError("is not valid JSON: a number has over 4300 digits") from error
    if not isinstance(value, dict):
        raise ValueError(f"is not a JSON object but {_JSON_NAMES[type(value)]}")
    if text.count("[") + text.count("{") > _MAX_DEPTH and _too_deep(value):
        raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep")
    return value


_JSON_NAMES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


class Shape:
    """What the values of one column have in common, learnt one value at a time.

    Integers and floats together become float64 where that is exact. Values with nothing in
    common, as a string and a number or an integer beyond 64 bits, become text: strings as they
    are, other values as JSON. So do objects without keys or with over 1000 different ones.
    """

    def __init__(self) -> None:
        self._kinds: set[str] = set()
        self._items: Shape | None = None
        self._fields: dict[str, Shape] = {}

    def add(self, value: Any) -> None:
        """Learn a value."""
        if value is None:
            return
        kind = type(value).__name__
        if isinstance(value, int) and kind != "bool" and abs(value) > _EXACT:
            kind = "long" if -(1 << 63) <= value < 1 << 63 else "huge"
        self._kinds.add(kind)
        if len(self._kinds) > 1:
            return  # numbers or text, whatever comes
        if isinstance(value, list):
            self._items = self._items or Shape()
            for item in value:
                self._items.add(item)
        elif isinstance(value, dict) and len(self._fields) <= _MAX_FIELDS:
            for name, item in value.items():
                self._fields.setdefault(name, Shape()).add(item)

    def type(self) -> pa.DataType:
        """The Arrow type for all values so far; null where all were null."""
        plain = _PLAIN.get(frozenset(self._kinds))
        if plain is not None:
            return plain
        if self._kinds == {"list"} and self._items:
            return pa.list_(pa.field("element", self._items.type()))
        if self._kinds == {"dict"} and 0 < len(self._fields) <= _MAX_FIELDS:
            return pa.struct([(name, shape.type()) for name, shape in self._fields.items()])
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


def _fit(kind: pa.DataType) -> Callable[[Any], Any]:
    """A function that turns a JSON value into what `pa.array` takes for a type of `Shape`."""
    if pa.types.is_string(kind):
        return _as_text
    if isinstance(kind, pa.ListType):
        item = _fit(kind.value_type)
        return lambda value: None if value is None else [item(inner) for inner in value]
    if isinstance(kind, pa.StructType):
        parts = [(field.name, _fit(field.type)) for field in kind]
        return lambda value: (
            None if value is None else {name: fit(value.get(name)) for name, fit in parts}
        )
    return lambda value: value


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
