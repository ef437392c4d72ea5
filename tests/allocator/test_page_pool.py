"""The pool: budget, references, fences, and that nothing is lost or given twice."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from memory_twins import PAGE, Wrapped, examples, open_memory

from batchrun.allocator.pages import PagePool
from batchrun.allocator.vmm import AllocatorError, Handle, OutOfPages, VirtualMemory


class Full(Wrapped):
    """A machine with room for so many pages."""

    def __init__(self, memory: VirtualMemory, room: int) -> None:
        super().__init__(memory)
        self.room = room
        self.refusals = 0

    def create(self, count: int) -> list[Handle]:
        if len(self.ledger.mapped_at) + count > self.room:
            self.refusals += 1
            raise OutOfPages("the machine is full")
        return self.memory.create(count)


def test_acquire_is_all_or_nothing(memory: VirtualMemory) -> None:
    pool = PagePool(memory, budget=5 * PAGE)
    held = pool.acquire(3)
    with pytest.raises(OutOfPages, match=rf"3 more pages .* {5 * PAGE} bytes has room for 2"):
        pool.acquire(3)
    assert (pool.in_use, pool.free, pool.created) == (3, 0, 3)
    assert len(set(held + pool.acquire(2))) == 5


def test_a_budget_that_moves_is_asked_once_after_each_step(memory: VirtualMemory) -> None:
    budget, asked = 2 * PAGE, 0

    def measure() -> int:
        nonlocal asked
        asked += 1
        return budget

    pool = PagePool(memory, budget=measure)
    pool.acquire(2)
    with pytest.raises(OutOfPages):
        pool.acquire(1)
    assert pool.page_budget() == 2
    assert asked == 1
    budget = 3 * PAGE
    pool.retire(1)
    pool.acquire(1)
    budget = PAGE  # less than what is held already
    pool.retire(2)
    with pytest.raises(OutOfPages, match="room for 0"):
        pool.acquire(1)
    assert asked == 3


def test_released_pages_are_reused_before_the_pool_grows(memory: VirtualMemory) -> None:
    pool = PagePool(memory)
    first = pool.acquire(4)
    assert pool.release(first) == 4
    assert set(pool.acquire(4)) == set(first)
    assert pool.created == 4


def test_a_shared_page_is_freed_by_its_last_reference(memory: VirtualMemory) -> None:
    pool = PagePool(memory)
    handles = pool.acquire(2)
    pool.addref(handles[:1])
    assert pool.release(handles) == 1
    assert (pool.references(handles[0]), pool.references(handles[1])) == (1, 0)
    assert pool.release(handles[:1]) == 1


def test_parked_pages_wait_for_their_step(memory: VirtualMemory) -> None:
    pool = PagePool(memory, budget=2 * PAGE)
    one, two = pool.acquire(2)
    pool.release([one], step=7)
    pool.release([two], step=9)
    pool.retire(6)
    with pytest.raises(OutOfPages):
        pool.acquire(1)
    pool.retire(8)
    assert pool.parked == 1
    assert pool.acquire(1) == [one]
    with pytest.raises(AllocatorError, match="step 3 comes before step 9"):
        pool.release([one], step=3)


def test_releasing_more_often_than_referenced_changes_nothing(memory: VirtualMemory) -> None:
    pool = PagePool(memory)
    one, two = pool.acquire(2)
    with pytest.raises(AllocatorError, match=f"page {two} has 1 references; 2 are released"):
        pool.release([one, two, two])
    with pytest.raises(AllocatorError, match="not in use"):
        pool.addref([one, Handle(999)])
    assert (pool.references(one), pool.references(two)) == (1, 1)
    pool.check()


def test_a_large_pool_grows_by_batches_within_its_budget(memory: VirtualMemory) -> None:
    pool = PagePool(memory, budget=324 * PAGE)
    pool.acquire(320)
    pool.acquire(1)
    assert (pool.created, pool.free) == (324, 3)
    calls = pool.create_calls
    pool.acquire(3)
    assert pool.create_calls == calls


def test_a_batch_the_machine_refuses_falls_back_to_what_is_wanted(memory: VirtualMemory) -> None:
    pool = PagePool(Full(memory, 321))
    pool.acquire(320)
    pool.acquire(1)
    assert (pool.created, pool.free) == (321, 0)
    with pytest.raises(OutOfPages, match="full"):
        pool.acquire(1)
    pool.check()


def test_pages_are_created_ahead_within_the_budget(memory: VirtualMemory) -> None:
    pool = PagePool(memory, budget=8 * PAGE)
    pool.acquire(3)
    pool.stock(4, pool.page_budget())
    assert (pool.created, pool.free, pool.create_calls) == (7, 4, 2)
    pool.stock(4, pool.page_budget())
    assert (pool.created, pool.free) == (8, 5)
    pool.stock(1, pool.page_budget())
    pool.stock(-2, None)
    assert (pool.created, pool.acquired, pool.create_calls) == (8, 3, 3)


def test_a_machine_that_refuses_pages_ahead_is_not_asked_again_until_it_gives_some(
    memory: VirtualMemory,
) -> None:
    full = Full(memory, 4)
    pool = PagePool(full)
    pool.acquire(3)
    pool.stock(2, None)
    assert (pool.created, full.refusals) == (3, 1)
    full.room = 10
    pool.stock(2, None)
    assert (pool.created, full.refusals) == (3, 1)
    pool.acquire(1)
    pool.stock(2, None)
    assert (pool.created, pool.free, full.refusals) == (6, 2, 1)
    pool.check()


class PoolMachine(RuleBasedStateMachine):
    BUDGET = 12

    def __init__(self) -> None:
        super().__init__()
        self.memory = open_memory()
        self.pool = PagePool(self.memory, budget=self.BUDGET * PAGE)
        self.references: Counter[Handle] = Counter()
        self.parked: list[tuple[int, Handle]] = []
        self.step = 0

    def teardown(self) -> None:
        self.memory.close()

    @rule(count=st.integers(0, 6))
    def acquire(self, count: int) -> None:
        fits = len(self.references) + len(self.parked) + count <= self.BUDGET
        if not fits:
            with pytest.raises(OutOfPages):
                self.pool.acquire(count)
            return
        handles = self.pool.acquire(count)
        assert len(handles) == count
        taken = set(self.references) | {handle for _, handle in self.parked}
        assert not taken & set(handles)
        self.references.update(handles)

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def addref(self, data: st.DataObject) -> None:
        handles = data.draw(st.lists(st.sampled_from(sorted(self.references)), max_size=3))
        self.pool.addref(handles)
        self.references.update(handles)

    @precondition(lambda self: self.references)
    @rule(data=st.data(), fenced=st.booleans())
    def release(self, data: st.DataObject, fenced: bool) -> None:
        held = sorted(self.references.elements())
        picked = data.draw(st.sets(st.integers(0, len(held) - 1), max_size=5))
        handles = [held[i] for i in picked]
        self.pool.release(handles, self.step if fenced else None)
        self.references.subtract(handles)
        for handle in set(handles):
            if not self.references[handle]:
                del self.references[handle]
                if fenced:
                    self.parked.append((self.step, handle))

    @rule()
    def next_step(self) -> None:
        self.step += 1

    @rule(behind=st.integers(0, 3))
    def retire(self, behind: int) -> None:
        self.pool.retire(self.step - behind)
        self.parked = [(s, h) for s, h in self.parked if s > self.step - behind]

    @rule(count=st.integers(-1, 4))
    def stock(self, count: int) -> None:
        free, room = self.pool.free, self.BUDGET - self.pool.created
        self.pool.stock(count, self.pool.page_budget())
        assert self.pool.free == free + max(0, min(count, room))

    @rule(keep=st.integers(0, 4))
    def shrink(self, keep: int) -> None:
        free = self.pool.free
        assert self.pool.shrink(keep) == max(0, free - keep)
        assert self.pool.free == min(free, keep)

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check()
        assert self.pool.in_use == len(self.references)
        assert self.pool.parked == len(self.parked)
        assert all(self.pool.references(h) == n for h, n in self.references.items())
        assert self.pool.created == len(self.memory.ledger.mapped_at) <= self.BUDGET


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    deadline=None, max_examples=examples(80), stateful_step_count=40
)
