"""A model's own files on the command line: its generation config, and tokens that it lacks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.cli.conftest import CommandLine
from tests.tiny import byte_vocabulary


@pytest.fixture
def own(batchrun: CommandLine, tmp_path: Path) -> CommandLine:
    """With a copy of the model, whose tokenizer has more tokens."""
    copy = shutil.copytree(batchrun.model, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(copy)
    return replace(batchrun, model=copy)


def configure(batchrun: CommandLine, **config: Any) -> None:
    path = batchrun.model / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 2, **config}))


def test_what_the_model_asks_for_and_does_not_get_is_said_once(own: CommandLine) -> None:
    configure(own, num_beams=4, guidance_scale=1.5, no_repeat_ngram_size=2, max_length=40)
    source = own.write("in.jsonl", ["Hello", "x" * 39, "y" * 40])
    shown = own.submit(source, "-o", "out.jsonl", "--wait")
    assert shown.code == 3
    says = "the model's generation config sets num_beams=4, guidance_scale=1.5, which batchrun"
    assert shown.err.count(says) == 1
    first, second, third = own.read("out.jsonl")
    assert first["prompt_tokens"] + first["completion_tokens"] <= 40
    assert second["completion_tokens"] == 1
    assert "has 40 tokens" in third["error"]
    assert "max_length=40" in third["error"]
    shown = own.submit(source, "-o", "more.jsonl", "--wait", "--max-tokens", 3)
    assert shown.code == 0
    assert {row["completion_tokens"] for row in own.read("more.jsonl")} <= {1, 2, 3}


def test_a_token_that_only_the_tokenizer_has_is_a_rows_error(own: CommandLine) -> None:
    source = own.write("in.jsonl", ["fine", "a <two> b", "fine too"])
    size = len(byte_vocabulary())
    says = f"the prompt has the token '<two>' ({size + 1}), "
    says += f"but the model's vocabulary has {size} tokens"
    dry = own.submit(source, "-o", "out.jsonl", "--dry-run")
    assert f"1 of the first 3 rows will fail; row 1: {says}" in dry.err
    planned = own("plan", source, "--model", own.model, "--json").json
    assert planned["errors"] == {"unknown_token": 1}
    shown = own.submit(source, "-o", "out.jsonl", "--wait", "--max-tokens", 3)
    assert shown.code == 3
    assert [row["error"] for row in own.read("out.jsonl")] == [None, says, None]


def test_special_tokens_stop_an_answer_from_wherever_they_are_named(own: CommandLine) -> None:
    """Of a model that would never end: it knows no end token, and is told what to say."""
    configure(own, sequence_bias=[[[1], 100.0]])  # `<|im_start|>`, which no text shows
    options = ("--wait", "--max-tokens", 5, "--ignore-eos", "--overwrite", "--again")
    stops = [
        None,
        "<|im_start|>",
        "",
        ["", None],
        ["q", "<|im_start|>"],
        "<|im_start|><|im_start|>",
    ]
    source = own.write("in.jsonl", ["Hello"] * len(stops), stop=stops)
    assert own.submit(source, "-o", "out.jsonl", *options).code == 0
    rows = own.read("out.jsonl")
    assert [row["completion_tokens"] for row in rows] == [5, 1, 5, 5, 1, 2]
    assert [row["finish_reason"] for row in rows] == [
        "length", "stop", "length", "length", "stop", "stop"
    ]  # fmt: skip
    assert {row["completion"] for row in rows} == {""}
    stop = ("--stop", "<|im_start|>", "--ignore-param-columns")
    assert own.submit(source, "-o", "out.jsonl", *options, *stop).code == 0
    assert {row["completion_tokens"] for row in own.read("out.jsonl")} == {1}
    configure(own, sequence_bias=[[[1], 100.0]], stop_strings=["<|im_start|>"])
    assert own.submit(source, "-o", "out.jsonl", "--wait", "--overwrite").code == 0
    assert {row["completion_tokens"] for row in own.read("out.jsonl")} == {1}
    data = "--ignore-param-columns"
    refused = own.submit(source, "-o", "b.jsonl", "--wait", "--num-beams", 2, data)
    assert "has stop strings that beam search does not support: '<|im_start|>'" in refused.error
    assert "--ignore-eos" in refused.hint
    assert "must not be empty" in own.submit(source, "-o", "c.jsonl", "--stop", "").error
