"""The KV cache of a batch: slots of contiguous addresses, with pages only where tokens need them.

Every slot has one slab per layer group, or one in each plane of the group. Pages are mapped in
order from the start of a slab and unmapped from its end:

    slab of a slot  |<-- live tokens -->|                         |
                    |<------- claimed pages ------>|<- surplus -->|<------ unmapped ------>|

A running step may touch only claimed pages. Surplus pages stay mapped until another sequence needs
them, so the next sequence in the slot need not map them again (the deferred reclamation of
vAttention, https://arxiv.org/abs/2405.04437). In a closed slot every page is surplus.

A page may be mapped in several slots (see `sharing`). A slot shares only pages that lie before the
end of its live tokens, so nothing writes to them.
"""

from collections.abc import Callable, Iterable

from batchrun.allocator.accounting import Usage
from batchrun.allocator.layout import KVLayout
from batchrun.allocator.pages import PagePool
from batchrun.allocator.sharing import MemoryCopy, at_most
from batchrun.allocator.slots import SlotTable
from batchrun.allocator.vmm import AllocatorError, VirtualMemory

_SPARE_PAGES = 4  # Unused pages that are always allowed.


class KVArena:
    """Slots for sequences that grow in place, over physical pages taken and returned on demand.

    A growing slot takes pages from the pool's free pages first, then from the surplus of closed
    slots, then from the surplus of open ones; only then does the pool grow. Physical memory thus
    stays close to what is live. `retire`, best called while the next step computes, creates pages
    until as many are unused as the last step took. It returns to the machine the unused pages
    beyond `slack`, and those held beyond a budget that has shrunk.

    Step numbers increase. Work on the memory is launched step by step, in order. `close` names the
    last step that may touch a slot, and the slot's pages are released only when `retire` reaches
    that step.

    Args:
        memory: source of address space and pages; the caller still closes it.
        layout: the layout of a token. Its pages and planes must match the memory's.
        num_slots: sequences that can be open at once.
        budget: maximum bytes of pages to hold: a number, or a function that returns it, called once
            after each `retire`; None for as much as the machine has.
        slack: unused pages to keep, as a fraction of the claimed ones.
        give_back: maximum number of excess pages to return in one `retire`, so that none takes
            long; ignored while the budget is exceeded. None for no limit.
    """

    def __init__(
        self,
        memory: VirtualMemory,
        layout: KVLayout,
        *,
        num_slots: int,
        budget: int | Callable[[], int] | None = None,
        slack: float = 0.05,
        give_back: int | None = None,
    ) -> None:
        wanted, has = (layout.page_size, layout.planes), (memory.granularity, memory.planes)
        if wanted != has:
            raise AllocatorError(
                f"the layout's pages have {wanted[0]} bytes in each of {wanted[1]} planes, but the "
                f"memory's have {has[0]} bytes in each of {has[1]}"
            )
        if num_slots < 1 or slack < 0:
            raise AllocatorError(f"num_slots {num_slots} is below 1, or slack {slack} below 0")
        self.memory = memory
        self.layout = layout
        self.num_slots = num_slots
        self.slack = slack
        self.give_back = give_back
        self.pool = PagePool(memory, budget)
        self._table = SlotTable(memory, layout, self.pool, num_slots)
        self._slots = self._table.slots
        self._sharing = self._table.sharing
        self._acquired = 0  # `pool.acquired` when a step was last retired

    def open(self, num_tokens: int = 0) -> int | None:
        """Open the closed slot whose pages fit `num_tokens` best. Maps nothing.

        The pages it already has for the first `num_tokens` tokens are claimed at once. Slots
        without shared pages are preferred; if another must be taken, its shared pages and those
        after them are unmapped.

        Returns:
            The slot; None when every slot is open, kept, or has shared pages that an unfinished
            step may read.
        """
        if not self._table.reserved:
            raise AllocatorError("this KVArena is released")
        wanted = self.layout.pages_for(num_tokens)
        slot = self._table.closest(wanted)
        if slot is None:
            return None
        if slot.aliased_end:
            self._table.cut(slot, self._table.usable(slot, self._table.none, slot.tables))
            self._sharing.alias(slot, self._table.none)
        self._table.closed.remove(slot.index)
        self._table.claim(slot, at_most(wanted, slot.lengths))
        return slot.index

    def ensure(self, slot: int, num_tokens: int) -> bool:
        """Make the tokens [0, num_tokens) of an open slot live, with pages mapped under them.

        New pages hold undefined bytes. What the slot already held is unchanged. Asking for fewer
        tokens than before unmaps nothing; tokens that the slot shares stay live, so that nothing
        writes to them.

        Args:
            slot: an open slot.
            num_tokens: tokens that will be live; those that are live already are unchanged.

        Returns:
            False when pages run out. The slot then holds what it held before, in every group.

        Raises:
            AllocatorError: the slot is not open, cannot hold `num_tokens`, or shares more tokens
                than that.
        """
        state = self._slots[slot]
        if not 0 <= num_tokens <= state.backed and not self._table.extend(state, num_tokens):
            return False
        if num_tokens < state.aliased_end:
            raise AllocatorError(
                f"slot {slot} shares {state.aliased_end} tokens; it can't be cut to {num_tokens}"
            )
        self._table.set_live(state, num_tokens)
        return True

    def share(self, source: int, num_shared: int, num_tokens: int, step: int) -> int | None:
        """Open a slot whose live tokens are the first `num_shared` tokens of `source`.

        Whole pages of the source are mapped here too. In each group, a copy of the page on which
        the shared tokens end is ordered (see `take_copies`). A closed slot that already has the
        pages is preferred, then the one that needs the least mapping and unmapping.

        Args:
            source: an open slot with at least `num_shared` live tokens, or a closed or kept one
                that still has the pages. The caller must know that its bytes are right and were
                written by steps before `step`.
            num_shared: tokens to share.
            num_tokens: how long the new sequence may become, as in `open`.
            step: the copies are made before this step's kernels; until it is retired, a source that
                is copied from keeps its pages.

        Returns:
            The slot, or None when no slot, or no page for the copies, is available now. Then
            nothing has changed, except that unclaimed pages may have been reclaimed.

        Raises:
            AllocatorError: the source has fewer tokens, or the step is retired.
        """
        origin, layout = self._slots[source], self.layout
        held = self.held_tokens(source)
        if not 0 <= num_shared <= held:
            raise AllocatorError(f"slot {source} has {held} tokens; {num_shared} can't be shared")
        if step <= self._table.retired:
            raise AllocatorError(f"step {step} is retired; copies can't be made before it")
        expected = layout.pages_for(max(num_shared, num_tokens))
        slot = self._table.sharer(origin, layout.whole_pages(num_shared), sum(expected))
        if slot is None or not self._table.share(slot, origin, num_shared, step):
            return None
        self._table.closed.remove(slot.index)
        self._table.claim(slot, at_most(expected, slot.lengths))
        self._table.set_live(slot, num_shared)
        return slot.index

    def fork(self, source: int, step: int) -> int | None:
        """Open a slot with all live tokens of an open slot: see `share`."""
        state = self._slots[source]
        state.check_open()
        return self.share(source, state.tokens, state.tokens, step)

    def take_copies(self) -> tuple[MemoryCopy, ...]:
        """Take the copies ordered since the last call, to be made before the next step.

        Make them before that step's kernels but after those of earlier steps, and in this order: a
        copy may read what an earlier one has written.
        """
        copies, self._sharing.copies = self._sharing.copies, []
        return tuple(copy for _, copy in copies)

    def close(self, slot: int, step: int, keep: int = 0) -> None:
        """End a slot's sequence. Its pages stay mapped for the next one, or until they are needed.

        Copies into the slot that have not been taken are dropped, except those whose target is kept
        or copied on.

        Args:
            slot: an open slot.
            step: the last step that may touch the slot. Its pages stay until that step is retired.
            keep: live tokens whose pages stay claimed until `drop`. A kept slot is not opened, but
                can be shared from.
        """
        state = self._slots[slot]
        state.check_open()
        if not 0 <= keep <= state.tokens:
            raise AllocatorError(f"slot {slot} has {state.tokens} tokens; {keep} can't be kept")
        self._table.set_live(state, 0)
        state.fence = max(state.fence, step)
        self._table.claim(state, self.layout.pages_for(keep), is_open=False)
        state.kept = keep
        (self._table.kept if keep else self._table.closed).add(slot)
        self._sharing.forget_copies(state)

    def drop(self, slot: int) -> None:
        """Release what a kept slot keeps, which makes it an ordinary closed slot."""
        if slot not in self._table.kept:
            raise AllocatorError(f"slot {slot} keeps nothing")
        state = self._slots[slot]
        state.kept = 0
        self._table.kept.remove(slot)
        self._table.closed.add(slot)
        self._table.claim(state, self._table.none, is_open=False)
        self._sharing.forget_copies(state)

    def retire(self, step: int, coming: Iterable[tuple[int, int]] = (), others: int = 0) -> None:
        """Declare all steps up to `step` finished, and adjust the size of the pool.

        Unused pages beyond `slack` are destroyed, except those that became unused in the steps
        retired by this very call, because the next sequence may be about to open their slot. A pool
        over its budget loses unused pages until it is within the budget. Otherwise pages are
        created ahead of need.

        Args:
            step: the last finished step.
            coming: open slots, and how many tokens will soon be live in each. Pages for them are
                created and kept; without `coming`, as many as the last step took, within `slack`.
            others: tokens that will soon be live in slots that are not open yet.
        """
        settled, self._table.retired = self._table.retired, max(step, self._table.retired)
        pool = self.pool
        pool.remeasure()
        demand, self._acquired = pool.acquired - self._acquired, pool.acquired
        budget = pool.page_budget()
        unused = pool.created - self._table.claimed_pages
        slots = self._slots  # most have claimed what is coming already: skip those
        pages_for, lacks = self.layout.pages_for, self._table.missing
        missing = sum(sum(lacks(slots[s], pages_for(n))) for s, n in coming if n > slots[s].backed)
        missing += -(-others * self.layout.bytes_per_token // self.layout.page_bytes)
        allowed = max(missing, _SPARE_PAGES + int(self.slack * self._table.claimed_pages))
        over = 0 if budget is None else pool.created - budget
        excess = max(unused - allowed, over)
        if excess > 0:
            fence, most = (settled, self.give_back) if over <= 0 else (self._table.retired, None)
            if most is not None:
                excess = min(excess, most)
            self._table.steal(excess - pool.free, fence, more=most is None)
            pool.shrink(max(0, pool.free - excess))
        else:
            pool.stock(min(max(missing, demand), allowed) - unused, budget)

    def trim(self) -> None:
        """Destroy every page that no open or kept slot claims and no unfinished step may read."""
        self._table.steal(self.pool.created, self._table.retired)
        self.pool.shrink()

    def can_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` tokens could be held if it were the only one."""
        budget = self.pool.page_budget()
        return 0 <= num_tokens <= self.layout.max_tokens and (
            budget is None or self.layout.total_pages_for(num_tokens) <= budget
        )

    @property
    def refusal(self) -> str:
        """Why the machine had no memory when tokens last got none; empty if the budget ran out.

        While this is set, even tokens that fit alone (`can_fit`) may never get memory.
        """
        return self._table.refusal

    def has_room(self, num_tokens: int, spare: float) -> bool:
        """Whether `num_tokens` more tokens fit now with a fraction `spare` of the budget left.

        That is at least a page for each slab in use. Pages that no open or kept slot claims count
        as free, because they can be taken.
        """
        budget = self.pool.page_budget()
        if budget is None:
            return True
        spared = max(int(spare * budget), self.num_open * self.layout.num_groups)
        wanted = self.layout.total_pages_for(num_tokens)
        return self._table.claimed_pages + wanted + spared <= budget

    def address(self, group: int, plane: int = 0) -> int:
        """Where slot 0's slab of `group` begins; slot s's is s * `layout.slab_size(group)` on."""
        return self._table.address(group, plane * self.num_slots)

    def held_tokens(self, slot: int) -> int:
        """Live tokens of an open slot; of a closed one, tokens whose pages are still mapped."""
        state = self._slots[slot]
        return state.tokens if state.backed >= 0 else self.layout.tokens_in(state.lengths)

    def live_tokens(self, slot: int) -> int:
        """Live tokens of an open slot; 0 for a closed one."""
        return self._slots[slot].tokens

    def mapped_pages(self, slot: int) -> int:
        """Pages mapped in a slot, used or not, over all groups."""
        return self._slots[slot].num_pages

    @property
    def num_open(self) -> int:
        """Number of open slots."""
        return self._table.num_open

    @property
    def work_seconds(self) -> float:
        """Time spent so far on creating, mapping, unmapping and destroying pages."""
        return sum(work.seconds for work in self._table.work.values())

    def usage(self) -> Usage:
        """What is reserved, mapped and live now. Cheap: the counts are kept up to date."""
        return self._table.usage()

    def release(self) -> None:
        """Close all slots and give everything back. All steps must be finished. Idempotent."""
        for slot in self._slots:
            if slot.backed >= 0:
                self.close(slot.index, self._table.retired)
        for index in tuple(self._table.kept):
            self.drop(index)
        for slot in self._slots:
            self._table.cut(slot, self._table.none)
        self._sharing.copies.clear()
        self.pool.shrink()
        self._table.free()
