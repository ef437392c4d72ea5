"""The pool: budget, what is in use, and that nothing is lost or given twice."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from memory_twins import PAGE, Wrapped, examples, open_memory

from batchrun.allocator.pages import PagePool
from batchrun.allocator.vmm import AllocatorError, Handle, OutOfPages, VirtualMemory
from tests.allocator.invariants import check_pool


class Full(Wrapped):
    """A machine with room for so many pages."""

    def __init__(self, memory: VirtualMemory, room: int) -> None:
        super().__init__(memory)
        self.room = room
        self.refusals = 0

    def create(self, count: int) -> list[Handle]:
        if len(self.memory.counts) + count > self.room:
            self.refusals += 1
            raise OutOfPages("the machine is full")
        return self.memory.create(count)


def test_acquire_is_all_or_nothing(memory: VirtualMemory) -> None:
    pool = PagePool(memory, budget=5 * PAGE)
    held = pool.acquire(3)
    with pytest.raises(OutOfPages, match=rf"cannot add 3 pages .* {5 * PAGE} bytes has room for 2"):
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
    pool.remeasure()
    pool.acquire(1)
    budget = PAGE  # less than what is held already
    pool.remeasure()
    with pytest.raises(OutOfPages, match="room for 0"):
        pool.acquire(1)
    assert asked == 3


def test_released_pages_are_reused_before_the_pool_grows(memory: VirtualMemory) -> None:
    pool = PagePool(memory)
    first = pool.acquire(4)
    assert pool.release(first) == 4
    assert set(pool.acquire(4)) == set(first)
    assert pool.created == 4


def test_a_shared_page_is_freed_where_it_was_mapped_last(memory: VirtualMemory) -> None:
    pool, base = PagePool(memory), memory.reserve(4 * PAGE)
    one, two = pool.acquire(2)
    memory.map(base, [one, two, one])
    memory.unmap(base, 2)
    assert pool.release([one, two]) == 1
    assert (pool.in_use, pool.free) == (1, 1)
    memory.unmap(base + 2 * PAGE, 1)
    assert pool.release([one]) == 1
    assert sorted(pool.acquire(2)) == sorted([one, two])


def test_releasing_what_is_not_in_use_changes_nothing(memory: VirtualMemory) -> None:
    pool = PagePool(memory)
    one, two = pool.acquire(2)
    assert pool.release([two, two]) == 1, "a page that is named twice is free once"
    for wrong in (two, Handle(999)):
        with pytest.raises(AllocatorError, match=f"page {wrong}: it is not in use"):
            pool.release([one, wrong])
    assert (pool.in_use, pool.free) == (1, 1)
    check_pool(pool)


def test_a_free_page_that_is_mapped_is_found(memory: VirtualMemory) -> None:
    pool, base = PagePool(memory), memory.reserve(PAGE)
    page = pool.acquire(1)
    pool.release(page)
    memory.map(base, page)
    with pytest.raises(AssertionError, match="a free page is mapped"):
        check_pool(pool)


def test_a_large_pool_grows_by_batches_within_its_budget(memory: VirtualMemory) -> None:
    pool = PagePool(memory, budget=324 * PAGE)
    pool.acquire(320)
    pool.acquire(1)
    assert (pool.created, pool.free) == (324, 3)
    calls = pool.creating.calls
    pool.acquire(3)
    assert pool.creating.calls == calls


def test_a_batch_the_machine_refuses_falls_back_to_what_is_wanted(memory: VirtualMemory) -> None:
    pool = PagePool(Full(memory, 321))
    pool.acquire(320)
    pool.acquire(1)
    assert (pool.created, pool.free) == (321, 0)
    with pytest.raises(OutOfPages, match="full"):
        pool.acquire(1)
    check_pool(pool)


def test_pages_are_created_ahead_within_the_budget(memory: VirtualMemory) -> None:
    pool = PagePool(memory, budget=8 * PAGE)
    pool.acquire(3)
    pool.stock(4, pool.page_budget())
    assert (pool.created, pool.free, pool.creating.calls) == (7, 4, 2)
    pool.stock(4, pool.page_budget())
    assert (pool.created, pool.free) == (8, 5)
    pool.stock(1, pool.page_budget())
    pool.stock(-2, None)
    assert (pool.created, pool.acquired, pool.creating.calls) == (8, 3, 3)


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
    check_pool(pool)


class PoolMachine(RuleBasedStateMachine):
    """A pool and a memory, whose pages are mapped anywhere before they are released."""

    BUDGET = 12
    PLACES = 40

    def __init__(self) -> None:
        super().__init__()
        self.memory = open_memory()
        self.base = self.memory.reserve(self.PLACES * PAGE)
        self.pool = PagePool(self.memory, budget=self.BUDGET * PAGE)
        self.used: set[Handle] = set()
        self.mapped: dict[int, Handle] = {}  # address -> page

    def teardown(self) -> None:
        self.memory.close()

    @rule(count=st.integers(0, 6))
    def acquire(self, count: int) -> None:
        if len(self.used) + count > self.BUDGET:
            with pytest.raises(OutOfPages):
                self.pool.acquire(count)
            return
        handles = self.pool.acquire(count)
        assert len(handles) == count
        assert not self.used & set(handles)
        self.used.update(handles)

    @precondition(lambda self: self.used)
    @rule(data=st.data(), at=st.integers(0, PLACES - 1))
    def map(self, data: st.DataObject, at: int) -> None:
        address, handle = self.base + at * PAGE, data.draw(st.sampled_from(sorted(self.used)))
        if address not in self.mapped:
            self.memory.map(address, [handle])
            self.mapped[address] = handle

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def unmap_and_release(self, data: st.DataObject) -> None:
        picked = data.draw(st.sets(st.sampled_from(sorted(self.mapped)), max_size=5))
        handles = [self.mapped.pop(address) for address in sorted(picked)]
        for address in picked:
            self.memory.unmap(address, 1)
        self.release(handles)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release_any(self, data: st.DataObject) -> None:
        self.release(data.draw(st.lists(st.sampled_from(sorted(self.used)), max_size=3)))

    def release(self, handles: list[Handle]) -> None:
        gone = set(handles) - set(self.mapped.values())
        assert self.pool.release(handles) == len(gone)
        self.used -= gone

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
        check_pool(self.pool)
        assert self.pool.in_use == len(self.used)
        assert self.pool.created == self.pool.free + self.pool.in_use
        counts = Counter(self.mapped.values())
        assert all(counts[h] == n for h, n in self.memory.counts.items())
        assert self.pool.created == len(self.memory.counts) <= self.BUDGET


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    deadline=None, max_examples=examples(80), stateful_step_count=40
)
