"""What planning saved, as told, against what it did."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.prefixes import BLOCK, common_length
from batchrun.estimate.savings import _OPEN, BatchModel, Saved, Savings, _Recent
from batchrun.runner.planner import Waiting
from benchmarks.plancounts import count


def row(number: int, prompt: tuple[int, ...] = (1, 2, 3)) -> Waiting:
    return Waiting.of(Request(number, 0, prompt, SamplingParams(), 0))


@pytest.mark.parametrize(("name", "rows"), [("documents", 1500), ("long-tail", 800)])
def test_what_is_told_is_about_what_the_engine_computes(name: str, rows: int) -> None:
    planned, unplanned = (count(name, rows, planned=planned) for planned in (True, False))
    for told, computed in zip(planned["saved"], ("computed", "steps"), strict=True):
        saved = unplanned[computed] - planned[computed]
        assert told == pytest.approx(saved, abs=0.1 * unplanned[computed])
    assert max(planned["saved"]) > 100


@given(st.lists(st.lists(st.integers(1, 2), max_size=4), max_size=12), st.integers(1, 5))
def test_recent_prompts_share_what_a_slow_search_finds(
    prompts: list[list[int]], window: int
) -> None:
    packed = [tuple(t for token in p for t in (token,) * BLOCK) for p in prompts]
    recent = _Recent(window)
    for i, ids in enumerate(packed):
        before = packed[max(0, i - window) : i]
        want = max((common_length(ids, other, BLOCK) for other in before), default=0)
        assert recent.shared(row(i, ids)) == want


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 5))
def test_slots_count_as_list_scheduling_does(lengths: list[int], places: int) -> None:
    ends = [0.0] * places
    slots = BatchModel(places, 1 << 40)
    for length in lengths:
        slots.add(0, length)
        ends[ends.index(min(ends))] += length
    assert slots.steps == pytest.approx(max(ends))
    assert slots.tail == pytest.approx(max(ends) - sorted(ends)[(places - 1) // 2])


def test_a_long_row_at_the_end_costs_a_tail() -> None:
    savings, lengths = Savings(2, 1000, share=True), [10] * 10 + [50]
    for number in range(11):
        savings.read(row(number), 1)
    for number in reversed(range(11)):
        savings.put(row(number), 1)
        assert savings.saved() == Saved()  # while rows are under way nothing is told
    for number, length in enumerate(lengths):
        savings.end(number, 0, length)
    found = savings.saved()
    assert found.steps == pytest.approx(100 / 80 - 1, abs=0.02)
    assert found.tail == pytest.approx((50 - 10) / 80, abs=0.02)


def test_equal_rows_are_saved_and_rows_that_wait_long_are_not_kept() -> None:
    savings, rows = Savings(1, 1000, share=True), _OPEN + 10
    for number in range(rows):
        savings.read(row(number, tuple(range(32))), 7)
    savings.put(row(0, tuple(range(32))), 7)
    assert len(savings._file.open) == _OPEN
    assert savings._file.slots.steps == pytest.approx(10 * 7, rel=0.1)  # as long as was expected
    for number in range(rows):
        savings.end(number, 0, 5)
    saved = savings.saved()
    assert saved.prompt_tokens == rows - 1  # of each the last token is computed in any case
    assert saved.steps == pytest.approx(rows, rel=0.05)


def test_where_nothing_is_shared_no_prompt_is_saved() -> None:
    savings = Savings(2, 1000, share=False)
    for number in range(4):
        savings.read(row(number, tuple(range(64))), 1)
        savings.put(row(number, tuple(range(64))), 1)
        savings.end(number, 0, 3)
    assert savings.saved() == Saved(0, 0.0, 0.0)
    assert savings._file.prompt_tokens == 4 * 64
