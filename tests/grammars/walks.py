"""Random answers under a constraint, and random schemas."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from datetime import datetime
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from batchrun.grammars.matchers import Matchers
from tests.tiny import byte_vocabulary, write_tokenizer

EOS = 2
_CLOSING = set('"]}')
CHECKER = deepcopy(Draft202012Validator.FORMAT_CHECKER)


@CHECKER.checks("date-time", ValueError)
def _is_date_time(text: object) -> bool:
    return not isinstance(text, str) or bool(datetime.fromisoformat(text.upper()))


@CHECKER.checks("time", ValueError)
def _is_time(text: object) -> bool:
    return not isinstance(text, str) or _is_date_time(f"2024-01-01T{text}")


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415

    folder = Path(mkdtemp())
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@cache
def matchers() -> Matchers:
    return Matchers(tokenizer(), [EOS], len(byte_vocabulary()))


def allowed(matcher: Any) -> list[int]:
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return [int(i) for i in np.flatnonzero(np.unpackbits(bits, bitorder="little"))]


def walk(constraint: str, rng: random.Random, most: int = 400) -> str | None:
    """A random answer that a constraint allows; None if it has no end after `most` tokens."""
    matcher = matchers().start(constraint)
    ids: list[int] = []
    ends = {tokenizer().convert_tokens_to_ids(char) for char in _CLOSING} | {EOS}
    for _ in range(most):
        assert not matcher.is_error(), matcher.get_error()
        if matcher.is_stopped():
            break
        choices = allowed(matcher)
        closing = [i for i in choices if i in ends]
        token = rng.choice(closing if closing and rng.random() < 0.5 else choices)
        if token == EOS:
            break
        assert matcher.consume_token(token)
        ids.append(token)
    else:
        return None
    return str(tokenizer().decode(ids, clean_up_tokenization_spaces=False))


def errors(schema: dict[str, Any], text: str) -> list[str]:
    """What is wrong with an answer, by the schema as it was written."""
    validator = Draft202012Validator(schema, format_checker=CHECKER)
    return [error.message for error in validator.iter_errors(json.loads(text))]


_NUMBERS = st.integers(-50, 50) | st.sampled_from([0.5, -1.25, 0.1, 1e3])
_PATTERNS = st.sampled_from(
    ["^[a-z]+$", '^[^"]*$', r"^[^\\]*$", r"\d{2}", "^a|b$", r"^[^\"\n]{1,3}$", "[A-Z]", r"^\w+$"]
)
_FORMATS = st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email"])
_NAMES = st.sampled_from(["a", "b", "name", "ü", 'q"', "x y", "a/b", "~", ""])


@st.composite
def _strings(draw: st.DrawFn) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    kind = draw(st.integers(0, 3))
    if kind == 0:
        found["pattern"] = draw(_PATTERNS)
    elif kind == 1:
        found["format"] = draw(_FORMATS)
    elif kind == 2:
        low = draw(st.integers(0, 3))
        found |= {"minLength": low, "maxLength": low + draw(st.integers(0, 4))}
    return found


@st.composite
def _numbers(draw: st.DrawFn) -> dict[str, Any]:
    found: dict[str, Any] = {"type": draw(st.sampled_from(["integer", "number"]))}
    if draw(st.booleans()):
        found["minimum"] = low = draw(_NUMBERS)
        if draw(st.booleans()):
            found["maximum"] = low + draw(st.integers(1, 40))
    elif draw(st.booleans()):
        found["exclusiveMaximum"] = draw(_NUMBERS)
    if draw(st.integers(0, 3)) == 0:
        found["multipleOf"] = draw(st.sampled_from([2, 5, 7]))
    return found


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    @st.composite
    def made(draw: st.DrawFn) -> dict[str, Any]:
        properties = draw(st.dictionaries(_NAMES, inner, min_size=1, max_size=4))
        names = st.lists(st.sampled_from(sorted(properties)), unique=True)
        found: dict[str, Any] = {"type": "object", "properties": properties}
        found["required"] = draw(names)
        extra = draw(st.sampled_from([None, None, False, True, {"type": "integer"}]))
        if extra is not None:
            found["additionalProperties"] = extra
        return found

    return made()


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    low = st.integers(0, 2)
    several = st.tuples(inner, low, low).map(
        lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
    )
    pair = st.lists(inner, min_size=1, max_size=3).map(
        lambda items: {
            "type": "array",
            "prefixItems": items,
            "items": False,
            "minItems": len(items),
        }
    )
    return several | pair


_VALUES = st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["x", 'a"b', "é", ""])
_LEAVES = st.one_of(
    _strings(),
    _numbers(),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}]),
    st.lists(_VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    _VALUES.map(lambda value: {"const": value}),
)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of what people ask for: records, lists, choices, nested, with bounds and formats."""
    nested = st.recursive(
        _LEAVES,
        lambda inner: st.one_of(
            _objects(inner),
            _objects(inner),
            _arrays(inner),
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        ),
        max_leaves=6,
    )
    refs = st.tuples(nested, _objects(st.just({"$ref": "#/$defs/part"}))).map(
        lambda t: {**t[1], "$defs": {"part": t[0]}}
    )
    whole = st.tuples(_objects(nested), _objects(nested)).map(lambda t: {"allOf": list(t)})
    return st.one_of(_objects(nested), _objects(nested), nested, refs, whole)
