"""Sharing, copy-on-write and kept slots, rule by rule; pages hold four tokens (see conftest)."""

from collections.abc import Callable

import pytest
from memory_twins import PAGE, SCALE, Twin, Wrapped

from batchrun.allocator.arena import KVArena
from batchrun.allocator.sharing import MemoryCopy
from batchrun.allocator.vmm import AllocatorError, Handle, OutOfPages, VirtualMemory
from tests.allocator.invariants import check_arena

MakeArena = Callable[..., KVArena]
TOKEN = 1024 * SCALE


class Writer:
    """Writes and reads tokens, each a byte repeated, and makes the copies that are ordered."""

    def __init__(self, arena: KVArena) -> None:
        self.arena, self.twin = arena, Twin(arena.memory)

    def address(self, slot: int, token: int) -> int:
        return self.arena.address(0) + slot * self.arena.layout.slab_size(0) + token * TOKEN

    def write(self, slot: int, begin: int, text: str) -> None:
        self.copy()
        for token, letter in enumerate(text, begin):
            self.twin.write(self.address(slot, token), letter.encode() * TOKEN)

    def read(self, slot: int) -> str:
        self.copy()
        tokens = range(self.arena.live_tokens(slot))
        data = [self.twin.read(self.address(slot, token), TOKEN) for token in tokens]
        assert all(set(token) == {token[0]} for token in data)
        return "".join(chr(token[0]) for token in data)

    def copy(self) -> None:
        base = self.arena.address(0)
        for copy in self.arena.take_copies():
            data = self.twin.read(base + copy.source, copy.nbytes)
            self.twin.write(base + copy.target, data)

    def open(self, text: str) -> int:
        slot = self.arena.open(len(text))
        assert slot is not None
        assert self.arena.ensure(slot, len(text))
        self.write(slot, 0, text)
        return slot

    def append(self, slot: int, text: str) -> None:
        begin = self.arena.live_tokens(slot)
        assert self.arena.ensure(slot, begin + len(text))
        self.write(slot, begin, text)


@pytest.fixture
def arena(make_arena: MakeArena) -> KVArena:
    return make_arena(slack=10.0)


@pytest.fixture
def writer(arena: KVArena) -> Writer:
    return Writer(arena)


def test_whole_pages_are_aliased_and_the_last_is_copied(arena: KVArena, writer: Writer) -> None:
    source = writer.open("abcdefghij")
    pages = arena.pool.in_use
    slot = arena.share(source, 7, num_tokens=12, step=0)
    slab = arena.layout.slab_size(0)
    copy = MemoryCopy(0, source * slab + PAGE, slot * slab + PAGE, 3 * TOKEN, (source, slot))
    assert arena.take_copies() == (copy,)
    assert arena.pool.in_use == pages + 1
    assert (arena.live_tokens(slot), arena.held_tokens(slot)) == (7, 7)
    usage = arena.usage()
    assert usage.live == (10 + 3) * TOKEN
    assert usage.shared == PAGE
    check_arena(arena)


def test_sharers_grow_apart(arena: KVArena, writer: Writer) -> None:
    source = writer.open("abcdefghij")
    slot = arena.share(source, 7, num_tokens=12, step=0)
    fork = arena.fork(source, step=0)
    writer.append(source, "KLM")
    writer.append(slot, "xyz")
    writer.append(fork, "123")
    assert [writer.read(s) for s in (source, slot, fork)] == [
        "abcdefghijKLM",
        "abcdefgxyz",
        "abcdefghij123",
    ]
    check_arena(arena)


def test_a_prefix_of_whole_pages_needs_no_copy(arena: KVArena, writer: Writer) -> None:
    source = writer.open("abcdefgh")
    pages = arena.pool.in_use
    slot = arena.fork(source, step=0)
    assert arena.take_copies() == ()
    assert arena.pool.in_use == pages
    assert arena.usage().live == 8 * TOKEN
    assert writer.read(slot) == "abcdefgh"


def test_shared_tokens_stay_live(arena: KVArena, writer: Writer) -> None:
    """Else growing again would write them, for all slots that have them."""
    source = writer.open("abcdefghij")
    slot = arena.fork(source, step=0)
    for each in (source, slot):
        before = arena.usage()
        with pytest.raises(
            AllocatorError, match=f"slot {each} shares 8 tokens; it can't be cut to 7"
        ):
            arena.ensure(each, 7)
        assert arena.usage() == before
        assert arena.ensure(each, 8)
    writer.append(slot, "XYZ")
    writer.append(source, "?")
    assert (writer.read(source), writer.read(slot)) == ("abcdefgh?", "abcdefghXYZ")
    check_arena(arena)


def test_a_closed_slot_that_has_the_prefix_is_taken_again(arena: KVArena, writer: Writer) -> None:
    source = writer.open("abcdefghij")
    slot = arena.share(source, 8, num_tokens=16, step=0)
    writer.append(slot, "12345678")
    arena.close(slot, step=1)
    writer.open("other")
    arena.close(2, step=1)
    before = arena.usage().work["map"].calls
    assert arena.share(source, 9, num_tokens=16, step=2) == slot, "though step 1 still reads it"
    writer.append(slot, "abc")
    assert arena.usage().work["map"].calls == before
    assert writer.read(slot) == "abcdefghiabc"
    check_arena(arena)


def test_open_avoids_shared_pages(arena: KVArena, writer: Writer) -> None:
    source = writer.open("abcdefgh")
    slots = [arena.fork(source, step=0) for _ in range(3)]
    for slot in slots:
        arena.close(slot, step=1)
    assert arena.open(8) is None, "step 1 may read the pages that the slots share"
    arena.retire(1)
    slot = arena.open(8)
    assert slot in slots
    assert arena.mapped_pages(slot) == 0
    assert arena.ensure(slot, 8)
    writer.write(slot, 0, "12345678")
    assert writer.read(source) == "abcdefgh"
    check_arena(arena)


def test_a_kept_slot_is_not_opened_nor_stolen_from(make_arena: MakeArena) -> None:
    arena = make_arena(num_slots=2, budget=8 * PAGE)
    writer = Writer(arena)
    kept = writer.open("abcdefghijklmnop")
    arena.close(kept, step=0, keep=9)
    arena.retire(0)
    arena.trim()
    assert (arena.mapped_pages(kept), arena.held_tokens(kept)) == (3, 12)
    assert arena.num_open == 0
    slot = arena.open()
    assert arena.open() is None
    assert arena.ensure(slot, 20)
    assert not arena.ensure(slot, 21)
    arena.close(slot, step=1)
    arena.retire(1)
    assert arena.share(kept, 9, num_tokens=20, step=2) == slot
    assert writer.read(slot) == "abcdefghi"
    assert arena.usage().shared == 0, "the kept slot is not open"
    arena.close(slot, step=2)
    arena.drop(kept)
    arena.retire(2)
    assert {arena.open(), arena.open()} == {0, 1}
    check_arena(arena)
    with pytest.raises(AllocatorError, match="keeps nothing"):
        arena.drop(kept)


def test_a_closed_source_is_not_stolen_from_before_its_step(make_arena: MakeArena) -> None:
    arena = make_arena(num_slots=3, budget=5 * PAGE)
    writer = Writer(arena)
    source = writer.open("abcdefgh")
    arena.close(source, step=0)
    arena.retire(0)
    slot = arena.share(source, 7, num_tokens=7, step=3)
    arena.retire(2)
    grown = arena.open()
    assert arena.ensure(grown, 8)
    assert not arena.ensure(grown, 12), "only the source's last page is left, which step 3 reads"
    assert writer.read(slot) == "abcdefg"
    arena.retire(3)
    assert arena.ensure(grown, 12)
    assert arena.held_tokens(source) == 4
    check_arena(arena)


def test_a_prefix_that_is_in_use_stays_mapped_in_closed_slots(make_arena: MakeArena) -> None:
    arena = make_arena(num_slots=4, budget=10 * PAGE)
    writer = Writer(arena)
    kept = writer.open("abcdefgh")
    arena.close(kept, step=0, keep=8)
    slots = [arena.share(kept, 8, 12, step=1) for _ in range(2)]
    for slot in slots:
        writer.append(slot, "1234")
        arena.close(slot, step=1)
    arena.retire(1)
    other = arena.open()
    assert arena.ensure(other, 32)
    assert [arena.mapped_pages(slot) for slot in slots] == [2, 2], "what gives no page is not taken"
    assert not arena.ensure(other, 36)
    arena.drop(kept)
    assert arena.ensure(other, 40)
    assert [arena.mapped_pages(slot) for slot in (kept, *slots)] == [0, 0, 0]
    check_arena(arena)


def test_share_that_cannot_be_had_changes_nothing(make_arena: MakeArena) -> None:
    arena = make_arena(num_slots=2, budget=2 * PAGE)
    writer = Writer(arena)
    source = writer.open("abcdefgh")
    before = arena.usage()
    assert arena.fork(source, step=0) is not None
    arena.close(1 - source, step=0)
    assert arena.share(source, 7, num_tokens=7, step=1) is None, "no page for the copy"
    assert arena.usage().live == before.live
    arena.retire(0)
    assert arena.open() == 1 - source
    assert arena.fork(source, step=1) is None, "no slot"
    arena.close(source, step=0)
    assert arena.ensure(1 - source, 8), "no step reads the source after all"
    assert arena.take_copies() == ()
    check_arena(arena)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_map_is_rolled_back(
    memory: VirtualMemory, make_arena: MakeArena, fails_at: int
) -> None:
    class Failing(Wrapped):
        calls = -10

        def map(self, address: int, handles: list[Handle]) -> None:
            self.calls += 1
            if self.calls == fails_at:
                raise OutOfPages("no room for another mapping")
            self.memory.map(address, handles)

    failing = Failing(memory)
    layout = make_arena(layers=2, layers_per_slab=1).layout
    arena = KVArena(failing, layout, num_slots=3)
    source = arena.open()
    assert arena.ensure(source, 10)
    failing.calls = 0
    assert arena.share(source, 7, num_tokens=7, step=0) is None
    check_arena(arena)
    failing.calls = -10
    slot = arena.share(source, 8, num_tokens=8, step=0)
    assert slot is not None
    check_arena(arena)
    arena.release()
    check_arena(arena)


def test_copies_into_a_closed_slot_are_dropped_unless_another_needs_them(
    arena: KVArena, writer: Writer
) -> None:
    source = writer.open("abcdefghij")
    arena.close(arena.fork(source, step=0), step=0)
    assert arena.take_copies() == ()
    first = arena.fork(source, step=0)
    second = arena.fork(first, step=0)
    arena.close(first, step=0)
    assert len(arena._sharing.copies) == 2
    assert writer.read(second) == "abcdefghij"
    kept = arena.fork(source, step=0)
    arena.close(kept, step=0, keep=10)
    assert arena.ensure(source, 12)
    writer.write(source, 10, "kl")
    assert writer.read(arena.share(kept, 10, 10, step=1)) == "abcdefghij"
    check_arena(arena)


def test_misuse_is_refused(arena: KVArena, writer: Writer) -> None:
    source = writer.open("abcde")
    with pytest.raises(AllocatorError, match="has 5 tokens; 6 can't be shared"):
        arena.share(source, 6, 6, step=0)
    with pytest.raises(AllocatorError, match="has 5 tokens; 6 can't be kept"):
        arena.close(source, step=0, keep=6)
    with pytest.raises(AllocatorError, match="slot 3 is not open"):
        arena.fork(3, step=0)
    arena.retire(4)
    with pytest.raises(AllocatorError, match="step 4 is retired"):
        arena.share(source, 5, 5, step=4)
    check_arena(arena)
