"""What a row gets from its logits depends on the row alone, whatever the others ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.engine import sampling
from batchrun.engine.beams import width
from batchrun.engine.core import SamplingParams
from batchrun.engine.cpu import sampling as cpu_sampling
from batchrun.engine.logits import LogitsConfig
from batchrun.engine.sampling import Sampler
from tests.engine.test_sampling import entered, sequence

EOS = frozenset({7, 19})
LARGE = 70_000  # tokens: torch adds up a single row of so many by several threads

common = {
    "min_tokens": st.sampled_from([0, 5]),
    "logprobs": st.sampled_from([None, 0, 2, 6]),
    "repetition_penalty": st.sampled_from([1.0, 1.3]),
    "frequency_penalty": st.sampled_from([0.0, 0.4]),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.sampled_from([(), (1, 2, 3)]),
}
params = st.one_of(
    st.fixed_dictionaries(common),
    st.fixed_dictionaries(
        {
            **common,
            "temperature": st.sampled_from([0.4, 1.0]),
            "top_p": st.sampled_from([1.0, 0.8]),
            "top_k": st.sampled_from([0, 20]),
            "min_p": st.sampled_from([0.0, 0.1]),
        }
    ),
    st.fixed_dictionaries({**common, "num_beams": st.integers(2, 4)}),
)
configs = st.builds(
    LogitsConfig,
    eos_ids=st.just(tuple(EOS)),
    top_h=st.sampled_from([None, None, 0.4]),
    typical_p=st.sampled_from([None, None, 0.7]),
    epsilon=st.sampled_from([0.0, 1e-3]),
    eta=st.sampled_from([0.0, 2e-3]),
    renormalize=st.booleans(),
    no_repeat_ngram_size=st.sampled_from([0, 2]),
)


@dataclass
class Found:
    """A row's token, its log-probability, candidates and likeliest tokens, if it asks for them."""

    token: int
    logprob: float | None
    candidates: list[Any]
    likeliest: list[Any]


def found(logits: torch.Tensor, rows: list[dict[str, Any]], config: LogitsConfig) -> list[Found]:
    sequences = [sequence(0, output=(5, 9, 5), **row) for row in rows]
    sampler = Sampler(len(rows), torch.tensor, EOS, config)
    tokens, *more = sampler.sample(logits.clone(), entered(sampler, sequences))
    asked = [SamplingParams(**row) for row in rows]
    logprobs = more.pop(0) if more else None
    beams = [i for i, own in enumerate(asked) if own.beams]
    candidates = dict(zip(beams, more.pop(0), strict=True)) if beams else {}
    answers = []
    for i, own in enumerate(asked):
        scored = own.beams or own.logprobs is not None
        wide = width(own.num_beams, len(own.stop_ids(EOS))) if own.beams else 0
        answers.append(
            Found(
                int(tokens[i]) if not own.beams else 0,
                float(logprobs[i]) if scored and not own.beams and logprobs is not None else None,
                candidates[i][:wide].tolist() if own.beams else [],
                more[0][i][: own.logprobs or 0].tolist() if own.logprobs else [],
            )
        )
    return answers


@dataclass(frozen=True)
class Step:
    """Rows that are sampled together, and how."""

    rows: list[dict[str, Any]]
    config: LogitsConfig
    dtype: torch.dtype
    vocab: int
    threads: int
    seed: int

    def logits(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.randn(len(self.rows), self.vocab, generator=generator) * 2).to(self.dtype)


steps = st.builds(
    Step,
    rows=st.lists(params, min_size=2, max_size=6),
    config=configs,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    vocab=st.sampled_from([211, 211, LARGE]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)


@pytest.mark.parametrize("way", ["compiled", "numpy", "device"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(step=steps)
def test_a_row_gets_the_same_alone(way: str, step: Step) -> None:
    if way == "compiled" and cpu_sampling.library() is None:
        pytest.skip("there is no C++ compiler")
    logits, before = step.logits(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        if way == "numpy":
            patch.setattr(cpu_sampling, "library", lambda: None)
        elif way == "device":
            patch.setattr(sampling, "_on_cpu", lambda _: False)
        try:
            together = found(logits, step.rows, step.config)
            torch.set_num_threads(step.threads)
            for i, row in enumerate(step.rows):
                assert found(logits[i : i + 1], [row], step.config) == [together[i]]
        finally:
            torch.set_num_threads(before)
