"""What a generation config does to logits: token for token what `model.generate` makes of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from packaging.version import Version

from batchrun.engine.core import Request, SamplingParams, Segment
from batchrun.engine.cpu import sampling as cpu_sampling
from batchrun.engine.model.generation import Generation, read_generation
from batchrun.engine.model.prepare import LoadedModel, prepare
from batchrun.engine.plan import NewSequence
from batchrun.engine.processors import LogitsRow
from batchrun.engine.sampling import Sampler
from tests.parity.models import build
from tests.parity.runner import generate, outputs, rig, run, told

MAX_TOKENS = 12
# transformers refused valid biases there, and took no sequence as long as the tokens so far.
OLD = Version(tf.__version__) < Version("5.23")
OF_SEVERAL = {"bad words of several", "sequence_bias", "all"}
ENDS = [2, 20, 40, 60, 120, 150]

CONFIGS: dict[str, dict[str, Any]] = {
    "suppress_tokens": {"suppress_tokens": list(range(60, 130))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 160))},
    "bad_words_ids": {"bad_words_ids": [[w] for w in range(100, 150)] + [[2], [40]]},
    "bad words of several": {"bad_words_ids": [[a, b] for a in range(199) for b in (72, 108, 122)]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "no token twice": {"no_repeat_ngram_size": 1},
    "sequence_bias": {
        "sequence_bias": [
            *([[t], 4.0] for t in range(80, 100)),
            *([[a, 33], 9.0] for a in range(199)),
            *([[a, 34, 35], -5.0] for a in range(10)),
        ]
    },
    "forced_bos_token_id": {"forced_bos_token_id": 11, "begin_suppress_tokens": list(range(90))},
    "forced_eos_token_id": {"forced_eos_token_id": [40, 2]},
    "remove_invalid_values": {"remove_invalid_values": True, "suppress_tokens": [72, 122]},
    "decay": {"exponential_decay_length_penalty": (3, 1.4)},
    "min_new_tokens": {"min_new_tokens": 7},
    "all": {
        "sequence_bias": [[[5], 6.0], [[5, 7], 8.0]],
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[72], [5, 8]],
        "min_new_tokens": 3,
        "forced_eos_token_id": 20,
        "exponential_decay_length_penalty": (4, 1.2),
        "suppress_tokens": [122, 108],
        "begin_suppress_tokens": [7, 9],
        "renormalize_logits": True,
    },
}


@cache
def prompts() -> list[list[int]]:
    rng = random.Random(9)
    lengths = [1, 1, 2, 5, 12, 33] * 3
    return [[rng.randrange(3, 199) for _ in range(length)] for length in lengths]


@cache
def loaded() -> LoadedModel:
    model = build("llama")
    model.get_output_embeddings().weight.data.mul_(0.15)  # several tokens are likely
    return prepare(model)


@cache
def plain(beams: int) -> list[list[int]]:
    """Answers without any setting."""
    search = {"num_beams": beams} if beams > 1 else {}
    return [generate(loaded().model, p, MAX_TOKENS, eos_token_id=ENDS, **search) for p in prompts()]


@contextmanager
def configured(**config: Any) -> Iterator[tuple[LoadedModel, Generation]]:
    model = loaded().model
    before = model.generation_config
    model.generation_config = tf.GenerationConfig(eos_token_id=ENDS, pad_token_id=0, **config)
    try:
        again = prepare(model)
        yield again, read_generation(model, None, again.max_model_len)
    finally:
        model.generation_config = before


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_tokens_are_generates_own(name: str, beams: int) -> None:
    if OLD and name in OF_SEVERAL:
        pytest.skip("this transformers has a fault in biases of several tokens")
    with configured(**CONFIGS[name]) as (model, generation):
        assert not generation.ignored
        given: dict[str, Any] = {"max_tokens": MAX_TOKENS}
        search: dict[str, Any] = {"num_beams": beams} if beams > 1 else {}
        want = [generate(model.model, p, MAX_TOKENS, **search) for p in prompts()]
        params = generation.params({**given, **search})
        for settings in ({"max_num_seqs": 5, "max_num_batched_tokens": 17}, {}):
            with rig(model, **settings) as r:
                assert outputs(run(r, prompts(), params)) == want
        if beams == 1 and not params.penalised:
            with rig(model) as r:  # guesses are part of what came before
                answers = dict(zip(map(tuple, prompts()), want, strict=True))
                r.scheduler.stays.proposer = told(answers)
                assert outputs(run(r, prompts(), params)) == want
                assert 0 < r.engine.stats.accepted_tokens < r.engine.stats.drafted_tokens
    assert plain(beams) != want, "the setting changes nothing here"


@pytest.mark.parametrize("lag", [0, 1])
def test_what_needs_no_tokens_is_the_same_pipelined(lag: int) -> None:
    names = ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "decay")
    settings = {
        ("exponential_decay_length_penalty" if k == "decay" else k): CONFIGS[k][
            "exponential_decay_length_penalty" if k == "decay" else k
        ]
        for k in names
    }
    with configured(**settings) as (model, generation):
        assert not generation.logits.reads_tokens
        want = [generate(model.model, p, MAX_TOKENS) for p in prompts()]
        with rig(model, lag=lag, max_num_seqs=7) as r:
            params = generation.params({"max_tokens": MAX_TOKENS})
            assert outputs(run(r, prompts(), params)) == want


def test_what_needs_tokens_says_so() -> None:
    for name, reads in (("bad_words_ids", ()), ("bad words of several", ("bad_words_ids",))):
        with configured(**CONFIGS[name]) as (_, generation):
            assert generation.logits.reads_tokens == reads
    with configured(no_repeat_ngram_size=3, sequence_bias=[[[4, 5], 1.0]]) as (_, generation):
        assert generation.logits.reads_tokens == ("no_repeat_ngram_size", "sequence_bias")


WARPERS: list[dict[str, Any]] = [
    {"typical_p": 0.3},
    {"typical_p": 0.9},
    {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.02},
    {"eta_cutoff": 0.3},
    {"top_h": 0.4},
    {"top_h": 0.9},
    {"top_h": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.8},
    {"temperature": 1.7, "top_k": 40, "epsilon_cutoff": 0.004, "eta_cutoff": 0.005},
]


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("warpers", WARPERS, ids=str)
def test_filters_keep_what_transformers_keeps(warpers: dict[str, Any], spread: float) -> None:
    warpers = {"temperature": 0.8, **warpers}
    with configured(do_sample=True, **warpers) as (model, generation):
        config = model.model.generation_config
        config.top_k = warpers.get("top_k", 0)
        chain = model.model._get_logits_processor(config, 4, device="cpu")
        rows = torch.randn(6, 199, generator=torch.Generator().manual_seed(1)) * spread
        ids = torch.full((6, 4), 5)
        want = torch.softmax(chain(ids, rows.clone()), -1)
        params = generation.params({"max_tokens": 9})
        sampler = Sampler(6, torch.tensor, config=generation.logits)
        got = sampler._filtered(rows, [params] * 6, sampler._columns([params] * 6, 199))
    torch.testing.assert_close(torch.softmax(got, -1), want, atol=1e-5, rtol=1e-3)
    assert torch.equal(got > -torch.inf, want > 0)
    assert bool((want == 0).any())


def entered(sampler: Sampler, requests: list[Request]) -> list[LogitsRow]:
    """The rows behind prompts of requests that have come to slots."""
    sampler.enter(NewSequence(slot, request) for slot, request in enumerate(requests))
    return sampler.prepare(Segment(i, 0, len(r.prompt_ids), True) for i, r in enumerate(requests))


@pytest.mark.parametrize("on_gpu_way", [False, True])
def test_drawn_tokens_are_those_that_the_filters_keep(
    on_gpu_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with configured(do_sample=True, typical_p=0.4, top_h=0.7, temperature=1.2) as (_, generation):
        params = generation.params({"max_tokens": 9})
        count = 400
        row = torch.randn(1, 199, generator=torch.Generator().manual_seed(1)) * 2
        rows = row.repeat(count, 1)
        each = [Request(i, 0, (3, 5), params, 4) for i in range(count)]
        sampler = Sampler(count, torch.tensor, config=generation.logits)
        if on_gpu_way:
            monkeypatch.setattr("batchrun.engine.sampling._on_cpu", lambda _: False)
        [tokens] = sampler.sample(rows.clone(), entered(sampler, each))
        kept = sampler._filtered(row, [params], sampler._columns([params], 199))[0]
    probabilities = torch.softmax(kept, -1)
    assert bool((probabilities[tokens] > 0).all())
    likely = probabilities * count > 10
    counts = torch.bincount(tokens, minlength=199)
    chi2 = ((counts - probabilities * count) ** 2 / (probabilities * count))[likely].sum()
    assert float(chi2) < 3 * int(likely.sum()) + 10


def test_rows_without_finite_numbers_are_told_where_a_model_has_processors() -> None:
    everything = {**CONFIGS["all"], "do_sample": True, "typical_p": 0.5, "eta_cutoff": 0.1}
    everything |= {"top_h": 0.5, "epsilon_cutoff": 0.01}
    with configured(**everything) as (_, generation):
        rows = torch.randn(4, 199)
        rows[0, 3], rows[2] = torch.nan, -torch.inf
        each = [
            Request(i, 0, (3, 5, 9), generation.params({"temperature": t}), 4)
            for i, t in enumerate((0.0, 1.0, 1.0, 0.0))
        ]
        sampler = Sampler(4, torch.tensor, config=generation.logits)
        assert (sampler.sample(rows, entered(sampler, each))[0] < 0).tolist() == [
            True,
            False,
            True,
            False,
        ]


def test_a_compiler_changes_nothing() -> None:
    params = SamplingParams(temperature=1e-44)
    rows = torch.tensor([[-3.0, -1.0, -2.0], [1.0, 3.0, 2.0], [0.0, 0.0, -1.0]])
    for numbers in ([0.9] * 3, [0.1] * 3):
        got = cpu_sampling.draw(rows, [params] * 3, numbers)
        weights = [cpu_sampling.weights(row, params) for row in rows]
        assert got.tolist()[:2] == [1, 1]
        assert [int(np.argmax(w)) for w in weights][:2] == [1, 1]
