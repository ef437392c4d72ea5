"""The real model: 200 prompts of mixed length, token for token what `generate` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from batchrun.allocator.arena import KVArena
from batchrun.engine.core import SamplingParams
from batchrun.engine.model.hook import HOOK, set_attention
from batchrun.engine.model.loading import load
from batchrun.engine.model.optimize import optimize
from batchrun.engine.model.prepare import LoadedModel
from batchrun.models.resolve import ModelRef
from tests.parity.runner import outputs, rig, run

EXAMPLES = Path(__file__).parents[2] / "examples" / "prompts.parquet"
LENGTHS = (1, 3, 7, 12, 20, 33, 50, 75, 110, 160)
EACH = 10
MAX_TOKENS = 6


@pytest.fixture(scope="module")
def model(smollm2: ModelRef) -> LoadedModel:
    return load(str(smollm2.path), dtype="float32")


@pytest.fixture(scope="module")
def fused(smollm2: ModelRef) -> LoadedModel:
    """As jobs have it."""
    loaded = load(str(smollm2.path), dtype="float32")
    optimize(loaded.model, compile=False, log=pytest.fail)
    return loaded


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """Passages of real text, all lengths mixed."""
    text = "\n".join(pq.read_table(EXAMPLES)["prompt"].to_pylist())
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 2000
    made = []
    for i in range(EACH):
        for j, length in enumerate(LENGTHS):
            start = (i * 1237 + j * 331) % (len(ids) - length)
            made.append(ids[start : start + length])
    return made


@pytest.fixture(scope="module")
def wanted(model: LoadedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Prompts of one length at a time: batches without any padding."""
    set_attention(model.model, "eager")
    found: dict[int, list[int]] = {}
    for length in LENGTHS:
        rows = [i for i, p in enumerate(prompts) if len(p) == length]
        ids = torch.tensor([prompts[i] for i in rows])
        got = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        for row, tokens in zip(rows, got[:, length:].tolist(), strict=True):
            end = next((k for k, t in enumerate(tokens) if t in model.eos_ids), MAX_TOKENS - 1)
            found[row] = tokens[: end + 1]
    set_attention(model.model, HOOK)
    return [found[row] for row in range(len(prompts))]


def test_a_hundred_prompts(
    fused: LoadedModel, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    assert len(prompts) == 100
    with rig(fused, max_num_batched_tokens=512, page_size=256 << 10) as r:
        done = run(r, prompts, SamplingParams(max_tokens=MAX_TOKENS), check=False)
    assert outputs(done) == wanted


def test_in_tiny_chunks_with_little_memory(
    model: LoadedModel,
    prompts: list[list[int]],
    wanted: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seven at a time, 61 tokens a step, pages for about 330 tokens, and all that fits admitted."""
    monkeypatch.setattr(KVArena, "has_room", lambda *_: True)
    budget = 330 * 30 * 2 * 3 * 64 * 4
    with rig(model, max_num_seqs=7, max_num_batched_tokens=61, kv_budget=budget) as r:
        done = run(r, prompts[:60], SamplingParams(max_tokens=MAX_TOKENS), check=False)
        assert r.scheduler.num_preemptions > 3
    assert outputs(done) == wanted[:60]


def test_pipelined(model: LoadedModel, prompts: list[list[int]], wanted: list[list[int]]) -> None:
    with rig(model, max_num_batched_tokens=300, page_size=256 << 10, lag=1) as r:
        done = run(r, prompts[:60], SamplingParams(max_tokens=MAX_TOKENS), check=False)
    assert outputs(done) == wanted[:60]


def test_one_at_a_time(
    model: LoadedModel, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    with rig(model, max_num_seqs=1) as r:
        done = run(r, prompts[:10], SamplingParams(max_tokens=MAX_TOKENS), check=False)
    assert outputs(done) == wanted[:10]


def test_samples_are_the_same_for_any_batch(model: LoadedModel, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, top_p=0.95)
    few = prompts[:20]
    with rig(model, max_num_batched_tokens=512) as r:
        want = outputs(run(r, few, params, seed=3, check=False))
    assert len({tuple(w) for w in want}) > 16
    with rig(model, max_num_seqs=7, max_num_batched_tokens=40) as r:
        backwards = list(reversed(range(len(few))))
        got = outputs(run(r, few, params, seed=3, order=backwards, check=False))
    assert got == want
