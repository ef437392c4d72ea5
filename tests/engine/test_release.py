"""Rows that leave one engine and go on in another have the same answers."""

from __future__ import annotations

import random
from typing import Any

import pytest

from batchrun.engine.core import Request, SamplingParams
from tests.pairs import part
from tests.parity.runner import rig, run
from tests.parity.test_generate import loaded, prompts

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.9, "top_p": 0.9, "scored": True, "logprobs": 2},
    {"presence_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": 5},
    {"num_beams": 3},
    {"ignore_eos": True, "stop": ("qx",)},
]
EACH = [SamplingParams(**{"max_tokens": 24, **KINDS[i % 4]}) for i in range(len(prompts()))]


def answers(completions: Any) -> dict[int, tuple[Any, ...]]:
    return {
        c.request.row: (
            c.token_ids,
            c.finish_reason,
            len(c.logprobs),
            round(c.logprob * c.request.params.scored, 2),
        )
        for c in completions
    }


@pytest.mark.parametrize(("seed", "lag"), part(2, range(4), [0, 1]))
def test_rows_may_move_at_any_moment(lag: int, seed: int) -> None:
    with rig(loaded("llama")) as r:
        want = answers(run(r, prompts(), EACH, seed=3))
    draw, moved, found = random.Random(seed), 0, []
    with (
        rig(loaded("llama"), lag=lag, max_num_batched_tokens=30) as one,
        rig(loaded("llama"), lag=lag, max_num_seqs=2) as other,
    ):
        engines = one.engine, other.engine
        for row, (ids, params) in enumerate(zip(prompts(), EACH, strict=True)):
            engines[0].add(Request(row, 0, tuple(ids), params, 3))
        while any(engine.has_work for engine in engines):
            for engine in engines:
                found += engine.step() if engine.has_work else []
            if draw.random() < 0.3:
                source, to = draw.sample(engines, 2)
                released = source.release(draw.randint(1, 4))
                assert all(request.params.num_beams == 1 for request, _ in released)
                moved += sum(bool(request.generated_ids) for request, _ in released)
                for request, _ in released:
                    to.add(request)
        assert moved
    assert answers(found) == want
    assert len(found) == len(want)


def test_those_that_wait_go_first_and_those_about_to_end_stay() -> None:
    with rig(loaded("llama"), max_num_seqs=2) as r:
        for row in range(4):
            most = 40 if row == 0 else 3
            params = SamplingParams(max_tokens=most, ignore_eos=True)
            r.engine.add(Request(row, 0, (5, 6, 7), params, 0))
        r.engine.step()
        r.engine.step()
        assert [(q.row, admitted) for q, admitted in r.engine.release(1)] == [(3, False)]
        released = r.engine.release(9)
        assert [(q.row, admitted) for q, admitted in released] == [(2, False), (0, True)]
        assert len(released[1][0].generated_ids) == 2
        assert [c.request.row for c in _rest(r.engine)] == [1]
        assert r.engine.release(9) == []


def _rest(engine: Any) -> list[Any]:
    found = []
    while engine.has_work:
        found += engine.step()
    return found
