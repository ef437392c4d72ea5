"""Answers of a shape: from the command line to typed columns, with the rows' own shapes."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun import LLM
from tests.cli.conftest import CommandLine

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["x", "y"]}, "count": {"type": "integer", "maximum": 99}},
    "required": ["kind", "count"],
}


def test_a_schema_from_a_file_gives_typed_columns(batchrun: CommandLine) -> None:
    (batchrun.folder / "schema.json").write_text(json.dumps(SCHEMA))
    source = batchrun.write("in.parquet", ["a", "b", "c"])
    shown = batchrun.submit(
        *(source, "--json-schema", "schema.json", "--max-tokens", 120, "-o", "out.parquet"),
        *("--temperature", 1, "--n", 2),
    )
    assert shown.code == 0, shown.err
    table = pq.read_table(batchrun.folder / "out.parquet")
    fields = [("kind", pa.string()), ("count", pa.int64())]
    assert table.schema.field("parsed").type == pa.struct(fields)
    for row in table.to_pylist():
        if row["finish_reason"] == "stop":
            assert json.loads(row["completion"]) == row["parsed"]
            assert (row["parsed"]["kind"] in "xy", row["parse_error"]) == (True, None)
        else:
            assert (row["parsed"], row["parse_error"][:22]) == (None, "the answer was cut off")
    assert {row["finish_reason"] for row in table.to_pylist()} >= {"stop"}
    assert "tokens that the output's structure determined" in batchrun("stats").out
    assert batchrun("verify", "--recompute", 3).code == 0


def test_choices_are_categories_with_their_probabilities(batchrun: CommandLine) -> None:
    source = batchrun.write("in.parquet", ["a", "b", "c"])
    given = ("--choices", "yes, no,maybe not", "--choice-logprob", "-o", "out.parquet")
    shown = batchrun.submit(source, *given)
    assert shown.code == 0, shown.err
    table = pd.read_parquet(batchrun.folder / "out.parquet")
    assert list(table["parsed"].cat.categories) == ["yes", "no", "maybe not"]
    assert list(table["parsed"]) == list(table["completion"])
    assert (table["choice_logprob"] < 0).all()


def test_rows_have_shapes_of_their_own(batchrun: CommandLine) -> None:
    shapes: list[dict[str, Any]] = [
        {"choices": ["yes", "no"]},
        {"choices": "yes, no"},
        {"regex": "[ab]{3}"},
        {"json_schema": {**SCHEMA, "properties": {**SCHEMA["properties"], "count": {"const": 1}}}},
        {"json_schema": json.dumps({"enum": ["one"]})},
        {"json_schema": {"type": "array", "uniqueItems": True}},
        {"regex": "(("},
        {"regex": "a", "choices": ["b"]},
        {"choices": ["a", "a"]},
        {},
        {"regex": None, "choices": []},
        *[{"choices": ["w"]}, {"regex": "w"}] * 4,
    ]
    path = batchrun.folder / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", **row}) + "\n" for row in shapes))
    shown = batchrun.submit(path, "--regex", "z", "-o", "out.jsonl", "--max-tokens", 90)
    assert shown.code == 3
    rows = batchrun.read("out.jsonl")
    found = [row["completion"] for row in rows]
    assert found[0] in {"yes", "no"}
    assert found[1] in {"yes", "no"}
    assert len(found[2]) == 3
    assert set(found[2]) <= set("ab")
    assert json.loads(found[3])["count"] == 1
    assert found[4] == '"one"'
    says = [
        'answers can\'t have that shape: unsupported keywords: ["uniqueItems"]',
        'answers can\'t have that shape: invalid regex "((": regex parse error: unclosed group',
        "choices can't be combined with regex: an answer has one shape",
        "the column choices holds ['a', 'a'], and choices must be a list of texts; "
        "--ignore-param-columns treats such columns as data",
    ]
    assert [row["error"] for row in rows[5:9]] == says
    assert found[9:] == ["z", "z", *"w" * 8]


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (("--json-schema", "gone.json"), 2, "'gone.json' can't be read as a JSON schema: No such"),
        (("--json-schema", "{"), 2, "this is not a JSON schema"),
        (("--json-schema", '{"type": "string", "format": "x"}'), 2, "Unknown format: x"),
        (("--json-schema", '{"type": "string", "maxLen": 3}'), 2, "unknown keyword 'maxLen'"),
        (("--regex", "(("), 2, "--regex can't be enforced: invalid regex"),
        (("--grammar", "gone.lark"), 2, "'gone.lark' can't be read as a Lark grammar"),
        (("--grammar", "/dev/null"), 2, "the grammar is empty"),
        (("--regex", ""), 2, "the expression is empty"),
        (("--choices", "a,,b"), 2, "a choice must not be empty"),
        (("--choices", "a,b,a"), 2, "the choice 'a' appears twice"),
        (("--choices", "a", "--regex", "b"), 2, "--regex and --choices can't be combined"),
        (("--choices", "a", "--num-beams", 2), 2, "--num-beams with --choices"),
        (("--choice-logprob",), 2, "--choice-logprob needs --choices"),
        (("--json-schema", '{"$ref": "#"}'), 1, "it allows no answer"),
    ],
)
def test_what_can_not_be_is_said_before_the_first_row(
    batchrun: CommandLine, given: tuple[Any, ...], code: int, says: str
) -> None:
    source = batchrun.write("in.parquet", ["a"])
    shown = batchrun.submit(source, *given)
    assert (shown.code, says in shown.error) == (code, True), shown.err


def test_a_grammar_in_larks_notation(batchrun: CommandLine) -> None:
    (batchrun.folder / "sum.lark").write_text('start: N " + " N\nN: /[1-9]/\n')
    source = batchrun.write("in.jsonl", ["a", "b"])
    assert batchrun.submit(source, "--grammar", "sum.lark", "-o", "out.jsonl").code == 0
    for row in batchrun.read("out.jsonl"):
        left, plus, right = row["completion"].split(" ")
        assert (plus, left.isdigit(), right.isdigit(), row["finish_reason"]) == (
            *("+", True, True, "stop"),
        )
    assert "parsed" not in row


def test_a_shape_that_takes_too_long_is_an_error_in_its_row(
    batchrun: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [{"pattern": f"[a-z]{{{i},}}x{i}"} for i in range(40)]
    slow = {"type": "string", "allOf": parts}
    rows = [{"prompt": "a"}, {"prompt": "b", "json_schema": slow}, {"prompt": "c"}]
    path = batchrun.folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("BATCHRUN_PROMPT_SECONDS", "1")
    shown = batchrun.submit(path, "-o", "out.jsonl", "--max-tokens", 3, "--ignore-eos")
    assert shown.code == 3, shown.err
    errors = [row["error"] for row in batchrun.read("out.jsonl")]
    assert (errors[0], errors[2]) == (None, None)
    assert "more than 1 s of processor time" in errors[1]


class Record:
    """As pydantic's models have it."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return SCHEMA


def test_in_python_a_schema_is_a_dict_or_a_class(
    batchrun: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHRUN_HOME", str(batchrun.home))
    with LLM(str(batchrun.model), max_tokens=120, temperature=1.0) as llm:
        one, other = (llm.generate(["a"], json_schema=s) for s in (SCHEMA, Record))
        assert one[0].text == other[0].text
        (choice,) = llm.generate(["a"], choices=["yes", "no"], choice_logprob=True)
        assert choice.text in {"yes", "no"}
        assert choice.logprob is not None
        assert choice.logprob < 0
        (free,) = llm.generate(["a"], max_tokens=3)
        assert free.error is None


def test_the_column_of_errors_is_named_as_it_is(batchrun: CommandLine) -> None:
    """Beside that of an earlier job, whose output this one reads."""
    source = batchrun.write("in.jsonl", ["a", None], error=[None, None])
    shown = batchrun.submit(source, "--output-prefix", "j_", "-o", "out.jsonl", "--max-tokens", 2)
    assert "1 failed (the column `j_error` says why)" in shown.out
