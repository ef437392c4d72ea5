"""Token for token what `model.generate` gives, whatever the batching, chunking and preemption."""

from __future__ import annotations

import random
from functools import cache

import pytest

from batchrun.engine import canary
from batchrun.engine.core import SamplingParams
from batchrun.engine.model import LoadedModel, prepare
from tests.parity.models import CONFIGS, build
from tests.parity.runner import generate, outputs, rig, run

MAX_TOKENS = 14
SHAPES = {
    "default": {},
    "chunked": {"max_num_batched_tokens": 13},
    "one-at-a-time": {"max_num_seqs": 1},
    "seven-a-slab-per-layer": {"max_num_seqs": 7, "layers_per_slab": 1},
}


@cache
def loaded(name: str) -> LoadedModel:
    return prepare(build(name))


@cache
def prompts(count: int = 24) -> list[list[int]]:
    rng = random.Random(5)
    return [
        [rng.randrange(3, 199) for _ in range(rng.choice([1, 2, 5, 12, 33, 60]))]
        for _ in range(count)
    ]


@cache
def wanted(name: str) -> list[list[int]]:
    return [generate(loaded(name).model, p, MAX_TOKENS) for p in prompts()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_generate(name: str, shape: str) -> None:
    with rig(loaded(name), **SHAPES[shape]) as r:  # type: ignore[arg-type]
        done = run(r, prompts(), SamplingParams(max_tokens=MAX_TOKENS))
    assert outputs(done) == wanted(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_generate_when_memory_is_short(name: str) -> None:
    model = loaded(name)
    layout_bytes = sum(s.kv_heads * (s.k_dim + s.v_dim) for s in model.layers) * 4
    with rig(model, kv_budget=layout_bytes * 170) as r:
        done = run(r, prompts(), SamplingParams(max_tokens=MAX_TOKENS))
        assert r.scheduler.num_preemptions > 3
        assert r.engine.stats.recomputed_tokens > 0
    assert outputs(done) == wanted(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_canary_passes(name: str) -> None:
    with rig(loaded(name)) as r:
        assert canary.verify(loaded(name), r.executor, r.arena, 64) < 1e-4
        r.arena.check()
        assert r.arena.num_open == 0


SAMPLED = SamplingParams(max_tokens=12, temperature=1.1, top_p=0.95, top_k=80)


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap", "mixtral-moe"])
def test_samples_are_the_same_for_any_batch_order_and_chunk(name: str) -> None:
    model = loaded(name)
    with rig(model) as r:
        want = outputs(run(r, prompts(), SAMPLED, seed=11))
    assert len({tuple(w) for w in want}) > 20
    backwards = list(reversed(range(len(prompts()))))
    for kwargs in (*SHAPES.values(), {"kv_budget": 60 * 4096}):
        with rig(model, **kwargs) as r:  # type: ignore[arg-type]
            assert outputs(run(r, prompts(), SAMPLED, seed=11, order=backwards)) == want
    with rig(model) as r:
        assert outputs(run(r, prompts(), SAMPLED, seed=12)) != want


def test_end_tokens_min_tokens_and_ignore_eos() -> None:
    model = loaded("llama")
    prompt = prompts()[3]
    free = generate(model.model, prompt, 10)
    stop = free[4]
    at = free.index(stop) + 1
    cases = {
        SamplingParams(max_tokens=10, stop_token_ids=(stop,)): free[:at],
        SamplingParams(max_tokens=10, stop_token_ids=(stop,), ignore_eos=True): free[:at],
        SamplingParams(max_tokens=10): free,
    }
    with rig(model) as r:
        for params, want in cases.items():
            assert outputs(run(r, [prompt], params)) == [want]
        held = outputs(
            run(r, [prompt], SamplingParams(max_tokens=10, min_tokens=8, stop_token_ids=(stop,)))
        )
    want = generate(model.model, prompt, 10, eos_token_id=stop, min_new_tokens=8)
    assert held == [want]
    assert stop not in want[:8]
