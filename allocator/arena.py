"""The KV cache of a batch: slots of contiguous addresses, with pages under the tokens there are.

Every slot has one slab per layer group, in one reservation per group. Pages are mapped from a
slab's begin, in order, and leave it from its end:

    slab of a slot  |<-- live tokens -->|                         |
                    |<------- claimed pages ------>|<- surplus -->|<------ unmapped ------>|

Claimed pages are those that a running step may touch. Surplus, which is all that a closed slot
has, stays mapped until another sequence wants the pages, because whoever opens the slot next saves
mapping them (the deferred reclamation of vAttention, https://arxiv.org/abs/2405.04437).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .accounting import Usage, paged_blocks, paged_bytes, static_bytes
from .layout import KVLayout
from .pages import PagePool
from .slabs import Slabs
from .vmm import AllocatorError, Handle, OutOfPages, VirtualMemory

_STEAL_PAGES = 8  # Steal a few pages more than are wanted: one unmap then serves several requests.
_SPARE_PAGES = 4  # Unused pages that are never too many.


@dataclass(slots=True)
class _Slot:
    index: int
    tables: list[list[Handle]]  # per group, the mapped pages from the slab's begin on (Slabs')
    claimed: tuple[int, ...]  # per group, pages that may be in use; at most len(table)
    backed: int = -1  # tokens that the claimed pages hold; -1 when closed
    tokens: int = 0  # live tokens
    fence: int = -1  # the surplus may be read until this step is retired
    num_pages: int = 0
    num_claimed: int = 0

    @property
    def surplus(self) -> int:
        return self.num_pages - self.num_claimed


class KVArena:
    """Slots for sequences that grow in place, over physical pages taken and returned on demand.

    Pages for a growing slot come, in this order, from the pool's free pages, from the surplus of
    closed slots, from the surplus of open ones, and from growing the pool: physical memory stays
    close to what is live. `retire`, best called while the next step computes, creates pages until
    as many are unused as the last step took, and gives back to the machine what is unused beyond
    `slack` or held beyond a budget that has shrunk.

    Steps are numbers that rise. Work on the memory is launched in steps, in order; `close` names
    the last step that may touch a slot, and only `retire` of that step lets its pages go.

    Args:
        memory: where address space and pages come from; stays the caller's to close.
        layout: what a token is. `layout.page_size` must be `memory.granularity`.
        num_slots: sequences that can be open at once.
        budget: bytes of pages to hold at most: a number, or a function that says it, asked once
            at each growth and each `retire`; None for as much as the machine has.
        slack: unused pages to keep, as a part of the claimed ones.
    """

    def __init__(
        self,
        memory: VirtualMemory,
        layout: KVLayout,
        *,
        num_slots: int,
        budget: int | Callable[[], int] | None = None,
        slack: float = 0.05,
    ) -> None:
        if layout.page_size != memory.granularity:
            raise AllocatorError(
                f"the layout's pages have {layout.page_size} bytes, the memory's "
                f"{memory.granularity}"
            )
        if num_slots < 1 or slack < 0:
            raise AllocatorError(f"num_slots {num_slots} is below 1, or slack {slack} below 0")
        self.memory = memory
        self.layout = layout
        self.num_slots = num_slots
        self.slack = slack
        self.pool = PagePool(memory, budget)
        self._slabs = Slabs(memory, layout, self.pool, num_slots)
        self._none = (0,) * layout.num_groups
        self._slots = [
            _Slot(index, tables, self._none) for index, tables in enumerate(self._slabs.tables)
        ]
        self._closed = set(range(num_slots))
        self._with_surplus: set[int] = set()
        self._claimed_pages = 0
        self._live_tokens = 0
        self._live_blocks = 0
        self._retired = -1
        self._acquired = 0  # by the pool's count, when a step was last retired

    def open(self, num_tokens: int = 0) -> int | None:
        """Take a closed slot: the one whose pages fit `num_tokens` best. Maps nothing.

        The pages it has for the first `num_tokens` tokens are claimed at once.

        Returns:
            The slot, or None when all are open.
        """
        if not self._slabs.reserved:
            raise AllocatorError("this KVArena is released")
        if not self._closed:
            return None
        wanted = self.layout.pages_for(num_tokens)
        total = sum(wanted)

        def misfit(index: int) -> tuple[bool, int, int]:
            pages = self._slots[index].num_pages
            return pages < total, abs(pages - total), index

        slot = self._slots[min(self._closed, key=misfit)]
        self._closed.remove(slot.index)
        self._claim(slot, _at_most(wanted, slot.tables))
        return slot.index

    def ensure(self, slot: int, num_tokens: int) -> bool:
        """Put pages behind the tokens [0, num_tokens) of an open slot, which become its live ones.

        New pages hold undefined bytes. What the slot held stays. Asking for fewer tokens than
        before unmaps nothing.

        Returns:
            False when there are no pages for it. The slot then holds what it held, in every group.

        Raises:
            AllocatorError: the slot is not open, or cannot hold `num_tokens`.
        """
        state = self._slots[slot]
        if not 0 <= num_tokens <= state.backed and not self._extend(state, num_tokens):
            return False
        before = state.tokens
        if num_tokens != before:
            state.tokens = num_tokens
            self._live_tokens += num_tokens - before
            self._live_blocks += paged_blocks(num_tokens) - paged_blocks(before)
        return True

    def close(self, slot: int, step: int) -> None:
        """End a slot's sequence. Its pages stay mapped for the next, or until they are wanted.

        Args:
            slot: an open slot.
            step: the last step that may touch the slot. Its pages stay until that is retired.
        """
        state = self._slots[slot]
        self._check_slot_open(state)
        self._live_tokens -= state.tokens
        self._live_blocks -= paged_blocks(state.tokens)
        state.tokens = 0
        state.fence = max(state.fence, step)
        self._claim(state, self._none)
        state.backed = -1
        self._closed.add(slot)

    def retire(self, step: int) -> None:
        """Declare all steps up to `step` finished, and bring the pool to the size it should have.

        Pages unused beyond `slack` are destroyed, except those that became unused in the steps
        retired by this very call, because the next sequence may be about to open their slot. Of a
        pool beyond its budget, everything unused is. Within both, pages are created ahead of need.
        """
        settled, self._retired = self._retired, max(step, self._retired)
        pool = self.pool
        pool.retire(self._retired)
        demand, self._acquired = pool.acquired - self._acquired, pool.acquired
        budget = pool.page_budget()
        unused = pool.created - pool.parked - self._claimed_pages
        allowed = _SPARE_PAGES + int(self.slack * self._claimed_pages)
        over = 0 if budget is None else pool.created - budget
        excess = max(unused - allowed, over)
        if excess > 0:
            self._steal(excess - pool.free, self._retired if over > 0 else settled)
            pool.shrink(max(0, pool.free - excess))
        else:
            pool.stock(min(demand, allowed) - unused, budget)

    def trim(self) -> None:
        """Destroy every page that no open slot has claimed and no unfinished step may read."""
        self._steal(self.pool.created, self._retired)
        self.pool.shrink()

    def can_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` tokens could be held if it were alone."""
        budget = self.pool.page_budget()
        return 0 <= num_tokens <= self.layout.max_tokens and (
            budget is None or self.layout.total_pages_for(num_tokens) <= budget
        )

    def address(self, group: int) -> int:
        """Where slot 0's slab of `group` begins; slot s's is s * `layout.slab_size(group)` on."""
        return self._slabs.address(group)

    def live_tokens(self, slot: int) -> int:
        """Tokens that `ensure` was last asked for; 0 in a closed slot."""
        return self._slots[slot].tokens

    def mapped_pages(self, slot: int) -> int:
        """Pages mapped in a slot, used or not, in all groups."""
        return self._slots[slot].num_pages

    @property
    def num_open(self) -> int:
        """Slots that are open."""
        return self.num_slots - len(self._closed)

    def usage(self) -> Usage:
        """What is reserved, mapped and live now. Cheap: nothing is counted up for it."""
        layout, pool, slabs = self.layout, self.pool, self._slabs
        return Usage(
            reserved=slabs.reserved,
            mapped=pool.created * layout.page_size,
            live=self._live_tokens * layout.bytes_per_token,
            static=static_bytes(layout, self.num_open),
            paged=paged_bytes(layout, self._live_blocks),
            map_calls=slabs.mapping.calls,
            unmap_calls=slabs.unmapping.calls,
            create_calls=pool.create_calls,
            destroy_calls=pool.destroy_calls,
            map_seconds=slabs.mapping.seconds,
            unmap_seconds=slabs.unmapping.seconds,
            create_seconds=pool.create_seconds,
            destroy_seconds=pool.destroy_seconds,
        )

    def release(self) -> None:
        """Close all slots and give everything back. No step may be unfinished. Idempotent."""
        for slot in self._slots:
            if slot.index not in self._closed:
                self.close(slot.index, self._retired)
            self._strip(slot, slot.num_pages)
        self._with_surplus.clear()
        self.pool.shrink()
        self._slabs.free()

    def check(self) -> None:
        """Raise AssertionError, with what is wrong, unless every invariant holds."""
        self.pool.check()
        layout, references = self.layout, Counter[Handle]()
        for slot in self._slots:
            at, pages = f"slot {slot.index}", tuple(len(table) for table in slot.tables)
            assert slot.num_pages == sum(pages), f"{at}: {slot.num_pages} pages, table {pages}"
            assert slot.num_claimed == sum(slot.claimed), f"{at}: claim {slot.claimed}"
            assert all(c <= p for c, p in zip(slot.claimed, pages, strict=True)), (
                f"{at}: claims {slot.claimed} of {pages} pages"
            )
            if slot.index in self._closed:
                state = (slot.backed, slot.tokens, slot.num_claimed)
                assert state == (-1, 0, 0), f"{at} is closed with {state}"
            else:
                backed = layout.tokens_in(slot.claimed)
                assert slot.tokens <= slot.backed == backed, (
                    f"{at}: {slot.tokens} live, {slot.backed} backed, {backed} fit the claim"
                )
            assert (slot.surplus > 0) == (slot.index in self._with_surplus), f"{at}: surplus"
            for table in slot.tables:
                references.update(table)
        for handle, count in references.items():
            held = self.pool.references(handle)
            assert held == count, f"page {handle} is mapped {count} times, has {held} references"
        assert self.pool.in_use == len(references), "a page in use is mapped nowhere"
        tokens = [slot.tokens for slot in self._slots]
        assert self._live_tokens == sum(tokens), f"{self._live_tokens} live, slots have {tokens}"
        assert self._live_blocks == sum(map(paged_blocks, tokens)), "paged blocks"
        assert self._claimed_pages == sum(s.num_claimed for s in self._slots), "claimed pages"

    def _extend(self, slot: _Slot, num_tokens: int) -> bool:
        """Claim and map pages for more tokens than `slot.backed`."""
        self._check_slot_open(slot)
        if not 0 <= num_tokens <= self.layout.max_tokens:
            raise AllocatorError(
                f"slot {slot.index} cannot hold {num_tokens} tokens: a slot has "
                f"{self.layout.max_tokens}"
            )
        wanted = self.layout.pages_for(num_tokens)
        missing = [max(0, n - len(t)) for n, t in zip(wanted, slot.tables, strict=True)]
        if any(missing):
            before = slot.claimed
            # What the slot has of the wanted pages is claimed first: stealing must not take it.
            self._claim(slot, _at_most(wanted, slot.tables))
            self._steal(sum(missing) - self.pool.free, self._retired)
            try:
                self._slabs.extend(slot.index, missing)
            except OutOfPages:
                self._claim(slot, _at_most(before, slot.tables))
                return False
            slot.num_pages += sum(missing)
        self._claim(slot, wanted)
        return True

    def _steal(self, count: int, fence: int) -> None:
        """Free `count` pages, or as many as there are, from surplus that no step reads.

        Closed slots give first, and the largest surplus first. Only slots whose fence is at most
        `fence` give.
        """
        while count > 0:
            givers = [s for i in self._with_surplus if (s := self._slots[i]).fence <= fence]
            if not givers:
                return
            giver = max(givers, key=lambda s: (s.backed < 0, s.surplus, s.index))
            count -= self._strip(giver, max(count, _STEAL_PAGES))

    def _strip(self, slot: _Slot, count: int) -> int:
        """Unmap up to `count` surplus pages of a slot. Returns how many pages became free."""
        freed = taken = 0
        for group, (table, claimed) in enumerate(zip(slot.tables, slot.claimed, strict=True)):
            pages = min(len(table) - claimed, count - taken)
            if pages > 0:
                freed += self._slabs.cut(slot.index, group, len(table) - pages)
                slot.num_pages -= pages
                taken += pages
        if not slot.surplus:
            self._with_surplus.discard(slot.index)
        return freed

    def _claim(self, slot: _Slot, pages: tuple[int, ...]) -> None:
        """Set the pages of an open slot that may be in use."""
        total = sum(pages)
        self._claimed_pages += total - slot.num_claimed
        slot.claimed, slot.num_claimed = pages, total
        slot.backed = self.layout.tokens_in(pages)
        if slot.surplus:
            self._with_surplus.add(slot.index)
        else:
            self._with_surplus.discard(slot.index)

    def _check_slot_open(self, slot: _Slot) -> None:
        if slot.index in self._closed:
            raise AllocatorError(f"slot {slot.index} is not open")


def _at_most(pages: tuple[int, ...], tables: list[list[Handle]]) -> tuple[int, ...]:
    return tuple(min(count, len(table)) for count, table in zip(pages, tables, strict=True))
