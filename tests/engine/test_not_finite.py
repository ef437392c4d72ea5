"""A row for which the model computes no finite numbers fails alone, whatever it ran beside."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from batchrun.engine.build import Assembly
from batchrun.engine.core import FinishReason, SamplingParams
from batchrun.engine.cpu import library
from batchrun.engine.model.prepare import LoadedModel, prepare
from batchrun.engine.settings import Settings
from tests.pairs import part
from tests.parity.models import CONFIGS, build, seeded
from tests.parity.runner import outputs, rig, run

BAD = 77  # the token whose embedding is NaN
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.3, "frequency_penalty": 0.1},
    "scored": {"temperature": 0.7, "top_k": 5, "scored": True},
    "at least": {"min_tokens": 4},
    "beams": {"num_beams": 3},
}


def loaded(name: str = "llama", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A model with a token of which it can make nothing, and that it never says itself."""
    model = build(name)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        head.weight[BAD] = 0
        model.get_input_embeddings().weight[BAD] = torch.nan
    return prepare(model.to(dtype))


def rows(bad: bool) -> list[list[int]]:
    """Every third is bad; all begin alike, so that they share memory, and bad ones end early."""
    rng = random.Random(3)
    common = [rng.randrange(3, 76) for _ in range(20)]
    made = []
    for i in range(24):
        ids = [*common[: 20 if i % 2 else 0], *(rng.randrange(3, 76) for _ in range(1 + i % 7))]
        if i % 3 == 1 and bad:
            ids[-1 - i % 2] = BAD
        made.append(ids)
    return made


def check(r: Assembly, want: list[list[int]], params: Any) -> None:
    done = run(r, rows(bad=True), params, seed=5)
    for i, completion in enumerate(done):
        if i % 3 == 1:
            assert completion.finish_reason is FinishReason.ERROR
            assert completion.error_kind == "not_finite"
            prompt = len(completion.request.prompt_ids)
            assert f"logits are not finite after {prompt} tokens of the prompt" in completion.error
        else:
            assert completion.error is None
            assert list(completion.token_ids) == want[i]
    assert r.arena.num_open == 0


MODELS = ["llama", "gemma2-softcap", "mixtral-moe", "mistral-window"]


@pytest.mark.parametrize(("name", "kind", "lag"), part(3, MODELS, [*PARAMS], [0, 1]))
def test_a_row_without_finite_numbers_fails_alone(name: str, kind: str, lag: int) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, **PARAMS[kind])
    model = loaded(name)
    with rig(model, max_num_seqs=7, lag=lag) as r:
        want = outputs(run(r, rows(bad=False), params, seed=5))
    # Few slots, so that good rows come to where bad ones were; and memory that is short.
    for settings in ({"max_num_seqs": 4}, {"max_num_seqs": 9, "max_num_batched_tokens": 11}):
        with rig(model, lag=lag, **settings) as r:
            check(r, want, params)


@pytest.mark.parametrize("attention", ["native", "sdpa", "torch-flash"])
def test_what_it_leaves_in_memory_harms_no_other(attention: str) -> None:
    """Kernels read whole pages or tiles, and what has no weight may still be NaN."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    model = loaded()
    try:
        with rig(model, attention=attention, max_num_seqs=3) as r:
            want = outputs(run(r, rows(bad=False), params))
    except Exception as error:
        pytest.skip(str(error))
    with rig(model, attention=attention, max_num_seqs=3) as r:
        check(r, want, params)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("kind", PARAMS)
def test_in_bfloat16_with_native_layers_and_guesses(kind: str, optimize: bool) -> None:
    if library.unsupported_reason(torch.bfloat16) is not None:
        pytest.skip(str(library.unsupported_reason(torch.bfloat16)))
    params = SamplingParams(max_tokens=8, ignore_eos=True, **PARAMS[kind])
    settings = Settings("", "tiny", "", None, optimize=optimize, max_num_seqs=5, page_size=8192)  # type: ignore[arg-type]
    found = []
    for bad in (False, True):
        with Assembly(loaded(dtype=torch.bfloat16), settings) as r:
            if bad:
                check(r, found[0], params)
            else:
                found.append(outputs(run(r, rows(bad=False), params, seed=5)))


def test_it_may_happen_in_mid_answer() -> None:
    """After a token that the model itself says."""
    model = seeded(CONFIGS["llama"])
    loaded = prepare(model)
    prompts = rows(bad=False)
    params = SamplingParams(max_tokens=10, ignore_eos=True, stop=("never",))
    with rig(loaded) as r:
        want = outputs(run(r, prompts, params))
    said = want[0][4]
    with torch.no_grad():
        model.get_input_embeddings().weight[said] = torch.nan
    with rig(loaded, max_num_seqs=4) as r:
        done = run(r, prompts, params)
        failed = 0
        for ids, completion, expected in zip(prompts, done, want, strict=True):
            if said in ids or said in expected[:-1]:
                failed += 1
                count = 0 if said in ids else expected.index(said) + 1
                assert completion.error.count(f"and {count} of the answer") == 1
            else:
                assert list(completion.token_ids) == expected
        assert 0 < failed < len(done)
