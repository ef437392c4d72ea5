"""The order of a file's rows: nothing lost, prefixes together, long rows early, memory flat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.prefixes import BLOCK
from batchrun.runner import planner
from batchrun.runner.planner import Planner, Waiting, common_blocks, order

Ids = tuple[int, ...]


def block(number: int) -> Ids:
    return tuple(range(number * 1000, number * 1000 + BLOCK))


def packed(ids: Ids, *, row: int = 0, max_tokens: int = 8) -> Waiting:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Waiting.of(Request(row, 1, ids, params, 7, (3, 4), -0.5))


def ordered(prompts: Sequence[Ids], lengths: Sequence[float] | None = None) -> list[int]:
    return order([packed(ids).prompt for ids in prompts], lengths or [1.0] * len(prompts))


# Prompts of up to five blocks out of three, and a tail shorter than a block: trees of many levels.
prompts = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=5), st.lists(st.integers(0, 2), max_size=3)).map(
        lambda p: (*(t for b in p[0] for t in block(b)), *p[1])
    ),
    max_size=40,
)


@given(prompts, st.data())
@settings(max_examples=200, deadline=None)
def test_each_prefix_is_left_once(found: list[Ids], data: st.DataObject) -> None:
    lengths = data.draw(
        st.lists(st.integers(1, 5), min_size=len(found), max_size=len(found)), "lengths"
    )
    order_ = ordered(found, [float(n) for n in lengths])
    assert sorted(order_) == list(range(len(found)))
    for depth in range(1, 6):
        left = set[Ids]()
        previous = None
        for i in order_:
            prefix = found[i][: depth * BLOCK]
            whole = prefix if len(prefix) == depth * BLOCK else None
            if previous is not None and whole != previous:
                left.add(previous)
            assert whole not in left, "a prefix that was left came back"
            previous = whole


@given(prompts)
@settings(max_examples=100, deadline=None)
def test_neighbours_have_most_in_common_of_all_before(found: list[Ids]) -> None:
    data = [packed(ids).prompt for ids in found]
    order_ = order(data, [1.0] * len(data))
    for place in range(1, len(order_)):
        shared = [common_blocks(data[order_[place]], data[i]) for i in order_[:place]]
        assert shared[-1] == max(shared)


def test_a_file_without_anything_to_win_stays_as_it_is() -> None:
    found = [(900 - i, 5, 6) for i in range(100)]
    assert ordered(found) == list(range(100))


def test_long_rows_come_first_and_so_does_what_shares_with_them() -> None:
    a, b = block(1), block(2)
    found = [(5,), (*a, 1), (*b, 1), (*a, 2), (6,), (*b, 2)]
    #                                 long one of a        longest of all, of b
    assert ordered(found, [9, 1, 1, 10, 3, 30]) == [5, 2, 3, 1, 0, 4]


def test_common_blocks() -> None:
    a = packed((*block(1), *block(2), 7)).prompt
    assert common_blocks(a, a) == 2
    assert common_blocks(a, packed((*block(1), *block(3))).prompt) == 1
    assert common_blocks(a, packed((*block(1), *block(2)[:-1], 0)).prompt) == 1
    assert common_blocks(a, packed(block(2)).prompt) == 0
    assert common_blocks(a, b"") == 0


@given(st.lists(st.integers(0, 2**31 - 1), max_size=50))
def test_a_request_comes_back_as_it_was(ids: list[int]) -> None:
    request = Request(3, 1, tuple(ids), SamplingParams(), 7, (3, 4), -0.5)
    assert Waiting.of(request).request() == request


def plan(rows: int, *, full_after: int | None = None) -> tuple[list[int], list[int]]:
    """Rows in planned order, and how many had been read as each came."""
    read = 0

    def source() -> Iterator[Waiting]:
        nonlocal read
        for i in range(rows):
            read += 1
            yield packed((i % 7, i), row=i)

    found, at = [], []
    for waiting in Planner().planned(
        source(), lambda: full_after is not None and len(found) >= full_after
    ):
        found.append(waiting.rest.row)
        at.append(read)
    return found, at


def test_no_more_is_read_than_is_planned_and_nothing_is_lost() -> None:
    found, at = plan(50_000)
    assert sorted(found) == list(range(50_000))
    assert at[0] == 513
    # Whoever takes the rows is quick, slow, or so slow that all of them are planned at once.
    for after in (None, 0, 10_000):
        _, at = plan(50_000, full_after=after)
        assert max(read - place for place, read in enumerate(at)) <= 16_384 + 8_192
    assert [len(plan(n)[0]) for n in (0, 1, 511, 512, 513)] == [0, 1, 511, 512, 513]


def test_a_window_of_long_prompts_is_short(monkeypatch) -> None:
    monkeypatch.setattr(planner, "_TOKENS", 200)
    rows = [packed(tuple(range(50)), row=i) for i in range(9)]
    read = iter(rows)
    assert next(Planner().planned(read, lambda: False)).rest.row == 0
    assert len(list(read)) == 6


def test_a_prefix_that_is_open_is_finished_though_longer_rows_come() -> None:
    a, b = block(1), block(2)
    first = [packed((*a, i), row=i, max_tokens=10) for i in range(planner._FIRST)]
    later = [packed((*b, i), row=1000 + i, max_tokens=90) for i in range(600)]
    more = [packed((*a, 9999), row=5000, max_tokens=5)]
    taken: list[int] = []
    for waiting in Planner().planned([*first, *later, *more], lambda: len(taken) >= 100):
        taken.append(waiting.rest.row)
    assert taken.index(5000) < min(taken.index(1000 + i) for i in range(600))
    assert sorted(taken) == sorted(w.rest.row for w in (*first, *later, *more))


def test_answers_teach_what_to_expect() -> None:
    ours = Planner()
    free, fixed = SamplingParams(max_tokens=100), SamplingParams(max_tokens=50, ignore_eos=True)
    assert ours.expected(free) == 100
    for _ in range(100):
        ours.learn(Request(0, 0, (1,), free, 0), 10)
        ours.learn(Request(0, 0, (1,), fixed, 0), 50)
    assert 10 <= ours.expected(free) < 11
    assert ours.expected(fixed) == 50
    assert ours.expected(SamplingParams(max_tokens=100, min_tokens=90)) == 90
