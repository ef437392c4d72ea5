"""Sampling: the distribution is transformers' own, the draw is the row's own."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchrun.engine import sampling, sums
from batchrun.engine.core import Request, SamplingParams, Segment, Sequence
from batchrun.engine.cpu import sampling as cpu_sampling
from batchrun.engine.plan import NewSequence
from batchrun.engine.processors import LogitsRow
from batchrun.engine.sampling import Sampler, filter_rows

VOCAB = 4000


def sequence(row: int = 0, output: tuple[int, ...] = (), **params: object) -> Sequence:
    request = Request(row, 0, (3, 5, 7, 5), SamplingParams(**params), 42)  # type: ignore[arg-type]
    return Sequence(request, list(output))


def sample(
    rows: torch.Tensor, sequences: list[Sequence], stop_ids: frozenset[int] = frozenset()
) -> torch.Tensor:
    sampler = Sampler(len(sequences), torch.tensor, eos_ids=stop_ids)
    [tokens] = sampler.sample(rows, entered(sampler, sequences))
    return tokens


def entered(sampler: Sampler, sequences: list[Sequence]) -> list[LogitsRow]:
    """The rows of sequences that have come to slots, and have computed all but their last token."""
    sampler.enter(NewSequence(i, s.request, tuple(s.output_ids)) for i, s in enumerate(sequences))
    return sampler.prepare(Segment(i, s.num_tokens - 1, 1, True) for i, s in enumerate(sequences))


def logits(count: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.fixture
def compiled() -> None:
    if cpu_sampling.library() is None:
        pytest.skip("there is no C++ compiler")


@pytest.fixture(params=["compiled", "numpy"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler, and as if there were none."""
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    else:
        monkeypatch.setattr(cpu_sampling, "library", lambda: None)


def test_uniform_numbers_are_uniform_and_independent() -> None:
    draws = torch.tensor(
        [
            [sampling.uniform(1, row, sample, position) for position in range(50)]
            for row in range(40)
            for sample in range(2)
        ]
    )
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.unique().numel() == draws.numel()
    counts = torch.histc(draws, bins=20, min=0, max=1)
    chi2 = float(((counts - 200) ** 2 / 200).sum())
    assert chi2 < 45  # 19 degrees of freedom: p = 0.0007
    correlation = torch.corrcoef(torch.stack([draws[:, :-1].flatten(), draws[:, 1:].flatten()]))
    assert abs(float(correlation[0, 1])) < 0.06


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 13},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 0.9999},  # a sum of nearly all
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_filters_keep_what_transformers_keeps(params: dict[str, float], spread: float) -> None:
    rows = logits(4, spread)
    made = [(TemperatureLogitsWarper, "temperature"), (TopKLogitsWarper, "top_k")]
    made += [(TopPLogitsWarper, "top_p"), (MinPLogitsWarper, "min_p")]
    chain = LogitsProcessorList([kind(params[key]) for kind, key in made if key in params])
    if "repetition_penalty" in params:
        chain.insert(0, RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    sequences = [sequence(row, output=(11, 3), **params) for row in range(4)]
    ids = torch.tensor([[*s.request.prompt_ids, *s.output_ids] for s in sequences])
    want = torch.softmax(chain(ids, rows.clone()), -1)
    sample(rows, sequences)
    weights = [
        cpu_sampling.weights(row, s.request.params) for row, s in zip(rows, sequences, strict=True)
    ]
    got = torch.tensor(np.array(weights), dtype=torch.float64)
    got /= got.sum(-1, keepdim=True)
    possible = want > want.amax(-1, keepdim=True) * 2**-44  # what is less has no weight
    assert torch.equal(got > 0, possible)
    torch.testing.assert_close(got.float(), want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_filtering_all_rows_at_once_is_filtering_each(spread: float) -> None:
    params = [
        SamplingParams(temperature=1.0, top_k=k, top_p=p, min_p=m)
        for k in (0, 1, 13, VOCAB, VOCAB + 5)
        for p in (0.2, 0.9999, 1.0)
        for m in (0.0, 0.05)
    ]
    rows = logits(len(params), spread)
    columns = torch.tensor(
        [[p.top_p, p.min_p, p.top_k or VOCAB] for p in params], dtype=torch.float64
    )
    got = filter_rows(rows, params, columns[:, :1], columns[:, 1:2], columns[:, 2:].long())
    for row, kept, p in zip(rows, got, params, strict=True):
        assert np.array_equal(cpu_sampling.weights(row, p) > 0, kept > -torch.inf)
        assert torch.equal(kept[kept > -torch.inf], row[kept > -torch.inf])


FILTERS = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
    for t in (0.05, 0.8, 1.9)
    for k in (0, 1, 13, VOCAB + 5)
    for p in (0.001, 0.6, 0.95, math.nextafter(1, 0), 1.0)
    for m in (0.0, 0.05, 1.0)
]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 12.0])
@pytest.mark.parametrize("vocab", [5, 256, 257, VOCAB])
def test_a_compiler_changes_no_draw(vocab: int, spread: float, dtype: torch.dtype) -> None:
    rows = logits(len(FILTERS), spread)[:, :vocab].to(dtype)
    rows[0::9, :3] = -torch.inf
    rows[1::9, 1] = torch.inf
    rows[2::9, 2:4] = torch.nan
    rows[3::9, 1:] = -torch.inf
    rows[4::9, 3] = 1e30
    rows[5] = -torch.inf
    rows[6] = torch.nan
    choice = random.Random(vocab)
    numbers = [
        choice.choice([0.0, choice.random(), choice.random(), math.nextafter(1, 0)])
        for _ in FILTERS
    ]
    got = cpu_sampling.draw(rows, FILTERS, numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_sampling, "library", lambda: None)
        assert torch.equal(got, cpu_sampling.draw(rows, FILTERS, numbers))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("params", FILTERS[::7])
def test_each_token_has_its_share_of_the_numbers(params: SamplingParams) -> None:
    """A compiled draw changes from token to token where the sums of the weights say."""
    [row] = logits(1)
    cdf = cpu_sampling.weights(row, params).cumsum()
    total, tokens = float(cdf[-1]), np.unique(np.searchsorted(cdf, cdf, "left"))
    tokens = tokens[:: len(tokens) // 50 + 1]
    begins = np.array([cdf[t - 1] if t else 0 for t in tokens])
    # Near a token's first number, near its last, and between; a number has 53 bits.
    for at in (begins + 1024, cdf[tokens] - 1024, (begins + cdf[tokens]) / 2):
        numbers = (at / total).tolist()
        keep = [n for n, (b, e) in enumerate(zip(begins, cdf[tokens], strict=True)) if e - b > 4096]
        rows = row.repeat(len(keep), 1)
        got = cpu_sampling.draw(rows, [params] * len(keep), [numbers[n] for n in keep])
        assert got.tolist() == tokens[keep].tolist()


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_a_device_that_nobody_waits_for_draws_the_same(spread: float) -> None:
    """But for a number so close to a boundary that rounding decides: none of these is."""
    params = [p for p in FILTERS if p.temperature > 0.5]
    rows = logits(len(params), spread)
    numbers = [sampling.uniform(1, row, 0, 0) for row in range(len(params))]
    sampler = Sampler(1, torch.tensor)
    got = sampler._draw_at_once(rows, params, numbers)
    assert torch.equal(got, cpu_sampling.draw(rows, params, numbers))


def test_sums_on_a_device_are_exact_and_so_the_same_for_any_number_of_rows() -> None:
    rows = logits(5, 3.0)
    rows[1, 7:] = -torch.inf
    got = sums.logsumexp(rows)
    torch.testing.assert_close(got, rows.double().logsumexp(-1).float(), rtol=1e-6, atol=1e-6)
    weights = sums.weights(rows)
    assert weights.dtype == torch.int64
    assert weights.amax(-1).tolist() == [2**42] * 5
    assert torch.equal(sums.weights(rows[3:4])[0], weights[3])


def test_of_equal_logits_a_device_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_on_cpu", lambda _: False)
    rows = torch.tensor([[1.0, 3.0, -2.0, 3.0, -0.5, -torch.inf, 3.0], [-1.0] * 7])
    for dtype in (torch.float32, torch.bfloat16):
        values, ids = sampling._highest(rows.to(dtype), 6)
        assert ids.tolist() == [[1, 3, 6, 0, 4, 2], [0, 1, 2, 3, 4, 5]]
        assert values[0].tolist() == [3.0, 3.0, 3.0, 1.0, -0.5, -2.0]


def test_penalties_know_the_tokens_that_the_host_does_not() -> None:
    """A pipelined sequence, in a slot that it left and came back to, with others in between."""
    sampler = Sampler(2, torch.tensor)
    params = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.4}
    first, second = sequence(0, **params), sequence(1, output=(9, 9), **params)

    def penalised(
        target: Sequence, slot: int, output: tuple[int, ...], *, new: bool = True
    ) -> None:
        """Samples once more; `output` are the tokens so far, which the host may not know yet."""
        if new:
            sampler.enter([NewSequence(slot, target.request, output)])
        rows = logits(1, seed=len(output))
        want = rows.clone()
        sample(want, [sequence(0, output=output, **params)])
        end = target.num_prompt_tokens + len(output)
        now = sampler.prepare([Segment(slot, end - 1, 1, True)])
        [token] = sampler.sample(rows, now)
        assert torch.equal(rows, want)
        sampler.accept(token, now)
        outputs.append(int(token))

    outputs: list[int] = []
    penalised(first, 0, ())
    penalised(first, 0, (outputs[0],), new=False)  # pending: the host never knows it
    penalised(first, 1, tuple(outputs))  # preempted, and admitted to another slot
    penalised(second, 1, (9, 9))
    del outputs[-1]
    penalised(first, 0, tuple(outputs))  # back again: slot 0 has counted less


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_the_models_own(dtype: torch.dtype) -> None:
    """Of the raw logits, whatever penalties, bans and filters made of them."""
    rows = logits(4).to(dtype)
    want = torch.log_softmax(rows.float(), -1)
    sequences = [
        sequence(0, scored=True),
        sequence(1, temperature=1.7, top_k=5, scored=True),
        sequence(2, repetition_penalty=2.0, output=(9,), scored=True),
        sequence(3, min_tokens=2, scored=True),
    ]
    stop = frozenset({int(rows[3].argmax())})
    sampler = Sampler(4, torch.tensor, eos_ids=stop)
    tokens, got = sampler.sample(rows, entered(sampler, sequences))
    assert int(tokens[3]) not in stop
    torch.testing.assert_close(got, want.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)


@pytest.mark.usefixtures("either")
def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.025])
    count = 4000
    rows = probabilities.log().repeat(count, 1)
    tokens = sample(rows, [sequence(row, temperature=1.0) for row in range(count)])
    counts = torch.bincount(tokens, minlength=5)
    chi2 = float(((counts - probabilities * count) ** 2 / (probabilities * count)).sum())
    assert chi2 < 20  # 4 degrees of freedom: p = 0.0005


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_depends_on_its_row_alone(dtype: torch.dtype) -> None:
    rows = logits(24).to(dtype)
    mixed = [
        sequence(
            i, output=(1,) * (i % 3), temperature=[0.0, 0.8, 1.2][i % 3], top_p=[1, 0.9][i % 2]
        )
        for i in range(24)
    ]
    together = sample(rows.clone(), mixed)
    for i in (0, 1, 7, 23):
        alone = sample(rows[i : i + 1].clone(), [mixed[i]])
        assert alone[0] == together[i]
    backwards = sample(rows.flip(0).clone(), mixed[::-1])
    assert torch.equal(backwards.flip(0), together)
    threads = torch.get_num_threads()
    for other in (1, 5):
        torch.set_num_threads(other)
        try:
            assert torch.equal(sample(rows.clone(), mixed), together)
        finally:
            torch.set_num_threads(threads)


def test_greedy_takes_the_largest_logit() -> None:
    rows = logits(3)
    tokens = sample(rows.clone(), [sequence(i) for i in range(3)])
    assert torch.equal(tokens, rows.argmax(-1))


@pytest.mark.usefixtures("either")
def test_penalties_change_seen_tokens_as_defined() -> None:
    row = logits(1)
    penalised = row.clone()
    target = sequence(output=(9, 9, 11), presence_penalty=0.5, frequency_penalty=0.25)
    sample(penalised, [target])
    delta = (row - penalised)[0]
    assert delta[9] == pytest.approx(0.5 + 2 * 0.25, abs=1e-6)
    assert delta[11] == pytest.approx(0.75, abs=1e-6)
    assert int((delta != 0).sum()) == 2


def test_no_stop_token_before_min_tokens() -> None:
    rows = torch.zeros(2, VOCAB)
    rows[:, 8] = 50
    early, late = sequence(min_tokens=2, output=(1,)), sequence(min_tokens=2, output=(1, 1))
    tokens = sample(rows, [early, late], frozenset({8, VOCAB, 10**9}))  # no row has the last two
    assert tokens[0] != 8
    assert tokens[1] == 8


@pytest.mark.usefixtures("compiled")
def test_a_compiler_changes_no_penalty() -> None:
    params = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.4}
    sequences = [
        sequence(0, output=(9, 9, 3), **params),
        sequence(1),
        sequence(2, output=(11,), **params),
        sequence(3, repetition_penalty=0.7),
    ]
    got, want = logits(4), logits(4)
    sample(got, sequences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_sampling, "library", lambda: None)
        sample(want, sequences)
    assert torch.equal(got, want)
    assert not torch.equal(got[0], logits(4)[0])


@pytest.mark.usefixtures("either")
def test_a_draw_at_the_very_end_is_a_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda *_: math.nextafter(1, 0))
    rows = torch.full((1, VOCAB), -torch.inf)
    rows[0, [4, 6]] = 1.0
    assert sample(rows, [sequence(temperature=1.0)]).tolist() == [6]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("min_tokens", 600),
    ],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*, not"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logprobs", [False, True])
def test_rows_that_ignore_end_tokens_never_get_one(
    dtype: torch.dtype, temperature: float, logprobs: bool
) -> None:
    ends, kinds = (3, 7), [(), (7,), None]  # a row's own stop tokens; None for one that ends
    sequences = []
    for row, stops in enumerate(kinds):
        params = SamplingParams(
            temperature=temperature,
            scored=logprobs,
            ignore_eos=stops is not None,
            stop_token_ids=stops or (),
        )
        sequences.append(Sequence(Request(row, 0, (1,), params, 5)))
    for chosen in (sequences, sequences[:1]):  # all alike are another way
        logits = torch.zeros(len(chosen), 9, dtype=dtype)
        logits[:, 3], logits[:, 7], logits[:, 5] = 40.0, 39.0, 20.0
        sampler = Sampler(3, torch.tensor, eos_ids=ends)
        tokens, *rest = sampler.sample(logits, entered(sampler, chosen))
        assert tokens.tolist() == [5, 7, 3][: len(chosen)]
        if logprobs:  # under the model's own distribution
            want = torch.tensor([20.0, 39.0, 40.0])[: len(chosen)] - 40.313
            torch.testing.assert_close(rest[0].float(), want, atol=0.05, rtol=0)
