"""Each row is in one place, whatever workers do: a model beside the real thing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batchrun.engine.core import Request, SamplingParams
from batchrun.fleet.dispatch import Dispatch
from batchrun.fleet.messages import Limits, Work
from batchrun.jobs.journal.results import Partial
from batchrun.runner.planner import Waiting
from batchrun.runner.reader import CRASHES

PARAMS = SamplingParams(max_tokens=9)


def row(number: int, prompt: tuple[int, ...] = (1, 2, 3), sample: int = 0) -> Waiting:
    return Waiting.of(Request(number, sample, prompt, PARAMS, 0))


def limits(seqs: int = 4) -> Limits:
    return Limits(100, seqs, 100)


def numbers(work: Work | None) -> list[int]:
    return [] if work is None else [r.rest.row for r in work.rows]


class Rows(RuleBasedStateMachine):
    """Rows are put, taken, returned, lost and ended at random."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatch = Dispatch({0: 1})
        self.at: dict[int, set[tuple[int, int]]] = {}  # worker -> rows
        self.waiting = set[tuple[int, int]]()
        self.ended = set[tuple[int, int]]()
        self.crashes = {0: 1}
        self.known: dict[tuple[int, int], int] = {}  # tokens that a worker last spoke of
        self.count = self.workers = 0

    @rule(samples=st.integers(1, 3), kind=st.integers(0, 3))
    def put(self, samples: int, kind: int) -> None:
        for sample in range(samples):
            prompt = (kind,) * 20 + (self.count,)
            self.dispatch.put(row(self.count, prompt, sample))
            self.waiting.add((self.count, sample))
        self.count += 1

    @rule(seqs=st.integers(1, 5))
    def join(self, seqs: int) -> None:
        self.dispatch.join(self.workers, limits(seqs))
        self.at[self.workers] = set()
        self.workers += 1

    @precondition(lambda self: self.at)
    @rule(data=st.data())
    def take(self, data: Any) -> None:
        worker = data.draw(st.sampled_from(sorted(self.at)))
        work = self.dispatch.take(worker)
        if work is None:
            return
        taken = {(r.rest.row, r.rest.sample) for r in work.rows}
        assert len(taken) == len(work.rows)
        assert taken <= self.waiting
        if work.alone:
            assert not self.at[worker]
            assert len(taken) == 1
        suspects = {number for number, _ in taken} & self.crashes.keys()
        assert bool(suspects) == work.alone
        for r in work.rows:  # where it was when its last worker spoke of it, or further
            key = r.rest.row, r.rest.sample
            assert len(r.rest.generated_ids) == self.known.get(key, 0)
        self.waiting -= taken
        self.at[worker] |= taken

    def _pick(self, data: Any) -> tuple[int, list[tuple[int, int]]]:
        worker = data.draw(st.sampled_from(sorted(self.at)))
        some = sorted(self.at[worker])
        return worker, data.draw(st.lists(st.sampled_from(some), unique=True)) if some else []

    @precondition(lambda self: self.at)
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        worker, keys = self._pick(data)
        for key in keys:
            found = self.dispatch.end(worker, key)
            assert found is not None
            assert (found.rest.row, found.rest.sample) == key
            self.at[worker].remove(key)
            self.ended.add(key)

    @precondition(lambda self: self.ended and self.workers)
    @rule(data=st.data())
    def end_again(self, data: Any) -> None:
        """What a worker says of a row that is not its own counts for nothing."""
        worker = data.draw(st.integers(0, self.workers - 1))
        key = data.draw(st.sampled_from(sorted(self.ended)))
        assert self.dispatch.end(worker, key) is None

    @precondition(lambda self: self.at)
    @rule(data=st.data())
    def begin(self, data: Any) -> None:
        worker, keys = self._pick(data)
        partials = []
        for key in keys:
            self.known[key] = self.known.get(key, 0) + 1
            partials.append(Partial(*key, (7,) * self.known[key]))
        self.dispatch.note_begun(worker, [*partials, Partial(9999, 0, (1,))])
        assert (9999, 0) not in {(p.row, p.sample) for p in self.dispatch.partials()}

    @precondition(lambda self: self.at)
    @rule(data=st.data())
    def give_back(self, data: Any) -> None:
        worker, keys = self._pick(data)
        back = []
        for key in keys:
            self.known[key] = self.known.get(key, 0) + 1
            request = Request(*key, (3,) * 20, PARAMS, 0, (7,) * self.known[key])
            back.append(Waiting.of(request))
        self.dispatch.take_back(worker, [*back, row(9999)])
        self.at[worker] -= set(keys)
        self.waiting |= set(keys)

    @precondition(lambda self: self.at)
    @rule(data=st.data(), crashed=st.booleans())
    def lose(self, data: Any, crashed: bool) -> None:
        worker, keys = self._pick(data)
        suspects = {number for number, _ in keys} if crashed else set[int]()
        lost = self.dispatch.lose(worker, [*suspects, 9999])
        assert set(lost.crashed) == suspects
        for number in suspects:
            self.crashes[number] = self.crashes.get(number, 0) + 1
        self.waiting |= self.at.pop(worker)
        over = {key for key in self.waiting if self.crashes.get(key[0], 0) >= CRASHES}
        assert {(r.rest.row, r.rest.sample) for r in lost.ended} == over
        self.waiting -= over
        self.ended |= over

    @rule()
    def ask(self) -> None:
        for worker, count in self.dispatch.releases():
            assert 1 <= count <= len(self.at[worker])

    @invariant()
    def agrees(self) -> None:
        outstanding = sum(map(len, self.at.values()))
        assert self.dispatch.num_outstanding == outstanding
        assert self.dispatch.is_empty == (not self.waiting and not outstanding)
        for worker, keys in self.at.items():
            assert self.dispatch.is_idle(worker) == (not keys)

    def teardown(self) -> None:
        """Whatever happened, one worker can end all of it."""
        self.dispatch.is_complete = True
        for worker in [*self.at]:
            self.waiting |= self.at.pop(worker)
            over = self.dispatch.lose(worker).ended
            self.waiting -= {(r.rest.row, r.rest.sample) for r in over}
        self.dispatch.join(self.workers, limits(3))
        while (work := self.dispatch.take(self.workers)) is not None:
            for r in work.rows:
                key = r.rest.row, r.rest.sample
                self.waiting.remove(key)
                assert self.dispatch.end(self.workers, key) is not None
        assert not self.waiting
        assert self.dispatch.is_empty


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def of(kind: int, number: int) -> Waiting:
    return row(number, (kind,) * 32 + (number,))


def test_what_begins_alike_stays_together_while_there_is_other_work() -> None:
    dispatch = Dispatch({})
    for worker in (0, 1):
        dispatch.join(worker, limits(12))  # and 8 ahead
    for number in range(90):
        dispatch.put(of(number // 30, number))
    assert numbers(dispatch.take(0)) == [*range(20)]
    assert numbers(dispatch.take(1)) == [*range(30, 50)]
    for number in range(10):
        dispatch.end(0, (number, 0))
    for number in range(30, 40):
        dispatch.end(1, (number, 0))
    assert numbers(dispatch.take(1)) == [*range(50, 60)]
    assert numbers(dispatch.take(0)) == [*range(20, 30)]
    for number in range(10, 30):
        dispatch.end(0, (number, 0))
    for number in range(40, 60):
        dispatch.end(1, (number, 0))
    assert numbers(dispatch.take(0)) == [*range(60, 80)]  # the last one
    assert sorted(numbers(dispatch.take(1))) == [*range(80, 90)]


def test_a_group_that_all_rows_belong_to_is_shared() -> None:
    dispatch = Dispatch({})
    for worker in range(3):
        dispatch.join(worker, limits(12))
    for number in range(50):
        dispatch.put(of(0, number))
    taken = [numbers(dispatch.take(worker)) for worker in range(3)]
    assert sorted(n for each in taken for n in each) == [*range(50)]
    assert min(map(len, taken)) == 10


def test_rows_that_share_less_than_half_are_no_group() -> None:
    dispatch = Dispatch({})
    for worker in (0, 1):
        dispatch.join(worker, limits(1))
    for number in range(4):
        dispatch.put(row(number, (*range(20), *range(100 * number, 100 * number + 30))))
    assert numbers(dispatch.take(0))[0] == 0
    dispatch.join(2, limits(1))
    assert dispatch.take(2) is None


def test_those_with_nothing_get_half_of_what_waits_elsewhere() -> None:
    dispatch = Dispatch({})
    dispatch.join(0, limits(8))
    for number in range(12):
        dispatch.put(row(number))
    assert len(numbers(dispatch.take(0))) == 12
    assert [*dispatch.releases()] == []  # there are no others
    dispatch.join(1, limits(8))
    assert [*dispatch.releases()] == []  # more rows may come
    dispatch.is_complete = True
    assert [*dispatch.releases()] == [(0, 6)]
    assert [*dispatch.releases()] == []  # it is asked only once
    moved = replace(row(3).rest, generated_ids=(5, 6))
    dispatch.take_back(0, [row(3)._replace(rest=moved)])
    work = dispatch.take(1)
    assert numbers(work) == [3]
    assert work is not None
    assert work.rows[0].request().generated_ids == (5, 6)
    assert [*dispatch.releases()] == [(0, 5)]


def test_of_the_last_rows_each_gets_its_share() -> None:
    """Also of those that come back: else the one that gave them would take them again."""
    dispatch = Dispatch({})
    for worker in (0, 1):
        dispatch.join(worker, limits(40))
    for number in range(30):
        dispatch.put(row(number))
    dispatch.is_complete = True
    assert len(numbers(dispatch.take(0))) == 15
    dispatch.take_back(0, [row(number) for number in range(10)])
    assert len(numbers(dispatch.take(0))) == 10  # its share again
    assert len(numbers(dispatch.take(1))) == 15


def test_a_worker_that_is_about_to_come_has_its_share_waiting() -> None:
    dispatch = Dispatch({})
    dispatch.join(0, limits(40))
    dispatch.num_coming = 1
    for number in range(30):
        dispatch.put(row(number))
    dispatch.is_complete = True
    assert len(numbers(dispatch.take(0))) == 15
    for number in range(15):
        dispatch.end(0, (number, 0))
    assert len(numbers(dispatch.take(0))) == 8  # until it comes, the first goes on
    ended = set(range(15))
    while not dispatch.is_empty:
        for number in range(30):
            if dispatch.end(0, (number, 0)) is not None:
                ended.add(number)
        dispatch.take(0)
    assert ended == set(range(30))


@pytest.mark.parametrize("alone", [0, 1])
def test_suspects_are_alone_and_the_others_work_on(alone: int) -> None:
    dispatch = Dispatch({})
    for worker in (0, 1):
        dispatch.join(worker, limits(2))
    for number in range(40):
        dispatch.put(row(number))
    for worker in (0, 1):
        dispatch.take(worker)
    lost = dispatch.lose(alone, [10 * alone])
    assert lost.crashed == (10 * alone,)
    dispatch.join(2, limits(2))
    work = dispatch.take(2)
    assert work is not None
    assert work.alone
    assert numbers(work) == [10 * alone]
    assert dispatch.take(2) is None
    dispatch.end(1 - alone, (10 * (1 - alone), 0))
    other = dispatch.take(1 - alone)
    assert other is not None
    assert not other.alone


def test_who_has_computed_the_suspects_takes_over_rows_like_others() -> None:
    dispatch = Dispatch({0: 1})
    for worker in (0, 1):
        dispatch.join(worker, limits(20))
    for number in range(21):
        dispatch.put(row(number))
    assert numbers(dispatch.take(0)) == [0]
    assert len(numbers(dispatch.take(1))) == 20
    dispatch.is_complete = True
    assert [*dispatch.releases()] == []  # it has a suspect
    dispatch.end(0, (0, 0))
    assert [*dispatch.releases()] == [(1, 10)]
