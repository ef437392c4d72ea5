"""What the arena asks of the driver, over the fake one; run by test_twins.py, in its process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from memory_twins import PAGE, open_memory, opened

from batchrun.allocator.arena import KVArena
from batchrun.allocator.cuda import CudaMemory
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.vmm import AllocatorError, OutOfPages
from tests.allocator.invariants import check_arena
from tests.fake_cuda.control import (
    CONTEXT,
    CREATE,
    FAKE,
    INVALID_CONTEXT,
    MAP,
    OUT_OF_MEMORY,
    RELEASE,
    SET_ACCESS,
    UNMAP,
    asked,
    fail,
    nanoseconds,
)

MakeArena = Callable[..., KVArena]
EACH = {MAP: 1500, SET_ACCESS: 38_000, UNMAP: 30_000, CREATE: 60_000, RELEASE: 30_000, CONTEXT: 100}


@pytest.fixture
def memory() -> Iterator[CudaMemory]:
    with opened(open_memory()) as memory:
        yield memory
    assert (FAKE.fake_committed(), FAKE.fake_mappings(), FAKE.fake_reservations()) == (0, 0, 0)


@pytest.mark.parametrize("count", [1, 48])
@pytest.mark.parametrize("planes", [1, 3])
def test_a_range_costs_one_set_access_however_many_pages_it_has(count: int, planes: int) -> None:
    with opened(open_memory(planes=planes)) as memory:
        base = memory.reserve(64 * PAGE)
        with asked() as creating:
            pages = memory.create(count)
        with asked() as mapping:
            memory.map(base, pages)
        with asked() as unmapping:
            memory.unmap(base, count)
    parts = count * planes
    assert creating.calls == {CREATE: parts, CONTEXT: 1}
    assert mapping.calls == {MAP: parts, SET_ACCESS: planes, CONTEXT: 1}
    assert unmapping.calls == {UNMAP: parts, CONTEXT: 1}
    for done in (creating, mapping, unmapping):
        assert done.nanoseconds == sum(EACH[name] * n for name, n in done.calls.items())


def test_a_slot_that_grows_costs_one_set_access_a_slab(make_arena: MakeArena) -> None:
    arena = make_arena(layers=3, layers_per_slab=1)
    slot = arena.open()
    assert slot is not None
    for tokens, pages in ((1, 1), (40, 9), (48, 2)):
        with asked() as growing:
            assert arena.ensure(slot, tokens)
        assert growing.calls[MAP] == 3 * pages
        assert growing.calls[SET_ACCESS] == 3
        assert growing.calls.keys() <= {MAP, SET_ACCESS, CREATE, CONTEXT}


def test_nothing_is_asked_while_nothing_grows(make_arena: MakeArena) -> None:
    """Within a page, in pages that a slot has already, and where a closed one is opened again."""
    arena = make_arena(budget=40 * PAGE)
    slot = arena.open()
    assert slot is not None
    assert arena.ensure(slot, 37)
    arena.retire(0)
    with asked() as steady:
        for step, tokens in enumerate((38, 39, 40, 12, 40), 1):
            assert arena.ensure(slot, tokens)
            arena.retire(step)
        arena.close(slot, 6)
    arena.retire(6)  # destroys spare pages, now that others are unused
    with asked() as reopened:
        assert arena.open(40) == slot
        assert arena.ensure(slot, 40)
        assert arena.can_fit(60)
        assert arena.has_room(8, 0.05)
        arena.retire(7)
    assert steady.calls == reopened.calls == {}
    assert steady.nanoseconds == reopened.nanoseconds == 0


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_set_access_without_memory_is_undone_and_tried_again(
    make_arena: MakeArena, nth: int
) -> None:
    arena = make_arena(layers=3, layers_per_slab=1)
    slot = arena.open()
    assert slot is not None
    assert arena.ensure(slot, 4)
    held, mapped = arena.mapped_pages(slot), FAKE.fake_mappings()
    fail(SET_ACCESS, nth, OUT_OF_MEMORY)
    assert not arena.ensure(slot, 20)
    assert (arena.mapped_pages(slot), FAKE.fake_mappings()) == (held, mapped)
    check_arena(arena)
    assert arena.ensure(slot, 20)
    check_arena(arena)


@pytest.mark.parametrize("nth", [1, 3])
def test_a_set_access_that_fails_otherwise_is_told_and_undone(
    make_arena: MakeArena, nth: int
) -> None:
    arena = make_arena(layers=3, layers_per_slab=1)
    slot = arena.open()
    assert slot is not None
    fail(SET_ACCESS, nth, INVALID_CONTEXT)
    with pytest.raises(AllocatorError, match=r"cuMemSetAccess failed with .* \(201\)"):
        arena.ensure(slot, 20)
    assert (arena.mapped_pages(slot), FAKE.fake_mappings()) == (0, 0)
    check_arena(arena)
    assert arena.ensure(slot, 20)


def test_an_arena_wider_than_the_address_space_takes_nothing(memory: CudaMemory) -> None:
    """There are 2**47 bytes of addresses, whatever memory there is."""
    layers = (LayerKV(8, 128, 128),) * 32
    layout = KVLayout(layers, 2, PAGE, 1 << 20, layers_per_slab=16)
    assert layout.num_groups == 2
    slots = (1 << 47) // (layout.num_groups * layout.slab_size(0))
    before = nanoseconds()
    with pytest.raises(OutOfPages, match=r"cuMemAddressReserve failed with .*OUT_OF_MEMORY \(2\)"):
        KVArena(memory, layout, num_slots=slots + 1)
    assert nanoseconds() > before
    assert memory.reservations == {}
    assert FAKE.fake_reservations() == 0
