"""What is generated under a schema fits it; what can't be kept is refused by name."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from batchrun.grammars.constraint import constraint_of, problem
from tests.grammars.walks import errors, matchers, schemas, walk


def made(schema: Any) -> str:
    return constraint_of("json_schema", json.dumps(schema))


def refusal(schema: Any) -> str | None:
    try:
        return problem(made(schema)) or matchers().problem(made(schema))
    except ValueError as error:
        return str(error)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(schemas(), st.integers(0, 2**32))
def test_a_random_answer_fits_its_schema(schema: dict[str, Any], seed: int) -> None:
    found = refusal(schema)
    event("refused" if found else "kept")
    assume(found is None)
    rng = random.Random(seed)
    for _ in range(4):
        text = walk(made(schema), rng)
        if text is not None:
            assert errors(schema, text) == [], text


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "string", "format": "foo"}, "Unknown format: foo"),
        ({"type": "string", "format": "unknown"}, "Unknown format: unknown"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "maxLenght": 3}, "keyword 'maxLenght'; did you mean maxLength?"),
        ({"type": "object", "properties": {"a": {"type": "string", "nullable": True}}}, "null"),
        ({"type": "integer", "minimum": 2**63}, "minimum 9223372036854775808 is beyond 2^53"),
        ({"const": 2**60}, "const has 1152921504606846976"),
        ({"type": "integer", "exclusiveMinimum": True}, "exclusiveMinimum is true or false"),
        ({"type": "string", "pattern": "a(?=b)"}, "look-around"),
        ({"$ref": "https://example.org/schema.json"}, "does not fetch"),
        ({"$ref": "#/$defs/missing"}, "does not exist"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum (2) is greater than maximum"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"$ref": "#"}, "no answer"),
    ],
)
def test_what_can_not_be_kept_is_refused_by_name(schema: Any, says: str) -> None:
    found = refusal(schema)
    assert found is not None
    assert says in found


def test_schemas_that_would_crash_or_hang_are_refused() -> None:
    chain = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5000)}
    deep = {"$ref": "#/$defs/a0", "$defs": {**chain, "a5000": {"type": "string"}}}
    assert refusal(deep) == "it is nested too deeply"
    twice = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}
    large = {"$ref": "#/$defs/a0", "$defs": {**twice, "a30": {"type": "object"}}}
    assert "more than 100,000 subschemas" in str(refusal(large))


@pytest.mark.parametrize(
    ("schema", "answer", "fits"),
    [
        ({"type": "string", "format": "date"}, "2024-02-29", True),
        ({"type": "string", "format": "date"}, "2023-02-29", False),
        ({"type": "string", "format": "date"}, "1900-02-29", False),
        ({"type": "string", "format": "date"}, "2000-02-29", True),
        ({"type": "string", "format": "date"}, "0000-01-01", False),
        ({"type": "string", "format": "date"}, "2023-04-30", True),
        ({"type": "string", "format": "time"}, "10:00:59Z", True),
        ({"type": "string", "format": "time"}, "10:00:60Z", False),
        ({"type": "string", "format": "date-time"}, "2024-02-29T10:00:00Z", True),
        ({"type": "string", "format": "date-time"}, "2023-02-29T10:00:00Z", False),
        ({"type": "string", "pattern": '^[^"]*$'}, 'a"', False),
        ({"type": "string", "pattern": '^[^"]*$'}, "ab", True),
        ({"type": "string", "pattern": r"^[^\\]*$"}, "\\", False),
        ({"type": "string"}, 'a"\\', True),
        ({"type": "integer", "maximum": 2**63}, 2**53 - 1, True),
        ({"type": "integer", "maximum": 2**63}, 2**53, False),
        ({"properties": {"a": {}}, "type": "object"}, {"a": 1}, True),
        ({"properties": {"a": {}}, "type": "object"}, {"a": 1, "b": 2}, False),
        ({"properties": {"a": {}}, "additionalProperties": True}, {"a": 1, "b": 2}, True),
        (
            {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}], "type": "object"},
            {"a": 1, "b": 2},
            True,
        ),
        (
            {
                "type": "object",
                "allOf": [{"$ref": "#/$defs/A"}, {"properties": {"b": {}}}],
                "$defs": {"A": {"properties": {"a": {"properties": {"c": {}}}}}},
            },
            {"a": {"c": 1, "d": 1}, "b": 2},
            True,
        ),
        ({"anyOf": [{"type": "object", "properties": {"a": {}}}, {"const": 1}]}, {"b": 1}, False),
    ],
)
def test_answers_that_a_schema_allows(schema: Any, answer: Any, fits: bool) -> None:
    matcher = matchers().start(made(schema))
    text = json.dumps(answer)
    ids = [matchers()._given.convert_tokens_to_ids(char) for char in _bytes(text)]
    taken = matcher.try_consume_tokens(ids)
    assert (taken == len(ids) and matcher.is_accepting()) is fits


def _bytes(text: str) -> list[str]:
    return ["Ġ" if char == " " else char for char in text]


def test_a_key_never_stands_twice_or_in_disguise() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    schema["additionalProperties"] = {"type": "string"}
    matcher = matchers().start(made(schema))
    for text in ('{"a": 1, "\\u0061": "x"}', '{"\\u0061": "x"}'):
        ids = [matchers()._given.convert_tokens_to_ids(char) for char in _bytes(text)]
        assert matcher.deep_copy().try_consume_tokens(ids) < len(ids)


@pytest.mark.parametrize("grammar", ["[", '["a"]', "start: foo", "{", '{"a": 1}', "\0", "x"])
def test_a_grammar_that_is_none_is_refused_with_the_reason(grammar: str) -> None:
    found = problem(constraint_of("grammar", grammar))
    assert found
    assert "\n" not in found


def test_annotations_and_what_says_nothing_are_fine() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "T",
        "x-guidance": {"lenient": True},
        "type": "object",
        "properties": {"a": {"type": "array", "uniqueItems": False, "examples": [{"not": 1}]}},
        "discriminator": {"propertyName": "a"},
    }
    assert refusal(schema) is None
    assert refusal({**schema, "not": {}}) is not None
