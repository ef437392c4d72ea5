"""The address space of all slots, and how pages are put behind it."""

from collections.abc import Sequence
from time import perf_counter

from batchrun.allocator.layout import KVLayout
from batchrun.allocator.pages import PagePool, Work
from batchrun.allocator.vmm import AllocatorError, Handle, VirtualMemory


class Slabs:
    """One reservation per slab group, each plane of it cut into one slab per slot.

    A slab's pages are mapped from its begin on, in order, and leave it from its end.

    Attributes:
        tables: tables[slot][group] are the pages mapped in a slab, from its begin on: the memory's
            own lists, which change as pages are mapped and unmapped.
        mapping, unmapping: the work done so far.
    """

    def __init__(
        self, memory: VirtualMemory, layout: KVLayout, pool: PagePool, num_slots: int
    ) -> None:
        self._memory = memory
        self._pool = pool
        self._page_size = layout.page_size
        self._planes = layout.planes
        self._sizes = [layout.slab_size(group) for group in range(layout.num_groups)]
        self._num_slots = num_slots
        self._bases: list[int] = []
        self.mapping = Work()
        self.unmapping = Work()
        try:
            for size in self._sizes:
                self._bases.append(memory.reserve(num_slots * size, size))
        except AllocatorError:
            self.free()
            raise
        groups = [memory.reservations[base].slabs for base in self._bases]
        self.tables: list[list[list[Handle]]] = list(map(list, zip(*groups, strict=True)))

    @property
    def reserved(self) -> int:
        """Bytes of address space; 0 once freed."""
        return self._num_slots * sum(self._sizes) * self._planes if self._bases else 0

    def address(self, group: int, slot: int = 0, page: int = 0) -> int:
        """Address of a page of a slab."""
        return self._bases[group] + slot * self._sizes[group] + page * self._page_size

    def extend(
        self, slot: int, counts: Sequence[int], shared: Sequence[Sequence[Handle]] | None = None
    ) -> None:
        """Map more pages at the end of each slab, or none at all.

        Args:
            slot: whose slabs.
            counts: per group, pages of the pool.
            shared: per group, pages in use elsewhere, which come before those.

        Raises:
            OutOfPages: the pool has too few pages, or the system no room for the mappings.
        """
        shared = shared or [()] * len(counts)
        fresh = self._pool.acquire(sum(counts))
        mapped: list[tuple[int, int]] = []  # address, pages
        used = 0
        try:
            for group, (table, count) in enumerate(zip(self.tables[slot], counts, strict=True)):
                run = [*shared[group], *fresh[used : used + count]]
                if run:
                    address = self.address(group, slot, len(table))
                    begin = perf_counter()
                    self._memory.map(address, run)
                    self.mapping.add(begin)
                    mapped.append((address, len(run)))
                    used += count
        except AllocatorError:
            for address, pages in mapped:
                self._memory.unmap(address, pages)
            self._pool.release(fresh)
            raise

    def replace(self, slot: int, group: int, page: int, fresh: Handle) -> Handle:
        """Map an acquired page in the place of another, which is returned and released.

        Raises:
            OutOfPages: the system has no room for the mapping. The page is what it was.
        """
        old, address = self.tables[slot][group][page], self.address(group, slot, page)
        begin = perf_counter()
        self._memory.unmap(address, 1)
        self.unmapping.add(begin)
        begin = perf_counter()
        try:
            self._memory.map(address, [fresh])
        except AllocatorError:
            self._memory.map(address, [old])
            raise
        self.mapping.add(begin)
        self._pool.release([old])
        return old

    def cut(self, slot: int, group: int, keep: int) -> int:
        """Unmap a slab's pages from page `keep` on. Returns how many pages became free."""
        pages = self.tables[slot][group][keep:]
        begin = perf_counter()
        self._memory.unmap(self.address(group, slot, keep), len(pages))
        self.unmapping.add(begin)
        return self._pool.release(pages)

    def free(self) -> None:
        """Give the address space back; nothing may be mapped in it."""
        for base, size in zip(self._bases, self._sizes, strict=False):
            self._memory.free(base, self._num_slots * size)
        self._bases.clear()
