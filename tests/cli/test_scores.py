"""`--score`, `--labels` and `--perplexity` on the command line."""

from __future__ import annotations

import csv
import json

import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import CommandLine

PROMPTS = ["one", "two of them", "one", None, "a" * 200]
TEXTS = [" is", "\u00e9", " is", "x", "b" * 57]  # the last is too long: the context is 256
OPTIONS = ("--score", "text", "--labels", '[" yes","no"]', "--perplexity", "--dtype=float32")


@pytest.mark.parametrize(
    "suffix", ["parquet", pytest.param("jsonl", marks=pytest.mark.long), "csv"]
)
def test_outputs_have_their_columns(batchrun: CommandLine, suffix: str) -> None:
    source = batchrun.folder / f"in.{suffix}"
    if suffix == "csv":
        pairs = zip(PROMPTS, TEXTS, strict=True)
        lines = [f"{prompt or ''},{text}" for prompt, text in pairs]
        source.write_text("\n".join(["prompt,text", *lines, ""]))
    else:
        batchrun.write(source.name, PROMPTS, text=TEXTS)
    done = batchrun.submit(source, *OPTIONS, "--output", f"out.{suffix}")
    assert done.code == 3, done.err
    out = batchrun.folder / f"out.{suffix}"
    if suffix == "parquet":
        rows = pq.read_table(out).to_pylist()
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        with out.open() as file:
            read = list(csv.DictReader(file))
        told = ("score_", "label_", "perplexity")
        rows = [
            {k: json.loads(v or "null") if k.startswith(told) else v or None for k, v in r.items()}
            for r in read
        ]
    names = ["score_logprobs", "score_sum", "score_mean", "score_tokens"]
    assert [*rows[0]][-6:] == [*names, "label_probs", "perplexity"]
    assert [row["score_tokens"] for row in rows] == [3, 2, 3, None, None]
    assert [row["finish_reason"] for row in rows] == ["scored"] * 3 + [None] * 2
    assert rows[0]["score_logprobs"] == rows[2]["score_logprobs"]
    assert rows[0]["score_sum"] == pytest.approx(sum(rows[0]["score_logprobs"]))
    assert [*rows[1]["label_probs"]] == [" yes", "no"]
    stats = batchrun("stats", "--json").json
    assert stats["finish_reasons"] == {"scored": 3}
    assert stats["duplicates"]["rows"] == 1
    assert stats["rows"]["failed_by_reason"] == {"null_prompt": 1, "prompt_too_long": 1}
    same = batchrun("verify", "--recompute", 9)
    assert same.code == 0, same.out
    assert "3 of 3 rows are the same" in same.out


def test_a_plan_counts_scored_tokens_as_tokens_of_prompts(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", PROMPTS, text=TEXTS)
    found = batchrun("plan", source, "--model", batchrun.model, *OPTIONS, "--json").json
    texts = zip(PROMPTS, TEXTS, strict=True)
    size = sum(len((prompt + text).encode()) for prompt, text in texts if prompt)
    assert found["prompt_tokens"] == size
    assert (found["completion_tokens"], found["expected_tokens"]) == (0, 0)
    assert found["errors"] == {"null_prompt": 1, "prompt_too_long": 1}
    assert found["duplicates"]["rows"] == 1
    assert found["steps"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--max-tokens", 0),
            "--max-tokens must be at least 1 (0 only where known text is scored)",
        ),
        (("--perplexity", "--num-beams", 2), "--num-beams must be 1 where known text is scored"),
        (("--labels", "a,a"), "'--labels': the label 'a' appears twice"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage(
    batchrun: CommandLine, options: tuple[object, ...], said: str
) -> None:
    source = batchrun.write("in.jsonl", ["one"])
    done = batchrun.submit(source, *options)
    assert done.code == 2
    assert said in done.error


def test_labels_that_begin_alike_end_the_run_and_a_dry_run(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", ["one"])
    for more in ("--dry-run",), ():
        done = batchrun.submit(source, "--labels", "positive,possible", *more)
        assert done.code == 1
        assert "the labels 'positive' and 'possible' begin with the same token" in done.error
    missing = batchrun.submit(source, "--score", "text")
    assert missing.code == 1
    assert "no column 'text'" in missing.error
