"""Schemas as llguidance can keep them: whatever is generated fits the schema as it was written.

It compiles most of JSON Schema and refuses most of what it can't, but some things it ignores, keeps
only nearly, or would crash on. These are refused here by name, or made narrower so that it keeps
them. Found by generating from thousands of schemas and validating with `jsonschema`
(tests/grammars/test_schemas.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from batchrun.grammars.closed import closed, inner_schemas, schemas_in

_KEPT = """
    type properties required additionalProperties patternProperties minProperties maxProperties
    items prefixItems additionalItems minItems maxItems minLength maxLength pattern format
    minimum maximum exclusiveMinimum exclusiveMaximum multipleOf enum const anyOf allOf oneOf
    $ref $defs definitions $id $anchor $schema
"""
_REFUSED = """
    uniqueItems contains minContains maxContains unevaluatedItems unevaluatedProperties not if
    then else propertyNames dependentRequired dependentSchemas dependencies $dynamicRef
    $dynamicAnchor $recursiveRef $recursiveAnchor
"""  # by llguidance
_KEYWORDS = frozenset(f"{_KEPT} {_REFUSED}".split())
_SAY_NOTHING = """
    title description default example examples deprecated readOnly writeOnly id $comment
    $vocabulary contentEncoding contentMediaType contentSchema discriminator externalDocs xml
"""
_ANNOTATIONS = frozenset(_SAY_NOTHING.split())
# Keywords that say nothing with these values, but that llguidance refuses with any.
_IDLE = {"uniqueItems": False, "unevaluatedItems": True, "unevaluatedProperties": True}
_EXACT = 2**53 - 1  # llguidance reads numbers as float64
_LARGEST = 100_000  # schemas, once references are resolved
_ESCAPES = 'nrbtf"\\'  # not \uXXXX: a key so written passes for another key

_YEAR = r"(000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d\d\d)"
_LEAP = r"(\d\d(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE = rf"({_YEAR}-(0[13-9]|1[0-2])-\d\d|{_YEAR}-02-([01]\d|2[0-8])|{_LEAP}-02-29)"
_TIME = r"\d\d:\d\d:[0-5]"
# What llguidance's own expressions for these formats let through, such as February 29 in any year.
_NARROWER = {"date": f"^{_DATE}$", "time": f"^{_TIME}", "date-time": f"^{_DATE}[Tt]{_TIME}"}


def kept(schema: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A schema that llguidance keeps, all of whose values fit the given one.

    Returns:
        The schema, and the letters that may follow a backslash in its strings.

    Raises:
        ValueError: It can't be kept; the message names the keyword.
    """
    try:
        if _size(schema, schema, {}) > _LARGEST:
            raise ValueError(
                f"it has more than {_LARGEST:,} subschemas once its $refs are resolved"
            )
        for part in schemas_in(schema):
            _check(part)
        return closed(_narrowed(schema)), _escapes(schema)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _check(schema: Mapping[str, Any]) -> None:
    """Refuse what llguidance would silently ignore."""
    for key in schema:
        if key not in _KEYWORDS and key not in _ANNOTATIONS and not key.startswith("x-"):
            if key == "nullable" and not schema[key]:
                continue
            near = get_close_matches(key, _KEYWORDS, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            meant = '; write "type": [..., "null"]' if key == "nullable" else meant
            raise ValueError(f"unknown keyword {key!r}{meant}")
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(key), bool):
            raise ValueError(f"{key} is true or false, as in draft 4, but must be a number")
    if schema.get("format") == "unknown":
        raise ValueError("Unknown format: unknown")
    for key in ("enum", "const", "multipleOf"):
        for number in _numbers(schema.get(key)):
            if abs(number) > _EXACT:
                raise ValueError(f"{key} has {number}: beyond 2^53, it can't be enforced exactly")


def _escapes(schema: Mapping[str, Any]) -> str:
    """The letters that may follow a backslash in strings.

    Where a pattern excludes quotes or backslashes there are none of them in any string, or else
    llguidance would take both characters of an escape for two others, which the pattern allows.
    """
    escapes, parts = _ESCAPES, list(schemas_in(schema))
    odd = next((p for part in parts for p in _patterns(part) if _excludes_escaped(p)), None)
    if odd is not None:
        escapes = "nrbtf"
    for text in (text for part in parts for text in _texts(part)):
        if odd is not None and ('"' in text or "\\" in text):
            raise ValueError(
                f"the pattern {odd!r} can't be enforced together with {text!r}: write "
                "which characters it allows, not which it excludes"
            )
        if any(char < " " and char not in "\n\r\b\t\f" for char in text):
            raise ValueError(f"{text!r} has a control character")
    return escapes


def _narrowed(schema: Any) -> Any:
    """A copy without idle keywords, with the narrower formats and bounds that are exact."""
    if not isinstance(schema, Mapping):
        return schema
    found = {
        key: value
        for key, value in schema.items()
        if not (key in _IDLE and value is _IDLE[key]) and not key.startswith("x-")
    }
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        bound = found.get(key)
        if isinstance(bound, int | float) and abs(bound) > _EXACT:
            if (bound < 0) != key.endswith("inimum"):
                raise ValueError(f"{key} {bound} is beyond 2^53 and can't be enforced exactly")
            found[key] = _EXACT if bound > 0 else -_EXACT
    narrower = _NARROWER.get(str(found.get("format")))
    if narrower is not None and "pattern" in found:
        found["allOf"] = [*found.get("allOf", ()), {"pattern": narrower}]
    elif narrower is not None:
        found["pattern"] = narrower
    for key, name, part in inner_schemas(schema):
        if key in found and name is None:
            found[key] = _narrowed(part)
        elif key in found:
            if found[key] is schema[key]:
                found[key] = schema[key].copy()
            found[key][name] = _narrowed(part)
    return found


def _size(schema: Any, root: Mapping[str, Any], known: dict[str, int]) -> int:
    """How many schemas there are in one, those behind references included."""
    if not isinstance(schema, Mapping):
        return 0
    size, ref = 1, schema.get("$ref")
    if isinstance(ref, str) and ref.startswith("#"):
        if ref not in known:
            known[ref] = 0  # within itself: a reference back adds nothing
            known[ref] = _size(_at(root, ref), root, known)
        size += known[ref]
    return size + sum(_size(part, root, known) for _, _, part in inner_schemas(schema))


def _at(root: Any, ref: str) -> Any:
    """What a JSON pointer points to (RFC 6901); None if nothing."""
    found = root
    for escaped in ref.removeprefix("#").removeprefix("/").split("/") if ref != "#" else ():
        name = escaped.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        else:
            found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _patterns(schema: Mapping[str, Any]) -> Iterator[str]:
    named = schema.get("patternProperties")
    for pattern in (schema.get("pattern"), *(named if isinstance(named, Mapping) else ())):
        if isinstance(pattern, str):
            yield pattern


def _excludes_escaped(pattern: str) -> bool:
    """Whether a class such as `[^"]` excludes a character that JSON strings escape."""
    for at in (found.start() for found in re.finditer(r"\[\^", pattern)):
        end = at + 3
        while end < len(pattern) and pattern[end] != "]":
            end += 2 if pattern[end] == "\\" else 1
        try:
            excluded = [re.match(pattern[at : end + 1], char) is None for char in '"\\']
        except re.error:
            return True
        if any(excluded):
            return True
    return False


def _texts(schema: Mapping[str, Any]) -> Iterator[str]:
    """The texts that answers must have as they are: names, and values of enum and const."""
    names = schema.get("properties")
    yield from names if isinstance(names, Mapping) else ()
    required = schema.get("required")
    yield from filter(_is_text, required if isinstance(required, list) else ())
    for key in ("enum", "const"):
        yield from _strings(schema.get(key))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        yield from value if isinstance(value, Mapping) else ()
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(part)


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(part)
