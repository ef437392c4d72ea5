"""`submit --num-beams`: what transformers' generate gives, from the command line to the output."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import CommandLine

PROMPTS = ["one", "a second row", "three", "four and five"]
SEARCH = ("--num-beams", 3, "--length-penalty", 1.5, "--early-stopping", "yes", "--max-tokens", 8)


def test_beams_from_end_to_end(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", PROMPTS, temperature=[None, None, 0.7, None])
    shown = batchrun.submit(source, *SEARCH, "--token-ids", "-o", "out.jsonl", "--json")
    assert shown.json["rows"]["failed"] == 1
    rows = batchrun.read("out.jsonl")
    assert "temperature must be 0 with beam search" in rows[2]["error"]
    tokenizer = AutoTokenizer.from_pretrained(batchrun.model)
    model = AutoModelForCausalLM.from_pretrained(batchrun.model, dtype=torch.float32).eval()
    for row in (rows[0], rows[1], rows[3]):
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        got = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            num_beams=3,
            length_penalty=1.5,
            early_stopping=True,
        )
        assert row["completion_token_ids"] == got[0, ids.shape[1] :].tolist()
        assert row["completion"] == tokenizer.decode(
            row["completion_token_ids"], skip_special_tokens=True
        )
    parameters = batchrun("show", shown.json["job"], "--json").json["sampling"]
    assert (parameters["num_beams"], parameters["early_stopping"]) == (3, True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--n", 2), "one answer for each row"),
        (("--best-of", 2), "one answer for each row"),
        (("--temperature", 0.5), "does not sample"),
        (("--stop", "."), "--stop-token-id"),
        (("--length-penalty", "nan"), "--length-penalty must be a finite number"),
    ],
)
def test_what_beams_can_not_do_is_refused(
    batchrun: CommandLine, options: tuple[str, ...], error: str
) -> None:
    source = batchrun.write("in.jsonl", PROMPTS)
    shown = batchrun.submit(source, "--num-beams", 2, *options)
    assert shown.code == 2
    assert error in shown.error


def test_what_is_of_beams_needs_them(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", PROMPTS)
    for option in (("--length-penalty", 2), ("--early-stopping", "never")):
        shown = batchrun.submit(source, *option)
        assert (shown.code, "add --num-beams" in shown.error) == (2, True)
