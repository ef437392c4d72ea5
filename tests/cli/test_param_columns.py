"""Columns that are taken as sampling parameters, and those that only look like it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.conftest import CommandLine

FLAG = "--ignore-param-columns"
WEATHER = {"temperature": [25.0, -3.5, 17.25], "city": ["Rome", "Oslo", "Kyiv"]}


def job(batchrun: CommandLine) -> dict[str, Any]:
    shown: dict[str, Any] = batchrun("show", "--json").json
    return shown


def rows_of_json(batchrun: CommandLine, rows: list[dict[str, Any]], name: str = "in.jsonl") -> Any:
    path = batchrun.folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["in.parquet", "in.jsonl"])
@pytest.mark.parametrize("command", ["submit", "plan"])
def test_the_weathers_temperature_is_no_samplings(
    batchrun: CommandLine, name: str, command: str
) -> None:
    source = batchrun.write(name, ["a", "b", "c"], **WEATHER)
    shown = batchrun(command, source, "--model", batchrun.model)
    assert shown.code == 1
    assert "the column 'temperature' can't set temperature for its rows: row 0 has 25" in (
        shown.error
    )
    assert "between 0 and 5" in shown.error
    assert FLAG in shown.hint
    assert batchrun("list", "--json").json == []


def test_columns_are_data_where_that_is_asked_for(batchrun: CommandLine) -> None:
    columns = {**WEATHER, "max_tokens": [1, 1, 1], "seed": ["tomato", "oak", "rose"]}
    source = batchrun.write("in.parquet", ["a", "b", "c"], **columns)
    options = ("--max-tokens", 3, "--ignore-eos", "--n", 2, "-o", "out.parquet")
    shown = batchrun.submit(source, FLAG, *options)
    assert shown.code == 0
    assert "taken from columns" not in shown.err
    assert "all samples of a row will be the same" in shown.err  # whatever the column says
    rows = batchrun.read("out.parquet")
    assert [row["completion_tokens"] for row in rows] == [3] * 6
    assert [row["temperature"] for row in rows[::2]] == WEATHER["temperature"]
    assert "from_columns" not in job(batchrun)["sampling"]
    assert job(batchrun)["prompt"]["ignore_param_columns"] is True


def test_it_is_told_at_once_which_columns_act_as_parameters(batchrun: CommandLine) -> None:
    """At once and once: the run does not repeat it. Numbers may be text."""
    source = batchrun.write(
        "in.parquet", ["a", "b", "c"], max_tokens=["2", "3.0", ""], top_p=[1.0] * 3
    )
    options = ("--max-tokens", 4, "--ignore-eos", "-o", "out.parquet")
    told = (
        f"sampling parameters taken from columns: max_tokens, top_p; to treat them as data: {FLAG}"
    )
    dry = batchrun.submit(source, *options, "--dry-run", "--json")
    assert dry.err.splitlines() == [told]
    assert dry.json["sampling"]["from_columns"] == ["max_tokens", "top_p"]
    assert "param_columns" not in dry.json["runtime"]
    shown = batchrun.submit(source, *options)
    assert (shown.code, shown.err.count("taken from columns")) == (0, 1)
    assert shown.err.splitlines()[0] == told
    assert [row["completion_tokens"] for row in batchrun.read("out.parquet")] == [2, 3, 4]
    assert job(batchrun)["sampling"]["from_columns"] == ["max_tokens", "top_p"]
    planned = batchrun("plan", source, *options[:-2], "--model", batchrun.model)
    assert planned.err.splitlines() == [told]


def test_the_flag_makes_another_job_and_its_absence_none(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", ["a"], seed=[3])
    assert batchrun.submit(source, "-o", "one.jsonl", "--max-tokens", 1).code == 0
    without = job(batchrun)
    assert "ignore_param_columns" not in without["prompt"]
    assert batchrun.submit(source, "-o", "two.jsonl", "--max-tokens", 1).code == 0
    assert job(batchrun)["fingerprint"] == without["fingerprint"]
    assert batchrun.submit(source, "-o", "three.jsonl", "--max-tokens", 1, FLAG).code == 0
    assert job(batchrun)["fingerprint"] != without["fingerprint"]


def test_a_bad_value_further_down_is_that_rows_error(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", ["a", "b", "c"], temperature=[0.0, 30, float("nan")])
    shown = batchrun.submit(source, "--max-tokens", 2, "-o", "out.jsonl")
    assert shown.code == 3
    errors = [row["error"] for row in batchrun.read("out.jsonl")]
    assert [error is None for error in errors] == [True, False, True]
    assert "the column temperature holds 30, and temperature must be between 0 and 5" in errors[1]
    assert FLAG in errors[1]
    assert batchrun("stats", "--json").json["rows"]["failed_by_reason"] == {"bad_parameter": 1}


def test_a_seed_beyond_64_bits_is_that_rows_error_and_ends_no_run(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", ["a", "b", "c"], seed=[1, 2**63, 2**64])
    shown = batchrun.submit(
        source, "--max-tokens", 2, "--temperature", 1, "--limit", 3, "-o", "out.jsonl"
    )
    assert (shown.code, "row 1 has 9223372036854775808" in shown.error) == (1, True)
    source = batchrun.write("in.jsonl", ["a", "b", "c"], seed=[1, 2**63, 3])
    shown = batchrun.submit(source, "--max-tokens", 2, "--temperature", 1, "-o", "out.jsonl")
    assert shown.code == 3
    assert [row["error"] is None for row in batchrun.read("out.jsonl")] == [True, False, True]


def test_a_stop_token_that_no_vocabulary_has_ends_no_run(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", ["a", "b"], stop_token_ids=[[10**9], [5]])
    options = ("--max-tokens", 3, "--min-tokens", 2, "-o", "out.jsonl")
    assert batchrun.submit(source, *options).code == 0


def test_a_parameter_that_only_a_late_row_has_counts_there(batchrun: CommandLine) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"row {i}"} for i in range(103)]
    rows[100]["max_tokens"] = 2
    rows[102] |= {"max_tokens": 3, "temperature": 1.0}
    source = rows_of_json(batchrun, rows)
    options = ("--max-tokens", 5, "--ignore-eos", "--n", 2, "-o", "out.jsonl")
    shown = batchrun.submit(source, *options)
    assert shown.code == 0
    counts = [row["completion_tokens"] for row in batchrun.read("out.jsonl")]
    assert counts == [5] * 200 + [2, 2, 5, 5, 3, 3]
    assert shown.err.count("sampling parameters taken from columns: max_tokens;") == 1
    assert shown.err.count("sampling parameters taken from columns: temperature;") == 1
    assert "of a row without a temperature of its own will be the same" in shown.err
    shown = batchrun.submit(source, *options, FLAG, "--overwrite")
    assert {row["completion_tokens"] for row in batchrun.read("out.jsonl")} == {5}


@pytest.mark.parametrize(
    ("column", "options"),
    [
        ("prompt", ()),
        pytest.param("messages", (), marks=pytest.mark.long),
        pytest.param("question", ("--prompt-column", "question"), marks=pytest.mark.long),
        ("question", ("--template", "{question}?")),
    ],
)
def test_a_column_that_makes_the_prompt_may_come_late(
    batchrun: CommandLine, column: str, options: tuple[str, ...]
) -> None:
    rows: list[dict[str, Any]] = [{"id": i} for i in range(102)]
    rows[101][column] = [{"role": "user", "content": "x"}] if column == "messages" else "x"
    source = rows_of_json(batchrun, rows)
    shown = batchrun.submit(source, *options, "--skip-empty", "--max-tokens", 2, "-o", "out.jsonl")
    assert shown.code == 0
    assert "reading all rows to find it" in shown.err
    assert [i for i, row in enumerate(batchrun.read("out.jsonl")) if row["finish_reason"]] == [101]


def test_a_column_that_no_row_has_is_missing(batchrun: CommandLine) -> None:
    source = rows_of_json(batchrun, [{"id": 1}] * 100 + [{"txet": "x"}])
    shown = batchrun.submit(source, "--prompt-column", "text")
    assert shown.code == 1
    assert "no column 'text'; its columns: id, txet" in shown.error
    assert "'txet'" in shown.hint
