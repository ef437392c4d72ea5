"""Pages mapped into several slots: which pages, which slots use them, and what must be copied.

Only prefixes are shared: a page lies at the same index in every slot that has it. The page on which
a prefix ends is copied up to that point:

    source      |  page 0  |  page 1  |  page 2  |  page 3  |
    shared          ||         ||       || copy
    new slot    |  page 0  |  page 1  |  page 9  |
    tokens      |<------ shared --------->|
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from batchrun.allocator.layout import KVLayout
from batchrun.allocator.slot import Slot
from batchrun.allocator.vmm import Handle


@dataclass(frozen=True, slots=True)
class MemoryCopy:
    """Bytes to copy in each plane of one slab group before the next step's kernels run.

    Attributes:
        group: the slab group.
        source: offset in bytes from `KVArena.address(group)`.
        target: offset in bytes from `KVArena.address(group)`.
        nbytes: how many, all on one page.
        slots: the slot whose page is read, and the one whose page is written.
    """

    group: int
    source: int
    target: int
    nbytes: int
    slots: tuple[int, int]


class RefCounts:
    """How many slots count each page as theirs.

    Attributes:
        counts: for each page that any slot counts.
        excess: counts beyond each page's first: the pages that sharing saves.
    """

    def __init__(self) -> None:
        self.counts: Counter[Handle] = Counter()
        self.excess = 0

    def add(self, handles: Sequence[Handle]) -> None:
        """Count these pages for one more slot."""
        for handle in handles:
            self.excess += handle in self.counts
            self.counts[handle] += 1

    def remove(self, handles: Sequence[Handle]) -> None:
        """Count these pages for one slot fewer."""
        for handle in handles:
            self.counts[handle] -= 1
            if self.counts[handle]:
                self.excess -= 1
            else:
                del self.counts[handle]


class Sharing:
    """The pages that slots have in common, counted as they change, and the copies ordered.

    Attributes:
        claims: aliased pages that open or kept slots claim.
        open_claims: aliased pages that open slots claim.
    """

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self.none = (0,) * layout.num_groups
        self.claims = RefCounts()
        self.open_claims = RefCounts()
        self.copies: list[tuple[int, MemoryCopy]] = []  # each with the step that it must precede

    def alias(self, slot: Slot, pages: tuple[int, ...]) -> None:
        """Set how many leading pages of a slot may be shared, and recount them."""
        slot.aliased, slot.aliased_end = pages, self._layout.tokens_on(pages)
        self.recount(slot)

    def recount(self, slot: Slot) -> None:
        """Recount a slot whose claim or aliased pages changed."""
        claimed = at_most(slot.aliased, slot.claimed)
        reach = claimed, claimed if slot.backed >= 0 else self.none
        was = slot.counted or (self.none, self.none)
        for counts, *each in zip((self.claims, self.open_claims), was, reach, strict=True):
            for table, before, after in zip(slot.tables, *each, strict=True):
                counts.add(table[before:after])
                counts.remove(table[after:before])
        slot.counted = reach

    def order(
        self, step: int, place: tuple[int, int], source: Slot, target: Slot, nbytes: int
    ) -> None:
        """Order a copy of the first bytes of a page, at a group and index, to another slot's page.

        The source keeps its page until the step is retired.
        """
        group, page = place
        source.fence = max(source.fence, step)
        at, slab = page * self._layout.page_size, self._layout.slab_size(group)
        slots = source.index, target.index
        begin, end = (index * slab + at for index in slots)
        copy = MemoryCopy(group, begin, end, nbytes, slots)
        self.copies.append((step, copy))

    def forget_copies(self, slot: Slot) -> None:
        """Drop the copies to unclaimed pages of a closing slot, unless another copy reads them.

        Pages that the remaining copies write stay until those copies are made.
        """
        size, read = self._layout.page_size, set[tuple[int, int]]()
        wanted: list[tuple[int, MemoryCopy]] = []
        for step, copy in reversed(self.copies):
            slab = self._layout.slab_size(copy.group)
            index, page = copy.target // slab, copy.target % slab // size
            if (
                index == slot.index
                and page >= slot.claimed[copy.group]
                and (copy.group, copy.target // size) not in read
            ):
                continue
            if index == slot.index:
                slot.fence = max(slot.fence, step)
            wanted.append((step, copy))
            read.add((copy.group, copy.source // size))
        self.copies = wanted[::-1]


def at_most(pages: tuple[int, ...], others: Sequence[int]) -> tuple[int, ...]:
    """The smaller of the two counts, per group."""
    return tuple(map(min, pages, others))
