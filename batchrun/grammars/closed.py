"""Objects of a JSON schema have the properties that it lists, and no others.

In JSON Schema an object may have any other properties too, unless `additionalProperties` says
otherwise. Hardly anybody who lists properties wants a model to make up more of them, so an object
that lists some and says nothing of others is closed. What is generated then still fits the schema
as it was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_COMPOSED = ("allOf", "anyOf", "oneOf")  # their branches describe the same value as their parent
# With one of these, an object says something of other properties, or another schema may.
_OPEN = {
    *("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames"),
    *("not", "if", "$ref", "minProperties", *_COMPOSED),
}
# Keywords whose values are schemas: by name, one or several, and one.
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_LISTS = (*_COMPOSED, "prefixItems", "items")
_OF_ONE = (
    *("items", "additionalItems", "additionalProperties", "unevaluatedItems", "contains"),
    *("unevaluatedProperties", "propertyNames", "not", "if", "then", "else"),
)
_DEEPEST = 200  # levels; llguidance takes no more either


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema whose objects are closed where it lists their properties and says no more.

    Schemas that may describe one object together, as in `allOf`, stay as they are.
    """
    apart = {ref for part, _, shared in _walk(schema, "#") if shared for ref in _refs(part)}
    while (
        more := {
            ref
            for part, path, _ in _walk(schema, "#")
            if path.startswith(tuple(apart))
            for ref in _refs(part)
        }
        - apart
    ):
        apart |= more
    open_ = {
        path
        for part, path, shared in _walk(schema, "#")
        if shared or path.startswith(tuple(apart)) or _OPEN & part.keys()
    }
    copy: dict[str, Any] = _copied(schema, "#", open_)
    return copy


def _copied(schema: Any, path: str, open_: set[str]) -> Any:
    """A copy in which objects with properties are closed, except those at the paths `open_`."""
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key, name, part in inner_schemas(schema):
        copy = _copied(part, _at(path, key, name), open_)
        if name is None:
            found[key] = copy
        else:
            if found[key] is schema[key]:
                found[key] = schema[key].copy()
            found[key][name] = copy
    if isinstance(schema.get("properties"), Mapping) and path not in open_:
        found["additionalProperties"] = False
    return found


def schemas_in(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A schema and all schemas within it."""
    for part, _, _ in _walk(schema, "#"):
        yield part


def _walk(
    schema: Any, path: str, *, shared: bool = False, depth: int = 0
) -> Iterator[tuple[Mapping[str, Any], str, bool]]:
    """Each schema within one, its path, and whether others may describe the same value."""
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return
    shared = shared or ("$ref" in schema and "properties" in schema)
    yield schema, path, shared
    together = "allOf" in schema or bool({"properties", "$ref"} & schema.keys())
    for key, name, part in inner_schemas(schema):
        inner = shared or (key in _COMPOSED and together)
        yield from _walk(part, _at(path, key, name), shared=inner, depth=depth + 1)


def inner_schemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The schemas directly within one: key, name or index (None if it has none), and schema."""
    for key, value in schema.items():
        if key in _OF_NAMES and isinstance(value, Mapping):
            yield from ((key, name, part) for name, part in value.items())
        elif key in _OF_LISTS and isinstance(value, list):
            yield from ((key, i, part) for i, part in enumerate(value))
        elif key in _OF_ONE:
            yield key, None, value


def _at(path: str, key: str, name: Any) -> str:
    """A JSON pointer to an inner schema."""
    return f"{path}/{key}" if name is None else f"{path}/{key}/{name}"


def _refs(schema: Mapping[str, Any]) -> Iterator[str]:
    ref = schema.get("$ref")
    if isinstance(ref, str):
        yield ref
