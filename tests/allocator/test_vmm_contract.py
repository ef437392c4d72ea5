"""What every `VirtualMemory` must do, run over the twin of this process."""

from collections import Counter
from collections.abc import Callable

import memory_twins
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from memory_twins import PAGE, Twin, examples, faulted

from batchrun.allocator.vmm import NO_PAGE, AllocatorError, Handle, VirtualMemory

PAGES = 8


def reserve(twin: Twin, pages: int = PAGES) -> int:
    return twin.memory.reserve(pages * twin.memory.granularity)


def fill(twin: Twin, address: int, byte: int) -> None:
    twin.write(address, bytes([byte]) * twin.memory.granularity)


def first_and_last(twin: Twin, address: int) -> tuple[int, int]:
    return twin.read(address, 1)[0], twin.read(address + twin.memory.granularity - 1, 1)[0]


def test_a_terabyte_of_address_space_is_given(twin: Twin) -> None:
    base = twin.memory.reserve(1 << 40, 1 << 30)
    last = base + (1 << 40) - twin.memory.granularity
    twin.memory.map(last, twin.memory.create(1))
    fill(twin, last, 7)
    assert first_and_last(twin, last) == (7, 7)


def test_a_run_of_pages_maps_in_the_order_of_its_handles(twin: Twin) -> None:
    page, base, other = twin.memory.granularity, reserve(twin), reserve(twin)
    handles = twin.memory.create(5)
    twin.memory.map(base, handles)
    for position in range(5):
        fill(twin, base + position * page, position + 1)
    shuffled = [3, 4, 0, 2, 1]
    twin.memory.map(other, [handles[i] for i in shuffled])
    seen = [first_and_last(twin, other + i * page) for i in range(5)]
    assert seen == [(i + 1, i + 1) for i in shuffled]


def test_one_page_at_several_addresses_is_one_memory(twin: Twin) -> None:
    page, base = twin.memory.granularity, reserve(twin)
    (handle,) = twin.memory.create(1)
    twin.memory.map(base, [handle, handle])
    twin.memory.map(base + 5 * page, [handle])
    fill(twin, base + page, 9)
    assert first_and_last(twin, base) == first_and_last(twin, base + 5 * page) == (9, 9)
    twin.memory.unmap(base, 2)
    fill(twin, base + 5 * page, 4)
    twin.memory.map(base, [handle])
    assert first_and_last(twin, base) == (4, 4)


def test_a_pages_contents_survive_unmapping(twin: Twin) -> None:
    base, other = reserve(twin), reserve(twin)
    handles = twin.memory.create(2)
    twin.memory.map(base, handles)
    fill(twin, base, 11)
    twin.memory.unmap(base, 2)
    twin.memory.map(other, handles)
    assert first_and_last(twin, other) == (11, 11)


def test_unmapping_the_middle_of_a_run_leaves_its_ends(twin: Twin) -> None:
    page, base = twin.memory.granularity, reserve(twin)
    twin.memory.map(base, twin.memory.create(5))
    for position in range(5):
        fill(twin, base + position * page, position + 1)
    twin.memory.unmap(base + page, 3)
    assert first_and_last(twin, base) == (1, 1)
    assert first_and_last(twin, base + 4 * page) == (5, 5)


def test_mapping_beside_a_page_leaves_it_alone(twin: Twin) -> None:
    page, base = twin.memory.granularity, reserve(twin)
    twin.memory.map(base + page, twin.memory.create(1))
    fill(twin, base + page, 3)
    twin.memory.map(base, twin.memory.create(1))
    twin.memory.map(base + 2 * page, twin.memory.create(2))
    for position in (0, 2, 3):
        fill(twin, base + position * page, 250)
    assert first_and_last(twin, base + page) == (3, 3)


def test_a_destroyed_page_can_be_created_again(twin: Twin) -> None:
    base = reserve(twin)
    handles = twin.memory.create(3)
    twin.memory.destroy(handles[1:])
    again = twin.memory.create(2)
    assert handles[0] not in again
    twin.memory.map(base, [handles[0], *again])
    for position in range(3):
        fill(twin, base + position * twin.memory.granularity, position)
    assert first_and_last(twin, base) == (0, 0)


FAULTS = {
    "never mapped": "",
    "past the mapped run": "memory.map(base - page, memory.create(1))",
    "before the mapped run": "memory.map(base + page, memory.create(1))",
    "unmapped again": "memory.map(base, memory.create(1)); memory.unmap(base, 1)",
    "unmapped inside a run": "memory.map(base - page, memory.create(3)); memory.unmap(base, 1)",
    "freed": "memory.free(base - page, 8 * page)",
    "closed": "memory.map(base, memory.create(1)); memory.close()",
}


@pytest.mark.parametrize("touch", ["twin.read(base, 1)", "twin.write(base, b'x')"])
@pytest.mark.parametrize("state", FAULTS)
def test_touching_an_address_without_a_page_is_a_fault(state: str, touch: str) -> None:
    done = memory_twins.run_python(f"""
import memory_twins
twin = memory_twins.open_twin()
memory, page = twin.memory, twin.memory.granularity
base = memory.reserve(8 * page) + page
{FAULTS[state]}
print("about to touch", flush=True)
{touch}
print("survived", flush=True)
""")
    assert done.stdout == "about to touch\n", done.stderr
    assert faulted(done), (done.returncode, done.stderr)


def test_the_page_beside_an_unmapped_one_is_not_a_fault() -> None:
    # The counterpart of the test above: without it, a memory that always faults would pass.
    done = memory_twins.run_python("""
import memory_twins
twin = memory_twins.open_twin()
base = twin.memory.reserve(2 * twin.memory.granularity)
twin.memory.map(base, twin.memory.create(1))
twin.write(base + twin.memory.granularity - 1, b"x")
print(twin.read(base + twin.memory.granularity - 1, 1))
""")
    assert (done.returncode, done.stdout) == (0, "b'x'\n"), done.stderr


# In a reservation of 8 pages of p bytes at base, the pages 2, 3 and 4 are mapped; spare is not.
VIOLATIONS: dict[str, Callable[[VirtualMemory, int, int, Handle], object]] = {
    "map over a mapped page": lambda m, p, base, spare: m.map(base + 4 * p, [spare]),
    "map a run into a mapped page": lambda m, p, base, spare: m.map(base, [spare] * 3),
    "map past the end": lambda m, p, base, spare: m.map(base + 7 * p, [spare, spare]),
    "map outside any reservation": lambda m, p, base, spare: m.map(p, [spare]),
    "map off a page boundary": lambda m, p, base, spare: m.map(base + 5 * p + 8, [spare]),
    "map nothing": lambda m, p, base, spare: m.map(base + 5 * p, []),
    "map a page that is not": lambda m, p, base, spare: m.map(base, [spare, Handle(10**6)]),
    "unmap an unmapped page": lambda m, p, base, spare: m.unmap(base + 5 * p, 1),
    "unmap past the mapped run": lambda m, p, base, spare: m.unmap(base + 2 * p, 4),
    "unmap no page": lambda m, p, base, spare: m.unmap(base + 2 * p, 0),
    "free while mapped": lambda m, p, base, spare: m.free(base, 8 * p),
    "free a part": lambda m, p, base, spare: m.free(base + 5 * p, 3 * p),
    "free the wrong size": lambda m, p, base, spare: m.free(base, 2 * p),
    "free what is not reserved": lambda m, p, base, spare: m.free(p, p),
    "destroy a mapped page": lambda m, p, base, spare: m.destroy([spare, Handle(spare - 1)]),
    "destroy twice in one call": lambda m, p, base, spare: m.destroy([spare, spare]),
    "destroy a page that is not": lambda m, p, base, spare: m.destroy([spare, Handle(10**6)]),
    "create a negative number": lambda m, p, base, spare: m.create(-1),
    "reserve nothing": lambda m, p, base, spare: m.reserve(0),
    "reserve a part of a page": lambda m, p, base, spare: m.reserve(p + 1),
    "reserve a part of a slab": lambda m, p, base, spare: m.reserve(8 * p, 3 * p),
    "reserve slabs of a part of a page": lambda m, p, base, spare: m.reserve(8 * p, p // 2),
    "reserve slabs of nothing": lambda m, p, base, spare: m.reserve(8 * p, 0),
}


@pytest.mark.parametrize("broken", VIOLATIONS)
def test_a_broken_rule_raises_and_changes_nothing(twin: Twin, broken: str) -> None:
    page, base = twin.memory.granularity, reserve(twin)
    *mapped, spare = twin.memory.create(4)
    twin.memory.map(base + 2 * page, mapped)
    for position in range(3):
        fill(twin, base + (position + 2) * page, position + 1)
    with pytest.raises(AllocatorError, match=r"\d"):
        VIOLATIONS[broken](twin.memory, page, base, spare)
    for position in range(3):
        assert first_and_last(twin, base + (position + 2) * page) == (position + 1, position + 1)
    twin.memory.map(base, [spare, spare])  # it still exists, and the ends are still unmapped
    twin.memory.map(base + 5 * page, [spare, spare, spare])
    twin.memory.unmap(base, PAGES)
    twin.memory.destroy([*mapped, spare])
    twin.memory.free(base, PAGES * page)


def test_a_range_lies_in_one_slab(twin: Twin) -> None:
    page = twin.memory.granularity
    base = twin.memory.reserve(8 * page, 4 * page)
    one, two = twin.memory.create(2)
    with pytest.raises(AllocatorError, match=r"2 pages at .* do not lie in one slab"):
        twin.memory.map(base + 3 * page, [one, two])
    twin.memory.map(base + 3 * page, [one])
    twin.memory.map(base + 4 * page, [two])
    twin.write(base + 4 * page - 1, b"ab")
    assert twin.read(base + 4 * page - 1, 2) == b"ab", "slabs follow each other"
    with pytest.raises(AllocatorError, match=r"2 pages at .* do not lie in one slab"):
        twin.memory.unmap(base + 3 * page, 2)
    assert twin.memory.pages(base, 4) == [NO_PAGE] * 3 + [one]
    twin.memory.unmap(base + 3 * page, 1)
    assert twin.memory.reservations[base].slabs == [[], [two]]
    twin.memory.unmap(base + 4 * page, 1)
    twin.memory.free(base, 8 * page)


def test_destroying_a_page_twice_raises(twin: Twin) -> None:
    handles = twin.memory.create(2)
    twin.memory.destroy(handles[:1])
    with pytest.raises(AllocatorError, match="does not exist"):
        twin.memory.destroy(handles)
    twin.memory.destroy(handles[1:])


def test_a_page_aliased_twice_cannot_be_destroyed_after_one_unmap(twin: Twin) -> None:
    base = reserve(twin)
    handles = twin.memory.create(1)
    twin.memory.map(base, [*handles, *handles])
    twin.memory.unmap(base, 1)
    with pytest.raises(AllocatorError, match="mapped"):
        twin.memory.destroy(handles)


def test_close_is_idempotent_and_ends_everything(twin: Twin) -> None:
    base = reserve(twin)
    twin.memory.map(base, twin.memory.create(2))
    twin.memory.close()
    twin.memory.close()
    with pytest.raises(AllocatorError, match="closed"):
        twin.memory.create(1)


class MemoryMachine(RuleBasedStateMachine):
    """Random reservations, pages and mappings against a dictionary of what must be there."""

    handles = Bundle("handles")
    bases = Bundle("bases")

    def __init__(self, twin: Twin) -> None:
        super().__init__()
        self.twin = twin
        self.memory, self.page = self.twin.memory, self.twin.memory.granularity
        self.contents: dict[Handle, int] = {}
        self.table: dict[int, Handle] = {}
        self.slabs: dict[int, int] = {}  # of each reservation, pages

    def teardown(self) -> None:
        self.memory.close()

    @rule(target=bases, slab=st.sampled_from([None, PAGES // 2, 2]))
    def reserve(self, slab: int | None) -> int:
        base = self.memory.reserve(PAGES * self.page, None if slab is None else slab * self.page)
        self.slabs[base] = slab or PAGES
        return base

    def in_one_slab(self, base: int, at: int, count: int) -> bool:
        return at % self.slabs[base] + count <= self.slabs[base]

    @rule(target=handles, count=st.integers(0, 5))
    def create(self, count: int):
        created = self.memory.create(count)
        assert len(set(created)) == count
        assert not self.contents.keys() & set(created)
        self.contents.update(dict.fromkeys(created, -1))
        return multiple(*created)

    @rule(base=bases, at=st.integers(0, PAGES - 1), run=st.lists(handles, min_size=1, max_size=5))
    def map(self, base: int, at: int, run: list[Handle]) -> None:
        address = base + at * self.page
        pages = [address + i * self.page for i in range(len(run))]
        legal = (
            self.in_one_slab(base, at, len(run))
            and not self.table.keys() & set(pages)
            and self.contents.keys() >= set(run)
        )
        if not legal:
            with pytest.raises(AllocatorError):
                self.memory.map(address, run)
            return
        self.memory.map(address, run)
        self.table.update(zip(pages, run, strict=True))

    @rule(base=bases, at=st.integers(0, PAGES - 1), count=st.integers(1, PAGES))
    def unmap(self, base: int, at: int, count: int) -> None:
        address = base + at * self.page
        pages = [address + i * self.page for i in range(count)]
        if not (self.in_one_slab(base, at, count) and self.table.keys() >= set(pages)):
            with pytest.raises(AllocatorError):
                self.memory.unmap(address, count)
            return
        self.memory.unmap(address, count)
        gone = {self.table.pop(page) for page in pages}
        if memory_twins.TWIN == "unguarded-host":  # what is mapped nowhere is forgotten there
            self.contents.update(dict.fromkeys(gone - set(self.table.values()), -1))

    @rule(doomed=st.lists(handles, max_size=4))
    def destroy(self, doomed: list[Handle]) -> None:
        legal = (
            len(set(doomed)) == len(doomed)
            and self.contents.keys() >= set(doomed)
            and not set(self.table.values()) & set(doomed)
        )
        if not legal:
            with pytest.raises(AllocatorError):
                self.memory.destroy(doomed)
            return
        self.memory.destroy(doomed)
        for handle in doomed:
            del self.contents[handle]

    @rule(data=st.data(), byte=st.integers(0, 255))
    def write(self, data: st.DataObject, byte: int) -> None:
        if self.table:
            address = data.draw(st.sampled_from(sorted(self.table)))
            fill(self.twin, address, byte)
            self.contents[self.table[address]] = byte

    @invariant()
    def every_address_shows_its_page(self) -> None:
        for address, handle in self.table.items():
            if (byte := self.contents[handle]) >= 0:
                assert first_and_last(self.twin, address) == (byte, byte)

    @invariant()
    def the_table_has_every_page_where_it_is(self) -> None:
        memory, counts = self.memory, Counter(self.table.values())
        assert dict(memory.all_mapped()) == self.table
        assert memory.counts == {handle: counts[handle] for handle in self.contents}
        ends = [slab[-1:] for held in memory.reservations.values() for slab in held.slabs]
        assert [NO_PAGE] not in ends

    @invariant()
    def kernel_mappings_are_counted_right(self) -> None:
        count = getattr(self.memory, "_kernel_mappings", None)
        if count is not None:
            assert count == kernel_mappings(self.memory)


def kernel_mappings(memory: VirtualMemory) -> int:
    """What the kernel itself says: lines of /proc/self/maps that overlap each reservation."""
    with open("/proc/self/maps") as maps:
        ranges = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps]
    return sum(
        low < base + held.size and high > base
        for base, held in memory.reservations.items()
        for low, high in ranges
    )


def test_random_operations() -> None:
    run_state_machine_as_test(
        lambda: MemoryMachine(memory_twins.open_twin(PAGE)),
        settings=settings(deadline=None, max_examples=examples(80), stateful_step_count=40),
    )
