"""Best-of: what is kept is what anyone would pick who computes the log-probabilities anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import CommandLine

SAMPLED = (
    *("--temperature", 1.2, "--top-k", 40, "--repetition-penalty", 1.1, "--max-tokens", 9),
    *("--dtype", "float32"),
)
PROMPTS = ["one", "a second row", "three"]


def mean_logprobs(model: Path, rows: list[dict[str, Any]]) -> list[float]:
    """Of each row's completion, from a forward of transformers' own."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    forward = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    means = []
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        assert len(prompt) == row["prompt_tokens"]
        ids = torch.tensor([[*prompt, *row["completion_token_ids"]]])
        with torch.inference_mode():
            scores = forward(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        means.append(float(scores.gather(1, ids[0, len(prompt) :, None]).mean()))
    return means


@pytest.mark.parametrize("suffix", ["parquet", pytest.param("jsonl", marks=pytest.mark.long)])
def test_the_likeliest_samples_are_kept(batchrun: CommandLine, suffix: str) -> None:
    source = batchrun.write(f"in.{suffix}", PROMPTS)
    every, best, first = f"every.{suffix}", f"best.{suffix}", f"first.{suffix}"
    assert batchrun.submit(source, *SAMPLED, "--n", 4, "--token-ids", "-o", every).code == 0
    shown = batchrun.submit(
        source, *SAMPLED, *("--n", 2, "--best-of", 4, "--token-ids", "-o", best, "--json")
    )
    assert (shown.code, shown.json["rows"]["total"], shown.json["rows"]["done"]) == (0, 3, 3)
    samples = batchrun.read(every)
    means = mean_logprobs(batchrun.model, samples)
    want: list[tuple[dict[str, Any], float]] = []
    for i in range(0, len(samples), 4):
        ranked = sorted(range(i, i + 4), key=lambda k: -means[k])[:2]
        want += [({**samples[k], "sample": n}, means[k]) for n, k in enumerate(ranked)]
    got = batchrun.read(best)
    assert list(got[0])[-2:] == ["mean_logprob", "sample"]
    assert [row.pop("mean_logprob") for row in got] == pytest.approx(
        [mean for _, mean in want], abs=1e-4
    )
    assert got == [row for row, _ in want]
    job = shown.json["job"]
    assert batchrun("verify", job).code == 0
    parameters = batchrun("show", job, "--json").json["sampling"]
    assert (parameters["n"], parameters["best_of"]) == (2, 4)

    # One of them alone is the same job's first, without a column that numbers it.
    assert batchrun.submit(source, *SAMPLED, "--best-of", 4, "--token-ids", "-o", first).code == 0
    alone = batchrun.read(first)
    assert [row["completion"] for row in alone] == [row["completion"] for row in got[::2]]
    assert "sample" not in alone[0]


def test_what_can_not_be_meant_is_refused(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", PROMPTS)
    shown = batchrun.submit(source, "--n", 3, "--best-of", 2)
    assert (shown.code, shown.error) == (2, "--best-of 2 is less than --n 3")
    shown = batchrun.submit(source, "--best-of", 2, "--temperature", 0)
    assert shown.code == 2
    assert "all samples would be the same" in shown.error
    taken = batchrun.write("taken.jsonl", PROMPTS, mean_logprob=[1, 2, 3])
    shown = batchrun.submit(taken, "--best-of", 2, "--temperature", 1)
    assert (shown.code, "a column 'mean_logprob'" in shown.error) == (1, True)
    assert batchrun.submit(taken, "--dry-run").code == 0
