"""The arena, rule by rule; random sequences of operations are in test_kv_arena_machine.py."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from memory_twins import PAGE, Twin, Wrapped, faulted, run_python

from batchrun.allocator.arena import KVArena
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.vmm import AllocatorError, Handle, OutOfPages, VirtualMemory
from tests.allocator.invariants import check_arena

MakeArena = Callable[..., KVArena]


def opened(arena: KVArena, num_tokens: int) -> int:
    slot = arena.open()
    assert slot is not None
    assert arena.ensure(slot, num_tokens)
    return slot


def work(arena: KVArena) -> tuple[int, int, int]:
    usage = arena.usage()
    return usage.work["map"].calls, usage.work["unmap"].calls, usage.work["create"].calls


def test_open_gives_each_slot_once_and_maps_nothing(make_arena: MakeArena) -> None:
    arena = make_arena(num_slots=3)
    assert {arena.open(), arena.open(), arena.open()} == {0, 1, 2}
    assert arena.open() is None
    assert work(arena) == (0, 0, 0)
    arena.close(1, step=0)
    assert arena.open() == 1
    check_arena(arena)


def test_ensure_maps_each_groups_pages_in_one_call(make_arena: MakeArena) -> None:
    arena = make_arena(layers=3, layers_per_slab=1)
    slot = opened(arena, 9)  # 3 pages in each of 3 groups
    assert work(arena) == (3, 0, 1)
    assert arena.mapped_pages(slot) == 9
    assert arena.ensure(slot, 12)
    assert work(arena) == (3, 0, 1), "the twelfth token ends on the third page"
    assert arena.ensure(slot, 13)
    assert work(arena) == (6, 0, 2)


def test_ensure_of_what_is_there_does_no_work(make_arena: MakeArena) -> None:
    arena = make_arena()
    slot = opened(arena, 8)
    before = work(arena)
    for tokens in (8, 7, 0, 5, 8):
        assert arena.ensure(slot, tokens)
        assert arena.live_tokens(slot) == tokens
    assert work(arena) == before
    assert arena.mapped_pages(slot) == 2, "fewer live tokens unmap nothing"
    check_arena(arena)


def test_a_reopened_slot_maps_nothing(make_arena: MakeArena) -> None:
    arena = make_arena()
    slot = opened(arena, 40)
    arena.close(slot, step=3)
    arena.retire(3)
    before = work(arena)
    assert arena.open(40) == slot
    assert arena.ensure(slot, 40)
    assert work(arena) == before
    arena.retire(4)
    arena.retire(5)
    assert arena.mapped_pages(slot) == 10
    assert work(arena) == before


def test_pages_for_the_tokens_named_at_open_are_kept_for_them(make_arena: MakeArena) -> None:
    arena = make_arena(slack=0.0)
    slot = opened(arena, 40)
    arena.close(slot, step=0)
    assert arena.open(num_tokens=24) == slot
    arena.retire(0)
    arena.retire(1)
    assert arena.ensure(slot, 8)  # a first chunk
    arena.retire(2)
    before = arena.usage().work["map"].calls
    assert arena.ensure(slot, 24)
    assert arena.usage().work["map"].calls == before
    assert arena.mapped_pages(slot) == 10, "6 claimed and 4 spare"


def test_open_prefers_the_closed_slot_that_fits_best(make_arena: MakeArena) -> None:
    arena = make_arena(num_slots=4, slack=10.0)
    small, large, middle = opened(arena, 4), opened(arena, 40), opened(arena, 20)
    for slot in (small, large, middle):
        arena.close(slot, step=0)
    assert arena.open(17) == middle
    assert arena.open(17) == large
    assert arena.open(17) == small, "some pages are better than none"
    assert arena.open(17) == 3


def test_closed_slots_give_pages_only_when_their_step_is_retired(make_arena: MakeArena) -> None:
    arena = make_arena(budget=10 * PAGE)
    first, second = opened(arena, 24), arena.open()
    arena.close(first, step=5)
    arena.retire(4)
    assert not arena.ensure(second, 40)
    assert arena.mapped_pages(first) == 6
    arena.retire(5)
    assert arena.ensure(second, 40)
    assert arena.mapped_pages(first) == 0
    check_arena(arena)


def test_surplus_of_a_reopened_slot_keeps_its_fence(make_arena: MakeArena) -> None:
    arena = make_arena(budget=10 * PAGE, num_slots=2)
    slot = opened(arena, 40)
    arena.close(slot, step=5)
    assert arena.open(8) == slot
    assert arena.ensure(slot, 8)
    other = arena.open()
    assert not arena.ensure(other, 4), "step 5 may still read all ten pages"
    arena.retire(5)
    assert arena.ensure(other, 32)
    assert not arena.ensure(other, 36), "the two pages of live tokens are never taken"
    check_arena(arena)


def test_the_largest_surplus_is_stolen_first_by_runs(make_arena: MakeArena) -> None:
    arena = make_arena(num_slots=3, slack=10.0)
    small, large, growing = opened(arena, 12), opened(arena, 60), opened(arena, 4)
    arena.close(small, step=0)
    arena.close(large, step=0)
    arena.retire(0)
    for tokens in range(5, 37):  # eight pages, one by one
        assert arena.ensure(growing, tokens)
    assert (arena.mapped_pages(small), arena.mapped_pages(large)) == (3, 15 - 8)
    assert work(arena) == (3 + 8, 1, 3), "all eight came from one unmap, none was created"
    check_arena(arena)


def test_closed_slots_give_before_open_ones(make_arena: MakeArena) -> None:
    arena = make_arena(num_slots=3, slack=2.5)  # 14 pages may be unused
    reopened, closed, growing = opened(arena, 60), opened(arena, 12), opened(arena, 0)
    arena.close(reopened, step=0)
    assert arena.open(16) == reopened
    arena.close(closed, step=0)
    arena.retire(0)  # now 4 of its 15 pages are claimed, 11 are surplus
    assert arena.ensure(growing, 12)
    assert (arena.mapped_pages(closed), arena.mapped_pages(reopened)) == (0, 15)
    assert arena.ensure(growing, 24)
    assert arena.mapped_pages(reopened) == 15 - 8
    assert arena.ensure(reopened, 16)
    check_arena(arena)


def test_ensure_is_all_or_nothing_over_groups(make_arena: MakeArena) -> None:
    arena = make_arena(layers=3, layers_per_slab=1, budget=8 * PAGE)
    slot = opened(arena, 8)
    arena_before, work_before = arena.usage(), work(arena)
    assert not arena.ensure(slot, 9)  # wants 3 more of the 2 that are left
    assert arena.usage() == arena_before
    assert work(arena) == work_before
    assert (arena.live_tokens(slot), arena.mapped_pages(slot)) == (8, 6)
    check_arena(arena)


def test_a_slot_that_gets_no_pages_keeps_none_from_others(make_arena: MakeArena) -> None:
    arena = make_arena(budget=12 * PAGE, num_slots=2, slack=10.0)
    slot = opened(arena, 40)
    arena.close(slot, step=0)
    assert arena.open(1) == slot
    arena.retire(0)
    assert arena.ensure(slot, 4)
    assert not arena.ensure(slot, 52)
    assert arena.ensure(opened(arena, 0), 44)
    assert arena.mapped_pages(slot) == 1
    check_arena(arena)


def test_a_slot_may_use_up_what_open_kept_for_it_in_another_group(make_arena: MakeArena) -> None:
    arena = make_arena(layers=2, layers_per_slab=1, budget=16 * PAGE, num_slots=2)
    slot = opened(arena, 32)
    arena.close(slot, step=0)
    arena.retire(0)
    other = opened(arena, 16)  # takes eight pages, all from the slot's first group
    assert arena.open(32) == slot
    assert (arena.mapped_pages(slot), arena.mapped_pages(other)) == (8, 8)
    assert not arena.ensure(slot, 20)
    check_arena(arena)
    assert arena.ensure(slot, 16)
    assert not arena.ensure(slot, 17)
    check_arena(arena)


def test_an_earlier_step_named_later_does_not_weaken_the_fence(make_arena: MakeArena) -> None:
    arena = make_arena(budget=10 * PAGE, num_slots=2)
    slot = opened(arena, 40)
    arena.close(slot, step=5)
    assert arena.open(1) == slot
    arena.close(slot, step=3)
    arena.retire(4)
    assert arena.open(1) == slot
    assert not arena.ensure(opened(arena, 0), 4), "step 5 may still read all ten pages"
    arena.retire(5)
    assert arena.ensure(1 - slot, 4)


class FailingMap(Wrapped):
    """Refuses the map call with the given number, as a system without room for it does."""

    fails_at = -1
    error: type[AllocatorError] = OutOfPages

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise self.error("no room for another mapping")
        self.memory.map(address, handles)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("error", [OutOfPages, AllocatorError])
def test_a_failed_map_is_rolled_back(
    memory: VirtualMemory, make_arena: MakeArena, fails_at: int, error: type[AllocatorError]
) -> None:
    failing = FailingMap(memory)
    layout = make_arena(layers=3, layers_per_slab=1).layout
    arena = KVArena(failing, layout, num_slots=2)
    slot = opened(arena, 4)
    failing.fails_at, failing.error = fails_at, error
    if error is OutOfPages:
        assert not arena.ensure(slot, 12)
    else:
        with pytest.raises(AllocatorError, match="no room"):
            arena.ensure(slot, 12)
    check_arena(arena)
    assert (arena.live_tokens(slot), arena.mapped_pages(slot)) == (4, 3)
    assert len(list(memory.all_mapped())) == 3
    assert arena.ensure(slot, 12)
    check_arena(arena)


def test_a_failed_reservation_gives_the_others_back(memory: VirtualMemory) -> None:
    # 127 TiB of user address space: the second group's reservation can't be had.
    layout = KVLayout((LayerKV(2, 64, 64),) * 2, 4, PAGE, 80 << 30, 1)
    with pytest.raises(AllocatorError, match=r"(mmap|cuMemAddressReserve) failed"):
        KVArena(memory, layout, num_slots=1)
    assert memory.reservations == {}


def test_retire_destroys_what_stays_unused_beyond_the_slack(make_arena: MakeArena) -> None:
    arena = make_arena(slack=0.25, num_slots=4)
    kept, closed = opened(arena, 64), opened(arena, 60)
    arena.close(closed, step=1)
    arena.retire(1)
    assert arena.pool.created == 31, "the next sequence may be about to open the slot"
    arena.retire(2)
    assert arena.pool.created == 16 + 4 + 4
    assert len(arena.memory.counts) == arena.pool.created
    assert arena.ensure(kept, 64)
    check_arena(arena)


def test_retire_creates_what_the_last_step_took_ahead_of_need(make_arena: MakeArena) -> None:
    arena = make_arena(slack=1.0, num_slots=2)
    slot = opened(arena, 24)
    arena.retire(0)
    assert (arena.pool.created, arena.pool.free) == (12, 6)
    before = work(arena)
    assert arena.ensure(slot, 40)
    assert work(arena) == (before[0] + 1, *before[1:]), "nothing was created in the step itself"
    arena.retire(1)
    assert arena.pool.free == 4
    arena.retire(2)  # a step that took nothing
    assert arena.pool.free == 4
    check_arena(arena)


def test_pages_ahead_stay_within_slack_and_budget(make_arena: MakeArena) -> None:
    arena = make_arena(slack=0.25, num_slots=2, max_tokens=400)
    opened(arena, 160)
    arena.retire(0)
    assert arena.pool.free == 4 + 10
    arena = make_arena(slack=1.0, num_slots=2, budget=43 * PAGE, max_tokens=400)
    opened(arena, 160)
    arena.retire(0)
    assert (arena.pool.created, arena.pool.free) == (43, 3)


def test_surplus_counts_as_pages_ahead(make_arena: MakeArena) -> None:
    arena = make_arena(slack=1.0, num_slots=2)
    closed = opened(arena, 20)
    opened(arena, 40)
    arena.close(closed, step=0)
    arena.retire(0)
    assert (arena.mapped_pages(closed), arena.pool.created) == (5, 10 + 14), "15 taken, 14 allowed"


def test_a_machine_that_is_full_does_not_make_retire_fail(
    make_arena: MakeArena, memory: VirtualMemory
) -> None:
    class Full(Wrapped):
        def create(self, count: int) -> list[Handle]:
            raise OutOfPages("the machine is full")

    arena = make_arena(num_slots=1, slack=1.0)
    opened(arena, 12)
    arena.pool._memory = Full(memory)
    arena.retire(0)
    assert arena.pool.created == 3
    assert not arena.ensure(0, 16)
    check_arena(arena)


def test_a_budget_that_shrinks_takes_what_no_sequence_needs(make_arena: MakeArena) -> None:
    budget, asked = 100 * PAGE, 0

    def ask() -> int:
        nonlocal asked
        asked += 1
        return budget

    arena = make_arena(slack=10.0, num_slots=4, budget=ask, max_tokens=400)
    kept, closed, running = opened(arena, 40), opened(arena, 20), opened(arena, 12)
    arena.close(closed, step=0)
    arena.close(running, step=1)
    arena.retire(0)
    created = arena.pool.created
    assert created > 18
    budget, asked = (created - 2) * PAGE, 0
    arena.retire(0)
    assert (arena.pool.created, asked) == (created - 2, 1), "no more than the budget asks for"
    budget = 5 * PAGE
    arena.retire(0)
    assert [arena.mapped_pages(s) for s in (kept, closed, running)] == [10, 0, 3]
    assert arena.pool.created == 13, "the running step's pages and the live ones stay"
    assert arena.ensure(kept, 40)
    asked = 0
    assert not arena.ensure(kept, 44)
    assert asked == 0, "it was asked when steps were retired"
    arena.retire(1)
    assert arena.pool.created == 10
    budget = 11 * PAGE
    assert not arena.ensure(kept, 44)
    arena.retire(1)
    assert arena.ensure(kept, 44)
    check_arena(arena)


def test_trim_leaves_only_what_open_slots_claim(make_arena: MakeArena) -> None:
    arena = make_arena(slack=10.0, num_slots=4)
    kept, retired, running = opened(arena, 20), opened(arena, 16), opened(arena, 8)
    arena.close(retired, step=1)
    arena.close(running, step=2)
    arena.retire(1)
    arena.trim()
    assert [arena.mapped_pages(s) for s in (kept, retired, running)] == [5, 0, 2]
    assert arena.pool.created == 7
    arena.retire(2)
    arena.trim()
    assert arena.pool.created == 5
    check_arena(arena)


@pytest.mark.parametrize(("budget", "largest"), [(None, 64), (10 * PAGE, 40), (10 * PAGE - 1, 36)])
def test_can_fit(make_arena: MakeArena, budget: int | None, largest: int) -> None:
    arena = make_arena(budget=budget)
    opened(arena, 20)  # what others hold does not matter
    assert arena.can_fit(largest)
    assert not arena.can_fit(largest + 1)


def test_misuse_is_refused(make_arena: MakeArena, memory: VirtualMemory) -> None:
    arena = make_arena()
    with pytest.raises(AllocatorError, match="slot 2 is not open"):
        arena.ensure(2, 0)
    with pytest.raises(AllocatorError, match="slot 2 is not open"):
        arena.close(2, step=0)
    slot = arena.open()
    for tokens in (65, -1):
        with pytest.raises(AllocatorError, match=f"cannot hold {tokens} tokens: a slot has 64"):
            arena.ensure(slot, tokens)
    with pytest.raises(
        AllocatorError, match=f"{2 * PAGE} bytes in each of 1 .* the memory's have {PAGE}"
    ):
        KVArena(memory, KVLayout((LayerKV(1, 8, 8),), 2, 2 * PAGE, 8, 1), num_slots=1)
    with pytest.raises(AllocatorError, match="num_slots 0"):
        make_arena(num_slots=0)
    check_arena(arena)


def test_slots_lie_one_slab_apart_in_one_reservation(
    make_arena: MakeArena, memory: VirtualMemory
) -> None:
    arena = make_arena(layers=2, layers_per_slab=1)
    slot = opened(arena, 4)
    other = opened(arena, 4)
    for group in range(2):
        slab = arena.layout.slab_size(group)
        for s in (slot, other):
            Twin(memory).write(arena.address(group) + s * slab, bytes([65 + s]) * PAGE)
        read = Twin(memory).read(arena.address(group) + slot * slab, 2)
        assert read == bytes([65 + slot] * 2)
    assert len(memory.reservations) == 2


def test_release_gives_everything_back(make_arena: MakeArena, memory: VirtualMemory) -> None:
    arena = make_arena(layers=2, layers_per_slab=1)
    opened(arena, 30)
    arena.close(opened(arena, 8), step=4)
    arena.release()
    arena.release()
    assert (memory.reservations, memory.counts) == ({}, {})
    assert arena.usage().reserved == arena.usage().mapped == 0
    with pytest.raises(AllocatorError, match="released"):
        arena.open()
    check_arena(arena)


@pytest.mark.parametrize("token", [11, 12, 63])
def test_tokens_past_the_mapped_pages_fault(token: int) -> None:
    # Slot 1 of 4, 8 tokens live: pages hold 4 tokens, so 0-7 are backed and 8 is not.
    code = """
from memory_twins import PAGE, SCALE, Twin, open_memory
from batchrun.allocator.arena import KVArena
from batchrun.allocator.layout import KVLayout, LayerKV
memory = open_memory()
layout = KVLayout((LayerKV(2, 64 * SCALE, 64 * SCALE),), 4, PAGE, 64, 1)
arena = KVArena(memory, layout, num_slots=4)
arena.open()
slot = arena.open()
assert arena.ensure(slot, 12)
arena.close(slot, 0)
slot = arena.open()
base = arena.address(0) + slot * arena.layout.slab_size(0)
assert arena.ensure(slot, 8)
arena.retire(0)
arena.trim()
Twin(memory).read(base + 7 * 1024 * SCALE, 1024 * SCALE)
print("touching", flush=True)
Twin(memory).read(base + {token} * 1024 * SCALE, 1)
"""
    done = run_python(code.replace("{token}", str(token)))
    assert done.stdout == "touching\n", done.stderr
    assert faulted(done), done.stderr


def test_only_the_tensor_module_imports_torch() -> None:
    done = run_python(
        "import sys\n"
        "from batchrun.allocator import accounting, arena, cuda, host\n"
        "print('torch' in sys.modules)"
    )
    assert done.stdout == "False\n", done.stderr


def test_pages_for_what_comes_are_created_whatever_the_slack(make_arena: MakeArena) -> None:
    arena = make_arena(slack=0.0, num_slots=8)
    slot = opened(arena, 20)  # four tokens a page
    arena.retire(0, [(slot, 20)], 160)
    assert arena.pool.free == 40
    calls = arena.usage().work["create"].calls
    arena.retire(1, [(slot, 20)], 160)
    slots = [opened(arena, 40) for _ in range(4)]
    assert arena.usage().work["create"].calls == calls, "a burst creates nothing"
    for other in slots:
        arena.close(other, 1)
    arena.retire(1)
    arena.retire(2)
    assert arena.pool.created < 20, "what does not come after all goes back"
    check_arena(arena)


def test_pages_are_created_for_all_slots_that_grow_at_once(make_arena: MakeArena) -> None:
    arena = make_arena(slack=0.0, num_slots=20)
    slots = [opened(arena, 8) for _ in range(20)]
    arena.retire(0, [(slot, 8) for slot in slots])
    created = arena.pool.created
    arena.retire(1, [(slot, 9) for slot in slots])
    assert arena.pool.created - created == 20 - 4, "and no spare ones beside them"
    calls = arena.usage().work["create"].calls
    assert all(arena.ensure(slot, 9) for slot in slots)
    assert arena.usage().work["create"].calls == calls


def test_pages_go_back_a_few_at_a_time_as_long_as_the_budget_holds(make_arena: MakeArena) -> None:
    budget = 100 * PAGE
    arena = make_arena(slack=0.0, num_slots=4, give_back=3, budget=lambda: budget)
    for slot in [opened(arena, 40), opened(arena, 40)]:
        arena.close(slot, step=1)
    arena.retire(1)
    held = [arena.pool.created]
    for step in range(2, 20):
        arena.retire(step)
        held.append(arena.pool.created)
        check_arena(arena)
    steps = [before - after for before, after in pairwise(held)]
    assert max(steps) == 3
    assert sorted(held, reverse=True) == held
    assert held[-1] == 4, "the spare ones stay"
    slot = opened(arena, 40)
    arena.close(slot, step=20)
    budget = 2 * PAGE
    arena.retire(20)
    assert arena.pool.created == 2, "at once, where another process needs the memory"
