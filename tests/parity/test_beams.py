"""Beam search in the engine: what `model.generate` gives, whatever else is in the batch."""

from __future__ import annotations

import random
from functools import cache
from itertools import product
from typing import Any

import pytest

from batchrun.allocator.arena import KVArena
from batchrun.engine.core import FinishReason, SamplingParams
from batchrun.engine.model.prepare import LoadedModel, prepare
from tests.pairs import part
from tests.parity.models import build
from tests.parity.runner import generate, outputs, rig, run

MAX_TOKENS = 10
MODELS = ["llama", "gemma2-softcap", "mistral-window", "gpt-neox", "mixtral-moe", "deepseek-mla"]
STOPS = tuple(range(2, 199, 16))  # beside the model's own, so that answers end early
SEARCHES = [
    {"num_beams": num_beams, "length_penalty": penalty, "early_stopping": early}
    for num_beams, penalty, early in product((2, 4), (0.5, 1.0, 2.0), (False, True))
]
SEARCHES += [{"num_beams": 3, "length_penalty": 1.5, "early_stopping": "never"}]
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "chunked": {"max_num_batched_tokens": 7},
    "one-row-at-a-time": {"max_num_seqs": 4},
    "pipelined": {"lag": 1, "max_num_batched_tokens": 40, "max_num_seqs": 9},
    "short": {"tokens": 150},
    "short-pipelined": {"tokens": 150, "lag": 1},
    "not-shared": {"share_prefixes": False, "tokens": 190},
}


@cache
def loaded(name: str) -> LoadedModel:
    """A model of which several tokens are likely: `build` makes most certain of one."""
    model = build(name)
    model.get_output_embeddings().weight.data.mul_(0.15)
    return prepare(model)


@cache
def prompts() -> list[list[int]]:
    rng = random.Random(8)
    common = [rng.randrange(3, 199) for _ in range(18)]
    made = []
    for i in range(2 * len(SEARCHES)):
        own = [rng.randrange(3, 199) for _ in range(rng.choice([1, 3, 12, 31]))]
        made.append(common + own if i % 3 == 0 else own)
    return made


def params(row: int) -> SamplingParams:
    """Every other row is a beam search; the others are greedy or drawn."""
    if row % 2:
        return SamplingParams(max_tokens=MAX_TOKENS, temperature=float(row % 4 == 1))
    search: dict[str, Any] = SEARCHES[row // 2]
    return SamplingParams(
        max_tokens=MAX_TOKENS,
        min_tokens=row % 5,
        stop_token_ids=STOPS,
        repetition_penalty=1.2 if row % 6 == 0 else 1.0,
        **search,
    )


@cache
def wanted(name: str) -> dict[int, list[int]]:
    found = {}
    for row in range(0, 2 * len(SEARCHES), 2):
        p = params(row)
        found[row] = generate(
            loaded(name).model,
            prompts()[row],
            MAX_TOKENS,
            num_beams=p.num_beams,
            length_penalty=p.length_penalty,
            early_stopping=p.early_stopping,
            min_new_tokens=p.min_tokens,
            repetition_penalty=p.repetition_penalty,
            eos_token_id=[*STOPS],
        )
    return found


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *product(["llama"], SHAPES),
        *part(2, MODELS[1:], ["pipelined", "short-pipelined"]),
    ],
)
def test_beams_equal_generate(name: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = loaded(name), dict(SHAPES[shape])
    tokens = settings.pop("tokens", None)
    if tokens is not None:
        monkeypatch.setattr(KVArena, "has_room", lambda *_: True)
        each = sum(s.kv_heads * (s.k_dim + s.v_dim) for s in model.layers) * 4
        settings["kv_budget"] = each * tokens
    everything = [params(row) for row in range(len(prompts()))]
    with rig(model, **settings) as r:
        done = run(r, prompts(), everything, seed=3)
        assert (r.scheduler.num_preemptions > 0) == (tokens is not None)
        assert r.arena.num_open == 0
        assert r.engine.partials() == []
    got = outputs(done)
    assert {row: got[row] for row in wanted(name)} == wanted(name)
    for completion in done[::2]:
        ids, reason = list(completion.token_ids), completion.finish_reason
        assert (reason is FinishReason.STOP) == (ids[-1] in STOPS)
    alone = {row: everything[row] for row in range(1, len(prompts()), 2)}
    with rig(model) as r:
        plain = run(r, [prompts()[row] for row in alone], list(alone.values()), seed=3)
    for row, completion in zip(alone, plain, strict=True):
        if everything[row].greedy:  # a draw depends on the row's number, which is another here
            assert list(completion.token_ids) == got[row]


def test_more_beams_than_sequences_is_the_rows_error() -> None:
    with rig(loaded("llama"), max_num_seqs=3) as r:
        done = run(r, [[5, 6], [7, 8]], [SamplingParams(num_beams=4), SamplingParams(max_tokens=3)])
    assert done[0].error_kind == "bad_parameter"
    assert "--max-num-seqs" in str(done[0].error)
    assert len(done[1].token_ids) == 3


def test_beams_that_outgrow_memory_are_the_rows_error() -> None:
    model = loaded("llama")
    each = sum(s.kv_heads * (s.k_dim + s.v_dim) for s in model.layers) * 4
    with rig(model, kv_budget=each * 60) as r:
        ask = SamplingParams(max_tokens=120, num_beams=3, ignore_eos=True)
        done = run(r, [[5, 6], [7, 8]], [ask, SamplingParams(max_tokens=3)])
        assert r.arena.num_open == 0
    assert done[0].error_kind == "kv_budget"
    assert "--kv-budget" in str(done[0].error)
    assert len(done[1].token_ids) == 3


@pytest.mark.parametrize("penalty", [-99.9, 99.9])
def test_lengths_to_a_power_that_no_number_is_large_enough_for(penalty: float) -> None:
    params = SamplingParams(max_tokens=230, num_beams=2, length_penalty=penalty, ignore_eos=True)
    with rig(loaded("llama")) as r:
        [done] = run(r, [[5, 6]], params)
    assert len(done.token_ids) > 1


def test_more_beams_than_tokens_in_the_vocabulary() -> None:
    params = SamplingParams(max_tokens=3, num_beams=210, ignore_eos=True)
    with rig(loaded("llama"), max_num_seqs=220) as r:
        [done] = run(r, [[5, 6]], params)
    assert len(done.token_ids) == 3
