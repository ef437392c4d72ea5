"""Scoring passes over real memory: each token is scored once, whatever the steps look like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from batchrun.engine.core import FinishReason, SamplingParams, Segment
from batchrun.engine.scores import Scoring, ScoringPass
from tests.engine import echo
from tests.engine.test_scheduler import MAX_LEN, Rig

Make = Callable[..., Rig]


@pytest.fixture
def make_rig() -> Iterator[Make]:
    rigs: list[Rig] = []

    def make(**limits: Any) -> Rig:
        rigs.append(Rig(**{"seqs": 4, "batched": 64, "pages": None, **limits}))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def text(prompt: list[int], *ids: int, labels: tuple[int, ...] = ()) -> Scoring:
    return Scoring(ids, len(prompt), labels)


def steps_of(rig: Rig) -> list[list[Segment]]:
    """The segments of each step from now on."""
    steps: list[list[Segment]] = []
    plan = rig.scheduler.plan

    def spy() -> Any:
        made = plan()
        steps.append(list(made.segments))
        return made

    rig.scheduler.plan = spy  # type: ignore[method-assign]
    return steps


def num_targets(steps: list[list[Segment]]) -> int:
    return sum(len(wanted) for step in steps for s in step for wanted in s.targets)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("batched", [1, 3, 7, 64])
def test_a_text_is_scored_and_nothing_is_generated(make_rig: Make, batched: int, lag: int) -> None:
    rig = make_rig(batched=batched, lag=lag)
    for row in range(5):
        prompt = [row, *range(20 * (row % 2))]
        rig.add(prompt, 0, text(prompt, 7, 8, 900 + row))
    rig.drain()
    rig.verify()
    assert {c.finish_reason for c in rig.done.values()} == {FinishReason.SCORED}
    assert rig.engine.stats.generated_tokens == 0
    assert all(len(c.scores[0]) == 3 for c in rig.done.values() if c.scores)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_step_has_no_more_logits_than_its_limit(make_rig: Make, most: int, lag: int) -> None:
    """However many rows are scored at once; rows that generate are not held up."""
    rig = make_rig(seqs=6, scored=most, lag=lag)
    rig.add([500, 501], 20)
    rig.step()
    steps = steps_of(rig)
    for row in range(5):
        rig.add([row, 1, 2, 3], 0, Scoring(first=1, labels=(4, 5)))
    rig.drain()
    rig.verify()
    assert max(sum(len(s.targets) for s in step) for step in steps) == most
    assert num_targets(steps) == 5 * (3 + 2)
    decoding = [any(s.sampled and s.length == 1 for s in step) for step in steps if step]
    assert all(decoding[:19])


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_that_were_preempted_score_no_token_twice(make_rig: Make, lag: int) -> None:
    rig = make_rig(seqs=6, pages=12, scored=4, lag=lag)
    steps = steps_of(rig)
    for row in range(6):
        prompt = [row] * 9
        rig.add(prompt, 25 if row < 2 else 0, text(prompt, *range(30)))
    rig.drain()
    rig.verify()
    assert rig.scheduler.num_preemptions > 0
    assert num_targets(steps) == 6 * 30
    assert all(not segment.targets or not segment.sampled for step in steps for segment in step)


def test_a_prompt_is_shared_up_to_the_first_token_that_is_scored(make_rig: Make) -> None:
    rig = make_rig(seqs=2, batched=200)
    for row in range(8):
        rig.add([*range(40)], 0, text([0] * 40, 100 + row, 7, 8))
    rig.drain()
    rig.verify()
    # The prompt's last token says how likely the text's first one is; the text's last says nothing.
    assert rig.engine.stats.prefill_tokens == 39 + 8 * 3
    whole = make_rig(seqs=2)
    for row in range(3):
        whole.add([*range(40), 100 + row], 0, Scoring(first=1))
    whole.drain()
    whole.verify()
    assert whole.scheduler.stays.num_shared_tokens == 0


def test_others_share_what_a_pass_computed(make_rig: Make) -> None:
    rig = make_rig(seqs=1)
    rig.add([*range(20)], 0, text([0] * 20, *range(20, 40)))
    rig.add([*range(35)], 3)
    rig.drain()
    rig.verify()
    assert rig.scheduler.stays.num_shared_tokens == 34


@pytest.mark.parametrize("first", [1, 40])
def test_what_is_generated_after_a_pass_shares_its_prompt(make_rig: Make, first: int) -> None:
    """Even where many others wait: it goes before them."""
    rig = make_rig(seqs=1)
    rig.add([*range(40)], 5, Scoring((7, 8) if first > 1 else (), first, (3,)))
    for row in range(40):
        rig.add([500 + row] * 3, 2)
    order: list[int] = []
    step = rig.engine.executor.launch
    rig.engine.executor.launch = lambda plan: (
        order.extend(  # type: ignore[method-assign]
            n.request.row for n in plan.new
        )
        or step(plan)
    )
    rig.drain()
    rig.verify()
    assert order[:3] == [0, 0, 1]
    assert rig.scheduler.stays.num_shared_tokens == 39
    assert rig.done[0].scores is not None
    assert len(rig.done[0].token_ids) == 5


def test_samples_of_a_row_are_scored_once(make_rig: Make) -> None:
    rig = make_rig(seqs=2)
    steps = steps_of(rig)
    for _ in range(6):
        rig.add([1, 2, 3], 4, text([1, 2, 3], 5, 6))
    rig.add([1, 2, 3], 0, text([1, 2, 3], 5, 7))
    assert rig.engine.load()[1] == 7
    rig.drain()
    rig.verify()
    assert num_targets(steps) == 2 + 2
    rig.add([1, 2, 3], 0, text([1, 2, 3], 5, 6))  # another pass: the first is over
    rig.drain()
    rig.verify()
    assert num_targets(steps) == 6


def test_where_nothing_is_to_compute_nothing_is_computed(make_rig: Make) -> None:
    rig = make_rig()
    rig.add([1, 2], 0, text([1, 2]))
    rig.add([3], 0, Scoring(first=1))
    rig.add([4], 2, Scoring(first=1))
    assert rig.engine.has_work
    rig.drain()
    rig.verify()
    assert [rig.done[row].scores for row in range(3)] == [((), ())] * 3
    assert rig.done[0].finish_reason is FinishReason.SCORED
    assert rig.engine.stats.prefill_tokens == 1


def test_a_row_that_does_not_fit_is_its_own_error(make_rig: Make) -> None:
    rig = make_rig(pages=5)
    rig.add([1] * 30, 0, text([1] * 30, *[2] * 31))  # one token too many for the context
    rig.add([1] * 30, 2, text([1] * 30, *[2] * 30))  # for the memory
    rig.add([1] * 3, 2, text([1] * 3, 2))
    rig.add([1] * MAX_LEN, 0, Scoring(first=MAX_LEN, labels=(1,)))
    rig.drain()
    rig.verify()
    assert [rig.done[row].error_kind for row in range(4)] == [
        *("prompt_too_long", "kv_budget", None, "prompt_too_long")
    ]
    assert f"have {MAX_LEN + 1} tokens, and the context holds {MAX_LEN}" in rig.done[0].error
    assert rig.done[0].scores is None


def test_a_text_may_fill_the_context(make_rig: Make) -> None:
    rig = make_rig()
    rig.add([1] * 30, 0, text([1] * 30, *[2] * 30))
    rig.add([*range(MAX_LEN)], 0, Scoring(first=1))
    rig.drain()
    rig.verify()
    assert [c.error for c in rig.done.values()] == [None, None]


@pytest.mark.parametrize("shared", [False, True])
def test_logits_that_are_not_finite_fail_all_rows_of_the_pass(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Where memory is shared it is tried again alone, as another row may be the cause."""
    rig, right = make_rig(), echo.score_of
    steps = steps_of(rig)

    def score_of(ids: Any, token: int) -> float:
        return float("nan") if token == 66 else right(ids, token)

    monkeypatch.setattr(echo, "score_of", score_of)
    if shared:
        rig.add([*range(30)], 9)
        rig.step()
    for _ in range(2):
        rig.add([*range(30)], 3, text([0] * 30, 5, 66, 7))
    rig.add([*range(29)], 0, text([0] * 29, 5))
    rig.drain()
    bad, good = rig.done[shared], rig.done[2 + shared]
    assert bad.error_kind == rig.done[1 + shared].error_kind == "not_finite"
    assert "after 31 tokens of the prompt and the text to score" in bad.error
    assert bad.scores is None
    assert good.scores == ((right([*range(29)], 5),), ())
    asked = [wanted for step in steps for s in step for wanted in s.targets]
    assert asked.count((66,)) == 1 + shared
    assert rig.arena.num_open == 0


def test_nothing_may_be_generated_only_where_known_text_is_scored() -> None:
    assert SamplingParams(max_tokens=0, scoring=True).max_tokens == 0
    with pytest.raises(ValueError, match=r"max_tokens must be at least 1 .*, not 0"):
        SamplingParams(max_tokens=0)
    with pytest.raises(ValueError, match="max_tokens must be 0 or more, not -1"):
        SamplingParams(max_tokens=-1, scoring=True)
    with pytest.raises(ValueError, match="num_beams must be 1 where known text is scored"):
        SamplingParams(num_beams=2, scoring=True)


def test_what_a_pass_wants_of_each_token() -> None:
    made = ScoringPass((1, 2, 3), Scoring((7, 8), 3, (5, 6)))
    assert made.token_ids == (1, 2, 3, 7)
    assert made.targets(0, 4) == ((7, 5, 6), (8,))
    assert made.targets(0, 2) == ()
    assert made.fitting(0, 4, 1) == 3
    assert made.take(made.targets(0, 3), iter([-1.0, -2.0, -3.0]))
    assert made.targets(0, 4) == ((8,),)
    assert made.take(made.targets(3, 1), iter([-4.0]))
    assert made.is_complete
    assert made.scores == ((-1.0, -4.0), (-2.0, -3.0))
    whole = ScoringPass((1, 2, 3), Scoring(first=1, labels=(9,)))
    assert whole.targets(0, 3) == ((2,), (3,), (9,))
    assert ScoringPass((1, 2, 3), Scoring(first=1)).token_ids == (1, 2)
