"""Beam search against transformers' own, over forwards of the model and nothing else."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from batchrun.engine.beams import BeamGroup, width
from batchrun.engine.core import Candidates, FinishReason, Request, SamplingParams, Sequence
from tests.parity.models import build

MAX_TOKENS = 11
STOPS = {2, 7, 30, 61, 90, 111, 160}  # of 199 tokens, so that many answers end early


@pytest.fixture(scope="module")
def model() -> Any:
    """With weights small enough that several tokens are likely."""
    made = build("llama")
    made.set_attn_implementation("eager")
    with torch.no_grad():
        made.lm_head.weight.mul_(0.15)
    return made


def told(*pairs: tuple[int, float]) -> Candidates:
    """Candidates where no processor changes the model's own logits."""
    return tuple((token, logprob, logprob) for token, logprob in pairs)


def search(model: Any, prompt: list[int], params: SamplingParams) -> tuple[list[int], FinishReason]:
    """The plainest loop around a group: all tokens of each beam, again and again."""
    stops = frozenset(params.stop_token_ids)
    leader = Sequence(Request(0, 0, tuple(prompt), params, 0))
    group = BeamGroup(leader, params.max_tokens, stops)
    while not group.ended:
        ids = torch.tensor([s.known_ids for s in group.sequences])
        with torch.no_grad():
            logits = model(ids).logits[:, -1].log_softmax(-1)
        if ids.shape[1] - len(prompt) < params.min_tokens:
            logits[:, list(stops)] = -torch.inf
        best = logits.topk(width(params.num_beams, len(stops)))
        for i, sequence in enumerate(group.sequences):
            found = zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True)
            assert not sequence.idle
            group.report(sequence, told(*found))
        group.advance()
        assert len(group.sequences) <= params.num_beams
        assert len({tuple(s.output_ids) for s in group.sequences}) == len(group.sequences)
    reason = group.finish()
    return leader.output_ids, reason


def wanted(model: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    ids = torch.tensor([prompt])
    got = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=params.max_tokens,
        min_new_tokens=params.min_tokens,
        do_sample=False,
        num_beams=params.num_beams,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_token_id=list(params.stop_token_ids) or None,
        pad_token_id=0,
    )
    return list(got[0, len(prompt) :].tolist())


@pytest.mark.parametrize("num_beams", [2, 4, 7])
def test_the_likeliest_answer_is_that_of_generate(model: Any, num_beams: int) -> None:
    rng = random.Random(num_beams)
    reasons: list[FinishReason] = []
    kinds = itertools.product((-1.0, 0.0, 0.5, 1.0, 2.0), (False, True, "never"))
    for i, (penalty, early) in enumerate(kinds):
        params = SamplingParams(
            max_tokens=MAX_TOKENS,
            min_tokens=5 * (i % 2),
            stop_token_ids=tuple(STOPS),
            num_beams=num_beams,
            length_penalty=penalty,
            early_stopping=early,  # type: ignore[arg-type]
        )
        prompt = [rng.randrange(3, 199) for _ in range(rng.choice([1, 4, 19]))]
        ids, reason = search(model, prompt, params)
        assert ids == wanted(model, prompt, params), params
        assert (reason is FinishReason.STOP) == (ids[-1] in STOPS)
        reasons.append(reason)
    assert set(reasons) == {FinishReason.STOP, FinishReason.LENGTH}


def group_of(num_beams: int, stops: frozenset[int] = frozenset(), **more: Any) -> BeamGroup:
    params = SamplingParams(num_beams=num_beams, **more)
    return BeamGroup(Sequence(Request(0, 0, (1, 2), params, 0)), 5, stops)


def test_the_first_child_stays_and_the_others_take_over() -> None:
    group = group_of(3)
    leader = group.leader
    group.report(leader, told((5, -1.0), (6, -2.0), (7, -3.0), (8, -9.0)))
    forks = group.advance()
    first, second, third = group.sequences
    assert first is leader
    assert forks == [(second, leader), (third, leader)]
    assert [s.output_ids for s in group.sequences] == [[5], [6], [7]]
    group.report(third, told((1, -0.1), (2, -0.2)))
    group.report(first, told((3, -9.0), (4, -9.5)))
    assert not group.is_complete
    group.report(second, told((9, -0.5), (8, -8.0)))
    assert group.is_complete
    # Of -2.5, -3.1, -3.2 none descends from the first: its sequence becomes the third's second.
    assert group.advance() == [(leader, third)]
    assert group.sequences == [second, third, leader]
    assert [s.output_ids for s in group.sequences] == [[6, 9], [7, 1], [7, 2]]
    assert all(s.high_water == 3 for s in group.sequences)


def test_only_the_best_candidates_can_end_an_answer() -> None:
    group = group_of(2, frozenset({9}))
    group.report(group.leader, told((5, -1.0), (6, -2.0), (9, -3.0), (8, -4.0)))
    group.advance()
    assert not group.finished
    for sequence in list(group.sequences):
        group.report(sequence, told((9, -0.5), (7, -1.0), (8, -2.0), (6, -3.0)))
    group.advance()
    assert [(h.token_ids, h.score) for h in group.finished] == [((5, 9), -0.75)]


def test_an_answer_to_come_has_to_be_worse_or_search_goes_on() -> None:
    ended = {}
    for early in (False, True, "never"):
        group = group_of(2, frozenset({9}), early_stopping=early)
        group.report(group.leader, told((9, -1.0), (5, -1.1), (6, -1.6), (8, -6.0)))
        group.advance()
        for sequence in list(group.sequences):
            group.report(sequence, told((9, -0.4), (7, -2.0), (8, -2.1), (6, -2.2)))
        group.advance()
        assert len(group.finished) == 2
        ended[early] = group.ended
    # The likeliest has -3.1, the worse answer -1.0: at two tokens hopeless, at five not.
    assert ended == {False: True, True: True, "never": False}


@pytest.mark.parametrize(
    "values", [{"temperature": 0.5}, {"stop": ("x",)}, {"early_stopping": "perhaps"}]
)
def test_what_beams_can_not_do_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(num_beams=2, **values)
    with pytest.raises(ValueError, match="num_beams"):
        SamplingParams(num_beams=0)
