"""`batchrun plan` says ahead what the job then does."""

from __future__ import annotations

import pytest

from batchrun.estimate.savings import BatchModel
from tests.cli.conftest import CommandLine

DOCUMENT = "This is a document that several questions are asked about. " * 2
PROMPTS = [
    *(f"{DOCUMENT}Question {i}?" for i in range(10)),
    *(f"row {i}" for i in range(10)),
    *["again and again"] * 7,
    None,
    "",
    "x" * 400,  # the context is 256 tokens
]


def test_the_plan_of_a_job_is_what_it_does(batchrun: CommandLine) -> None:
    source = batchrun.write("in.parquet", PROMPTS)
    options = ("--max-tokens=6", "--ignore-eos", "--max-num-seqs=8", "--n=2", "--dtype=float32")
    model = ("--model", batchrun.model)
    ahead = batchrun("plan", source, *options, *model, "--json").json
    assert ahead["seconds"] is None
    assert (
        "unknown until a job with this model has run"
        in batchrun("plan", source, *options, *model).out
    )
    done = batchrun.submit(source, *options, "--output", "out.parquet")
    assert done.code == 3
    found = batchrun("stats", "--json").json
    assert ahead["rows"] == found["rows"]["total"] == len(PROMPTS)
    assert ahead["duplicates"] == found["duplicates"] == {"rows": 20 + 6 + 7, "tokens": 33 * 6}
    assert ahead["completion_tokens"] == found["tokens"]["completion"] == 27 * 2 * 6
    assert ahead["expected_tokens"] == 21 * 6
    computed = found["throughput"]["completion_tokens_per_s"] * found["time"]["engine_s"]
    assert computed == pytest.approx(21 * 6)
    assert ahead["prompt_tokens"] == found["tokens"]["prompt"]
    assert ahead["errors"] == {"null_prompt": 2, "empty_prompt": 2, "prompt_too_long": 2}
    assert ahead["shared_tokens"] == pytest.approx(found["tokens"]["shared"], rel=0.1)
    assert ahead["steps"] == pytest.approx(found["batch"]["steps"], rel=0.35)
    assert ahead["kv"]["token_bytes"] == 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, dim, float32
    assert ahead["saved"]["steps"] > 0
    assert found["saved"]["steps"] > 0
    again = batchrun("plan", source, *options, *model, "--json").json
    assert again["measured_runs"] == 1
    assert again["seconds"]["engine"] > 0
    assert "(estimated from 1 run)" in batchrun("plan", source, *options, *model).out


def test_a_plan_without_planning(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", PROMPTS[:20] * 2)
    model = ("--model", batchrun.model, "--max-tokens", 4)
    plain = batchrun("plan", source, *model, "--no-reorder", "--json").json
    assert plain["duplicates"] == {"rows": 0, "tokens": 0}
    assert plain["saved"] == {"prompt_tokens": 0, "steps": 0}
    alone = batchrun("plan", source, *model, "--no-share-prefixes", "--json").json
    assert (alone["shared_tokens"], alone["duplicates"]["rows"]) == (0, 20)


def test_a_missing_column_and_a_missing_model_are_told(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", ["x"])
    shown = batchrun("plan", source, "--model", batchrun.model, "--prompt-column", "text")
    assert shown.code == 1
    assert "text" in shown.error
    assert "no model" in batchrun("plan", source, "--model", "./nowhere").error


def test_rows_take_the_place_of_those_that_end() -> None:
    slots = BatchModel(2, 100)
    for answer in (10, 4, 6):
        slots.add(0, answer)
    assert slots.steps == 10
    slots.add(0, 5)
    assert slots.steps == 15
    prompts = BatchModel(2, 100)
    prompts.add(980, 1)  # ten steps of 98 tokens beside two that generate
    assert prompts.steps == pytest.approx(11)
