"""What each slot has mapped and claimed, and how pages move from slot to slot."""

from time import perf_counter

from batchrun.allocator.accounting import Usage, paged_blocks, paged_bytes, static_bytes
from batchrun.allocator.layout import KVLayout
from batchrun.allocator.pages import PagePool, Work
from batchrun.allocator.sharing import Sharing, at_most
from batchrun.allocator.slot import Slot
from batchrun.allocator.vmm import AllocatorError, Handle, OutOfBudget, OutOfPages, VirtualMemory

_STEAL_PAGES = 8  # per slab, if there are many: one unmap then serves several requests


class SlotTable:
    """All slots of an arena, over the pages of its pool.

    Each slab group is one reservation, and each of its planes is cut into one slab per slot. A
    slab's pages are mapped in order from its start and unmapped from its end. `Slot.tables` are the
    memory's own lists of them.

    Attributes:
        slots: all slots, by index.
        closed: slots that may be opened: neither open nor kept.
        kept: closed slots that keep tokens.
        with_surplus: slots with mapped pages beyond their claim.
        counts: page -> number of slots that have it mapped.
        claims: claimed pages; a shared page counts once per claim.
        live_tokens: total over all slots.
        work: on pages, by `map`, `unmap`, `create` and `destroy`.
        retired: the last finished step.
        refusal: why the machine had no pages when a request for them last failed; empty if the
            budget was the reason.
    """

    def __init__(
        self, memory: VirtualMemory, layout: KVLayout, pool: PagePool, num_slots: int
    ) -> None:
        self.layout = layout
        self.pool = pool
        self.counts = memory.counts
        self.work = {"map": Work(), "unmap": Work()}
        self.work |= {"create": pool.creating, "destroy": pool.destroying}
        self.sharing = Sharing(layout)
        self._memory = memory
        self._bases: list[int] = []  # by group, where slot 0's slab begins
        try:
            for group in range(layout.num_groups):
                size = layout.slab_size(group)
                self._bases.append(memory.reserve(num_slots * size, size))
        except AllocatorError:
            self.free()
            raise
        none = self.none = self.sharing.none
        slabs = zip(*(memory.reservations[base].slabs for base in self._bases), strict=True)
        self.slots = [Slot(i, list(tables), none, none) for i, tables in enumerate(slabs)]
        self.closed = set(range(num_slots))
        self.kept: set[int] = set()
        self.with_surplus: set[int] = set()
        self.claims = 0
        self.live_tokens = 0
        self.live_blocks = 0  # blocks that a paged cache would use for them
        self.retired = -1
        self.refusal = ""

    @property
    def reserved(self) -> int:
        """Bytes of address space; 0 once freed."""
        reservations, planes = self._memory.reservations, self.layout.planes
        return sum(reservations[base].size for base in self._bases) * planes

    def address(self, group: int, slot: int = 0, page: int = 0) -> int:
        """Address of a page in a slab."""
        layout = self.layout
        return self._bases[group] + slot * layout.slab_size(group) + page * layout.page_size

    def free(self) -> None:
        """Give the address space back; nothing may be mapped in it."""
        for base in self._bases:
            self._memory.free(base, self._memory.reservations[base].size)
        self._bases.clear()

    @property
    def num_open(self) -> int:
        """Number of open slots."""
        return len(self.slots) - len(self.closed) - len(self.kept)

    @property
    def claimed_pages(self) -> int:
        """Pages that open and kept slots claim, each counted once."""
        return self.claims - self.sharing.claims.excess

    def usage(self) -> Usage:
        """See `KVArena.usage`."""
        layout = self.layout
        shared = self.sharing.open_claims.excess * layout.page_bytes
        return Usage(
            reserved=self.reserved,
            mapped=self.pool.created * layout.page_bytes,
            live=self.live_tokens * layout.bytes_per_token - shared,  # shared pages are full
            shared=shared,
            static=static_bytes(layout, self.num_open),
            paged=paged_bytes(layout, self.live_blocks),
            work={name: Work(w.calls, w.seconds) for name, w in self.work.items()},
        )

    def closest(self, wanted: tuple[int, ...]) -> Slot | None:
        """The closed slot that may be opened now and whose pages fit best.

        Slots without shared pages come first, then those with enough pages.
        """
        total = sum(wanted)

        def misfit(slot: Slot) -> tuple[bool, bool, int, int]:
            pages = slot.num_pages
            return slot.aliased_end > 0, pages < total, abs(pages - total), slot.index

        closed = map(self.slots.__getitem__, self.closed)
        free = (s for s in closed if not s.aliased_end or s.fence <= self.retired)
        return min(free, key=misfit, default=None)

    def missing(self, slot: Slot, wanted: tuple[int, ...]) -> list[int]:
        """How many of the wanted pages each slab of a slot lacks."""
        return [max(0, n - len(table)) for n, table in zip(wanted, slot.tables, strict=True)]

    def extend(self, slot: Slot, num_tokens: int) -> bool:
        """Claim and map pages for more tokens than `slot.backed`; False if there are none."""
        slot.check_open()
        most = self.layout.max_tokens
        if not 0 <= num_tokens <= most:
            raise AllocatorError(
                f"slot {slot.index} cannot hold {num_tokens} tokens: a slot has {most}"
            )
        wanted = self.layout.pages_for(num_tokens)
        missing = self.missing(slot, wanted)
        if any(missing):
            before = slot.claimed
            # Claim the wanted pages that the slot already has, so that stealing can't take them.
            self.claim(slot, at_most(wanted, slot.lengths))
            if not self.map(slot, missing):
                self.claim(slot, at_most(before, slot.lengths))
                return False
        self.claim(slot, wanted)
        return True

    def share(self, slot: Slot, origin: Slot, num_shared: int, step: int) -> bool:
        """Give a closed slot the pages of another's first tokens, and order copies of parts.

        Returns:
            False if there are no pages for it. The slot then stays closed, with the pages it could
            keep.
        """
        layout = self.layout
        whole, wanted = layout.whole_pages(num_shared), layout.pages_for(num_shared)
        fence, origin.fence = origin.fence, max(origin.fence, step)  # steal nothing from it
        self.cut(slot, self.usable(slot, whole, origin.tables))
        has = slot.lengths
        self.claim(slot, at_most(wanted, has))
        aliases = [t[n:w] for t, n, w in zip(origin.tables, has, whole, strict=True)]
        copies = [int(n <= w < c) for n, w, c in zip(has, whole, wanted, strict=True)]
        mapped = self.map(slot, copies, aliases)
        origin.fence = fence
        if not mapped:
            self.claim(slot, self.none, is_open=False)
            return False
        self.sharing.alias(origin, tuple(map(max, origin.aliased, whole)))
        self.sharing.alias(slot, whole)
        for group, page in enumerate(whole):
            rest = num_shared * layout.group_bytes_per_token(group) - page * layout.page_size
            if rest:
                self.sharing.order(step, (group, page), origin, slot, rest)
        return True

    def map(self, slot: Slot, counts: list[int], shared: list[list[Handle]] | None = None) -> bool:
        """Map more pages at the end of each slab of a slot.

        Args:
            slot: the slot.
            counts: pages to take from the pool, per group.
            shared: pages in use elsewhere, per group, which are mapped before those.

        Returns:
            False if there are not enough pages; nothing is mapped then.
        """
        shared = shared or [[]] * len(counts)
        self.steal(sum(counts) - self.pool.free, self.retired)
        fresh: list[Handle] = []
        mapped: list[tuple[int, int]] = []  # address, pages
        try:
            fresh = self.pool.acquire(sum(counts))
            used = 0
            for group, (table, count) in enumerate(zip(slot.tables, counts, strict=True)):
                run = [*shared[group], *fresh[used : used + count]]
                if run:
                    address = self.address(group, slot.index, len(table))
                    begin = perf_counter()
                    self._memory.map(address, run)
                    self.work["map"].add(begin)
                    mapped.append((address, len(run)))
                    used += count
        except AllocatorError as error:
            for address, pages in mapped:
                self._memory.unmap(address, pages)
            self.pool.release(fresh)
            if not isinstance(error, OutOfPages):
                raise
            self.refusal = "" if isinstance(error, OutOfBudget) else str(error)
            return False
        slot.num_pages += sum(pages for _, pages in mapped)
        self.refusal = ""
        return True

    def sharer(self, origin: Slot, whole: tuple[int, ...], total: int) -> Slot | None:
        """The closed slot that can take the leading pages `whole` of another slot most cheaply."""
        costs: list[tuple[int, int, int]] = []
        for index in self.closed - {origin.index}:
            slot = self.slots[index]
            keep = self.usable(slot, whole, origin.tables) if slot.num_pages else self.none
            lost = slot.num_pages - sum(keep)
            if not lost or slot.fence <= self.retired:
                missing = sum(whole) - sum(at_most(whole, keep))
                costs.append((lost + missing, abs(sum(keep) - total), index))
        return self.slots[min(costs)[-1]] if costs else None

    def usable(
        self, slot: Slot, whole: tuple[int, ...], tables: list[list[Handle]]
    ) -> tuple[int, ...]:
        """Pages of each slab that may stay when a closed slot gets the pages `whole` of `tables`.

        These are the pages that it already has and, if it has them all, the pages after them that
        are in no other slot.
        """
        keep = []
        for own, theirs, count, aliased in zip(
            slot.tables, tables, whole, slot.aliased, strict=True
        ):
            if own[:count] == theirs[:count]:
                rest = (p for p in range(count, aliased) if self.counts[own[p]] > 1)
            else:
                rest = (p for p, handle in enumerate(own) if handle != theirs[p])
            keep.append(next(rest, len(own)))
        return tuple(keep)

    def steal(self, count: int, fence: int, *, more: bool = True) -> None:
        """Free `count` pages, or as many as possible, from surplus that no step reads.

        Closed slots give first; among them the largest surplus first and shared pages last. Only
        slots whose fence is at most `fence` give. With `more` they give some extra, as further
        requests are likely.
        """
        while count > 0 and self.pool.in_use > self.claimed_pages:
            givers = [s for i in self.with_surplus if (s := self.slots[i]).fence <= fence]
            closed = [s for s in givers if s.backed < 0]
            giver = self._largest(closed) or self._largest(givers)
            if giver is None:
                return
            half = min(_STEAL_PAGES * self.layout.num_groups, giver.surplus // 2)
            count -= self._strip(giver, max(count, _STEAL_PAGES, half) if more else count)

    def _largest(self, givers: list[Slot]) -> Slot | None:
        """The slot with the largest unshared surplus; else one with pages nobody claims."""
        best = max(givers, key=lambda s: (s.unaliased_surplus, s.index), default=None)
        if best is None or best.unaliased_surplus:
            return best
        return next((s for s in givers if sum(self._floor(s)) < s.num_pages), None)

    def _floor(self, slot: Slot) -> tuple[int, ...]:
        """Pages of each slab that must stay: no slot claims the page after them."""
        if not slot.aliased_end:
            return slot.claimed
        claims, floor = self.sharing.claims.counts, []
        for table, claimed in zip(slot.tables, slot.claimed, strict=True):
            loose = (p for p in range(claimed, len(table)) if table[p] not in claims)
            floor.append(next(loose, len(table)))
        return tuple(floor)

    def _strip(self, slot: Slot, count: int) -> int:
        """Unmap up to `count` surplus pages of a slot. Returns how many pages became free."""
        keep = []
        for table, floor in zip(slot.tables, self._floor(slot), strict=True):
            pages = max(0, min(len(table) - floor, count))
            keep.append(len(table) - pages)
            count -= pages
        return self.cut(slot, tuple(keep))

    def cut(self, slot: Slot, keep: tuple[int, ...]) -> int:
        """Unmap a slot's pages past `keep` in each slab. Returns how many became free."""
        freed = 0
        for group, (table, count) in enumerate(zip(slot.tables, keep, strict=True)):
            if count < len(table):
                pages = table[count:]
                slot.num_pages -= len(pages)
                begin = perf_counter()
                self._memory.unmap(self.address(group, slot.index, count), len(pages))
                self.work["unmap"].add(begin)
                freed += self.pool.release(pages)
        if slot.aliased_end:
            self.sharing.alias(slot, at_most(slot.aliased, keep))
        if not slot.surplus:
            self.with_surplus.discard(slot.index)
        return freed

    def claim(self, slot: Slot, pages: tuple[int, ...], *, is_open: bool = True) -> None:
        """Set which pages of a slot may be in use, and whether it is open."""
        total = sum(pages)
        self.claims += total - slot.num_claimed
        slot.claimed, slot.num_claimed = pages, total
        slot.backed = self.layout.tokens_in(pages) if is_open else -1
        if slot.surplus:
            self.with_surplus.add(slot.index)
        else:
            self.with_surplus.discard(slot.index)
        if slot.aliased_end:
            self.sharing.recount(slot)

    def set_live(self, slot: Slot, num_tokens: int) -> None:
        """Set how many tokens of an open slot are live."""
        before, slot.tokens = slot.tokens, num_tokens
        self.live_tokens += num_tokens - before
        self.live_blocks += paged_blocks(num_tokens) - paged_blocks(before)
