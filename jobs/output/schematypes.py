"""The type of the values that a JSON schema allows.

| schema | type |
|---|---|
| `string`, `integer`, `number`, `boolean`, `null` | the scalar |
| `enum` or `const` without a `type` | that of its values |
| an object with `properties` | `Struct` |
| an object with only `additionalProperties`, of one type | `Map` |
| an array whose items have one type | `List` |
| several types, `anyOf`, `oneOf` | the one type that they are, null and integer/number aside |
| `allOf`, keywords beside `$ref` or `anyOf` | that of all of them merged |
| `$ref` to a place in the schema | that of the place |
| anything else | `JsonText` |

Anything else is: open objects; a type inside itself; conditions; a `$ref` to elsewhere; what is
nested deeper than readers of Parquet go; names with NUL, or equal but for case, which some of them
can't tell apart. A schema with too many columns is `JsonText` as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any
from urllib.parse import unquote

from batchrun.jobs.output.typed import (
    ANY,
    BOOLEAN,
    INTEGER,
    NULL,
    NUMBER,
    STRING,
    JsonText,
    List,
    Map,
    Struct,
    ValueType,
)

_MAX_LEVELS = 32  # of nested types; readers of Parquet stop at 49 lists
_MAX_STEPS = 64  # of `$ref`, `allOf`, `anyOf` on the way to one type
_MAX_DEPTH = 256  # of the schema's own JSON
_MAX_COLUMNS = 5_000
_MAX_PARTS = 50_000  # schemas looked at, and properties merged
# Keywords that say which type there is. Others only limit its values, or describe them.
_TYPING = {
    *("type", "enum", "const", "required", "maxItems"),
    *("properties", "patternProperties", "additionalProperties", "unevaluatedProperties"),
    *("items", "prefixItems", "additionalItems", "unevaluatedItems"),
}
_CONDITIONS = {"if", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"}
_SCALARS = dict(
    zip(
        ("string", "integer", "number", "boolean", "null"),
        (STRING, INTEGER, NUMBER, BOOLEAN, NULL),
        strict=True,
    )
)
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"|([\[{])|([\]}])')


class _Unclear(Exception):  # noqa: N818 - caught below
    """The values of a schema have no one type."""


class _TooLarge(Exception):  # noqa: N818 - caught below
    """A schema has too many parts or columns."""


@dataclass(frozen=True)
class _Plain:
    """A schema without references and alternatives.

    Args:
        keys: Its keywords that are `_TYPING`.
        within: References that led here.
    """

    keys: Mapping[str, Any]
    within: frozenset[str]


def type_of(schema: str) -> ValueType:
    """The type of the values that a JSON schema, given as JSON, allows."""
    if _depth(schema) > _MAX_DEPTH:
        return ANY
    try:
        root = json.loads(schema)
        return _Types(root).of(root, 0, frozenset("#"))
    except (_TooLarge, ValueError):
        return ANY


def united(kinds: Iterable[ValueType]) -> ValueType:
    """The type for values of all these types."""
    return reduce(_united, kinds)


def _united(one: ValueType, other: ValueType) -> ValueType:
    nullable = one.nullable or other.nullable
    if NULL in (one, other):
        return replace(other if one == NULL else one, nullable=True)
    one, other = (replace(kind, nullable=nullable) for kind in (one, other))
    if one == other:
        return one
    if {INTEGER, NUMBER} == {replace(kind, nullable=False) for kind in (one, other)}:
        return replace(NUMBER, nullable=nullable)
    if isinstance(one, Struct) and isinstance(other, Struct) and one.fields == other.fields:
        required, closed = one.required & other.required, one.closed and other.closed
        return replace(one, required=required, closed=closed)
    return JsonText(nullable=nullable)


class _Types:
    """The types of the parts of one schema."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._parts = self._columns = 0

    def of(self, schema: Any, level: int, within: frozenset[str]) -> ValueType:
        """The type of a part.

        Args:
            schema: The part.
            level: Number of types that it is nested in.
            within: The references that led to it.
        """
        self._columns += 1
        if self._columns > _MAX_COLUMNS:
            raise _TooLarge
        try:
            found = self._plain(schema, within, 0)
            return united([self._of_plain(each, level) for each in found]) if found else ANY
        except _Unclear:
            return ANY

    def _plain(self, schema: Any, within: frozenset[str], step: int) -> list[_Plain]:
        """The alternatives that a schema consists of: a value is allowed by one of them."""
        self._count(1)
        if step > _MAX_STEPS or not (schema is True or isinstance(schema, dict)):
            raise _Unclear
        keys = {} if schema is True else schema
        if not _CONDITIONS.isdisjoint(keys):
            raise _Unclear
        found = [_Plain({k: v for k, v in keys.items() if k in _TYPING}, within)]
        if "$ref" in keys:
            ref = keys["$ref"]
            if not isinstance(ref, str) or ref in within:
                raise _Unclear
            place = self._place(ref)
            found = self._both(found, self._plain(place, within | {ref}, step + 1))
        for part in _list(keys.get("allOf", [])):
            found = self._both(found, self._plain(part, within, step + 1))
        for branches in (_list(keys[key]) for key in ("anyOf", "oneOf") if key in keys):
            each = [self._plain(branch, within, step + 1) for branch in branches]
            found = self._both(found, [plain for plains in each for plain in plains])
        return found

    def _place(self, ref: str) -> Any:
        """What a JSON pointer into the schema points to."""
        head, *names = unquote(ref).split("/")
        if head != "#":
            raise _Unclear
        found = self._root
        for name in (name.replace("~1", "/").replace("~0", "~") for name in names):
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise _Unclear
        return found

    def _both(self, ones: list[_Plain], others: list[_Plain]) -> list[_Plain]:
        """The alternatives for values that both lists allow."""
        found = []
        for one in ones:
            for other in others:
                keys = _merged(one.keys, other.keys)
                self._count(1 + len(keys.get("properties", ())) if keys is not None else 1)
                if keys is not None:
                    found.append(_Plain(keys, one.within | other.within))
        return found

    def _count(self, parts: int) -> None:
        self._parts += parts
        if self._parts > _MAX_PARTS:
            raise _TooLarge

    def _of_plain(self, schema: _Plain, level: int) -> ValueType:
        keys = schema.keys
        if "type" in keys:
            return united([self._named(name, schema, level) for name in _names(keys["type"])])
        values = [keys["const"]] if "const" in keys else _list(keys.get("enum", []))
        return united(map(_of_value, values)) if values else ANY

    def _named(self, name: str, schema: _Plain, level: int) -> ValueType:
        """The type of a schema's values that have that JSON type."""
        if name == "object":
            return self._object(schema, level) or JsonText(only=dict)
        if name == "array":
            return self._array(schema, level) or JsonText(only=list)
        if name not in _SCALARS:
            raise _Unclear
        return _SCALARS[name]

    def _object(self, schema: _Plain, level: int) -> ValueType | None:
        keys, within = schema.keys, schema.within
        properties = _mapping(keys.get("properties", {}))
        more = [keys.get(f"{word}Properties", False) for word in ("additional", "unevaluated")]
        more = [schema for schema in more if schema is not False]
        if level == _MAX_LEVELS or keys.get("patternProperties") or not (properties or more):
            return None
        if not properties:
            item = self.of(more[0], level + 1, within) if len(more) == 1 else ANY
            return None if isinstance(item, JsonText) else Map(item)
        if more or "\0" in "".join(properties) or len(_folded(properties)) < len(properties):
            return None
        fields = [(name, self.of(part, level + 1, within)) for name, part in properties.items()]
        closed = False in (keys.get("additionalProperties"), keys.get("unevaluatedProperties"))
        required = (name for name in _list(keys.get("required", [])) if isinstance(name, str))
        return Struct(tuple(fields), frozenset(required), closed)

    def _array(self, schema: _Plain, level: int) -> ValueType | None:
        keys = schema.keys
        if level == _MAX_LEVELS:
            return None
        first, rest = keys.get("prefixItems", []), keys.get("items", True)
        if isinstance(rest, list):  # as before JSON schema 2020-12
            first, rest = rest, keys.get("additionalItems", True)
        most = keys.get("maxItems")
        ends = rest is False or keys.get("unevaluatedItems") is False
        ends = ends or (isinstance(most, int) and most <= len(_list(first)))
        parts = [*_list(first), *([] if first and ends else [rest])]
        item = united([self.of(part, level + 1, schema.within) for part in parts])
        return None if first and isinstance(item, JsonText) else List(item)


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """The keywords of both; None if no value can satisfy them."""
    keys = {**one, **other}
    for key in one.keys() & other.keys():
        a, b = one[key], other[key]
        if a == b:
            continue
        if key == "type":
            keys[key] = _common(_names(a), _names(b))
        elif key == "enum":
            keys[key] = [value for value in _list(a) if value in _list(b)]
        elif key == "required":
            keys[key] = [*_list(a), *_list(b)]
        elif key == "properties":
            shared = _mapping(a).keys() & _mapping(b).keys()
            keys[key] = {**a, **b, **{name: {"allOf": [a[name], b[name]]} for name in shared}}
        elif key in ("items", "additionalProperties", "unevaluatedProperties"):
            keys[key] = False not in (a, b) and {"allOf": [a, b]}
        elif key != "maxItems":
            raise _Unclear
        if key in ("type", "enum") and not keys[key]:
            return None
    return keys


def _common(one: list[str], other: list[str]) -> list[str]:
    """The JSON types in both lists; each integer is a number."""
    return [
        name
        for name in dict.fromkeys([*one, *other])
        if all(name in names or (name == "integer" and "number" in names) for names in (one, other))
    ]


def _of_value(value: Any) -> ValueType:
    if value is None:
        return NULL
    if isinstance(value, int) and not isinstance(value, bool):
        return INTEGER if -(1 << 63) <= value < 1 << 63 else ANY
    return {str: STRING, bool: BOOLEAN, float: NUMBER}.get(type(value), ANY)


def _names(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else _list(value)
    if not names or not all(isinstance(name, str) for name in names):
        raise _Unclear
    return names


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Unclear
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Unclear
    return value


def _folded(names: Iterable[str]) -> set[str]:
    return {name.casefold() for name in names}


def _depth(text: str) -> int:
    """How deep a JSON text is nested."""
    depth = most = 0
    for found in _BRACKET.finditer(text):
        depth += bool(found[1]) - bool(found[2])
        most = max(most, depth)
    return most
