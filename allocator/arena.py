"""The KV cache of a batch: slots of contiguous addresses, with pages under the tokens there are.

Every slot has one slab per layer group, or one in each plane of it. Pages are mapped from a
slab's begin, in order, and leave it from its end:

    slab of a slot  |<-- live tokens -->|                         |
                    |<------- claimed pages ------>|<- surplus -->|<------ unmapped ------>|

Claimed pages are those that a running step may touch. Surplus, which is all that a closed slot
has, stays mapped until another sequence wants the pages: the next sequence in the slot then saves
mapping them (the deferred reclamation of vAttention, https://arxiv.org/abs/2405.04437).

A page may be mapped in several slots (see `sharing`). What a slot shares lies before its live
tokens' end, so that nothing writes it.
"""

from collections.abc import Callable, Iterable

from batchrun.allocator.accounting import Usage
from batchrun.allocator.layout import KVLayout
from batchrun.allocator.pages import PagePool
from batchrun.allocator.sharing import MemoryCopy, at_most
from batchrun.allocator.slots import SlotTable
from batchrun.allocator.vmm import AllocatorError, VirtualMemory

_SPARE_PAGES = 4  # Unused pages that are never too many.


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
        layout: what a token is. Its pages and planes must be the memory's.
        num_slots: sequences that can be open at once.
        budget: bytes of pages to hold at most: a number, or a function that says it, asked once
            after each `retire`; None for as much as the machine has.
        slack: unused pages to keep, as a part of the claimed ones.
        give_back: pages beyond that to give back in one `retire` at most, as long as the budget
            holds, so that none takes long; None for all.
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
                f"the layout's pages have {wanted[0]} bytes in each of {wanted[1]} planes, the "
                f"memory's {has[0]} in {has[1]}"
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
        self._acquired = 0  # by the pool's count, when a step was last retired

    def open(self, num_tokens: int = 0) -> int | None:
        """Take a closed slot: the one whose pages fit `num_tokens` best. Maps nothing.

        The pages it has for the first `num_tokens` tokens are claimed at once. Slots without
        shared pages come first; of another, the shared pages and those behind them are unmapped.

        Returns:
            The slot, or None when no slot is closed but those that are kept and those with shared
            pages that an unfinished step may read.
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
        """Put pages behind the tokens [0, num_tokens) of an open slot, which become its live ones.

        New pages hold undefined bytes. What the slot held stays. Asking for fewer tokens than
        before unmaps nothing; tokens that the slot shares stay live, so that they are not written.

        Args:
            slot: an open slot.
            num_tokens: tokens that will be live: all below the former number stay as they are.

        Returns:
            False when there are no pages for it. The slot then holds what it held, in every group.

        Raises:
            AllocatorError: the slot is not open, cannot hold `num_tokens`, or shares more.
        """
        state = self._slots[slot]
        if not 0 <= num_tokens <= state.backed and not self._table.extend(state, num_tokens):
            return False
        if num_tokens < state.aliased_end:
            raise AllocatorError(
                f"slot {slot} shares {state.aliased_end} tokens; {num_tokens} can't be all it holds"
            )
        self._table.set_live(state, num_tokens)
        return True

    def share(self, source: int, num_shared: int, num_tokens: int, step: int) -> int | None:
        """Open a slot whose first `num_shared` tokens are those of `source`, and are its live ones.

        Whole pages are the source's own, mapped here too. Of the page that the shared tokens end
        on, in each group, a copy is ordered (`take_copies`). A closed slot that has the pages
        already is preferred, then one for which least is mapped and unmapped.

        Args:
            source: an open slot with at least `num_shared` live tokens, or a closed or kept one
                that still has the pages. That its bytes are right, and written by steps before
                `step`, is the caller's to know.
            num_shared: tokens.
            num_tokens: how long the new sequence may become, as in `open`.
            step: the step before whose kernels the copies will be made: until it is retired, a
                source that is copied from keeps its pages.

        Returns:
            The slot, or None when none can be had now, or no page for the copies. Then nothing has
            changed, except that unclaimed pages may have been reclaimed.

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
        """Open a slot with all live tokens of an open one: see `share`."""
        state = self._slots[source]
        state.check_open()
        return self.share(source, state.tokens, state.tokens, step)

    def take_copies(self) -> tuple[MemoryCopy, ...]:
        """What was ordered since the last call, and is to be copied before the next step.

        Before its kernels, that is, after those of the steps before it, and in this order: a copy
        may read what one before it has written.
        """
        copies, self._sharing.copies = self._sharing.copies, []
        return tuple(copy for _, copy in copies)

    def close(self, slot: int, step: int, keep: int = 0) -> None:
        """End a slot's sequence. Its pages stay mapped for the next, or until they are wanted.

        Copies into the slot that were not taken are dropped, but for those to tokens that are kept
        or copied on.

        Args:
            slot: an open slot.
            step: the last step that may touch the slot. Its pages stay until that is retired.
            keep: live tokens whose pages stay claimed until `drop`: a kept slot is not opened, and
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
        """Give up what a kept slot kept: it is a closed slot like others now."""
        if slot not in self._table.kept:
            raise AllocatorError(f"slot {slot} keeps nothing")
        state = self._slots[slot]
        state.kept = 0
        self._table.kept.remove(slot)
        self._table.closed.add(slot)
        self._table.claim(state, self._table.none, is_open=False)
        self._sharing.forget_copies(state)

    def retire(self, step: int, coming: Iterable[tuple[int, int]] = (), others: int = 0) -> None:
        """Declare all steps up to `step` finished, and bring the pool to the size it should have.

        Pages unused beyond `slack` are destroyed, except those that became unused in the steps
        retired by this very call, because the next sequence may be about to open their slot. Of a
        pool beyond its budget, everything unused is. Within both, pages are created ahead of need.

        Args:
            step: the last finished one.
            coming: open slots, and tokens that will be live there soon. Pages for them are created
                and kept; without, as many as the last step took, within `slack`.
            others: tokens that will be live soon in slots that are not open yet.
        """
        settled, self._table.retired = self._table.retired, max(step, self._table.retired)
        pool = self.pool
        pool.remeasure()
        demand, self._acquired = pool.acquired - self._acquired, pool.acquired
        budget = pool.page_budget()
        unused = pool.created - self._table.claimed_pages
        slots = self._slots  # most have what is coming claimed: no need to look any closer
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
        """Destroy every page that no open slot has claimed and no unfinished step may read."""
        self._table.steal(self.pool.created, self._table.retired)
        self.pool.shrink()

    def can_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` tokens could be held if it were alone."""
        budget = self.pool.page_budget()
        return 0 <= num_tokens <= self.layout.max_tokens and (
            budget is None or self.layout.total_pages_for(num_tokens) <= budget
        )

    @property
    def refusal(self) -> str:
        """Why the machine had no memory when tokens last got none; empty where the budget ended.

        Then tokens that fit alone (`can_fit`) may yet get none, however often they are asked for.
        """
        return self._table.refusal

    def has_room(self, num_tokens: int, spare: float) -> bool:
        """Whether so many tokens more could be held now with a part of the budget to spare.

        That part is at least a page for each slab in use. Pages that no open or kept slot claims
        count as room: they can be taken.
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
        """Tokens that `ensure` was last asked for; 0 in a closed slot."""
        return self._slots[slot].tokens

    def mapped_pages(self, slot: int) -> int:
        """Pages mapped in a slot, used or not, in all groups."""
        return self._slots[slot].num_pages

    @property
    def num_open(self) -> int:
        """Slots that are open."""
        return self._table.num_open

    @property
    def work_seconds(self) -> float:
        """Time that creating, mapping, unmapping and destroying pages has taken so far."""
        return sum(work.seconds for work in self._table.work.values())

    def usage(self) -> Usage:
        """What is reserved, mapped and live now. Cheap: nothing is counted up for it."""
        return self._table.usage()

    def release(self) -> None:
        """Close all slots and give everything back. No step may be unfinished. Idempotent."""
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
