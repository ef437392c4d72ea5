"""What must hold in an arena between calls, worked out from its slots' tables alone."""

from collections import Counter

from batchrun.allocator.accounting import paged_blocks
from batchrun.allocator.arena import KVArena
from batchrun.allocator.pages import PagePool
from batchrun.allocator.slot import Slot
from batchrun.allocator.slots import SlotTable
from batchrun.allocator.vmm import Handle


def check_arena(arena: KVArena) -> None:
    """Raise AssertionError, with what is wrong, unless every invariant of an arena holds."""
    slots = arena._table
    check_pool(slots.pool)
    references, counts = Counter[Handle](), slots.counts
    for slot in slots.slots:
        _check_slot(slots, slot)
        for table in slot.tables:
            references.update(table)
    for handle, count in references.items():
        known = counts[handle]
        assert known == count, f"page {handle} is in {count} slots, and {known} are counted"
    assert slots.pool.in_use == len(references), "a page in use is mapped nowhere"
    tokens = [slot.tokens for slot in slots.slots]
    assert slots.live_tokens == sum(tokens), f"{slots.live_tokens} live, slots have {tokens}"
    assert slots.live_blocks == sum(map(paged_blocks, tokens)), "paged blocks"
    assert slots.claims == sum(s.num_claimed for s in slots.slots), "claims"
    _check_shared(slots)


def check_pool(pool: PagePool) -> None:
    """Raise AssertionError where a pool contradicts itself."""
    every = [*pool._free, *pool._used]
    assert len(set(every)) == len(every), "a page is free twice, or free and in use"
    assert len(every) == pool.created, f"{len(every)} pages known, {pool.created} created"
    counts = pool._memory.counts
    assert not any(counts[handle] for handle in pool._free), "a free page is mapped"


def _check_slot(slots: SlotTable, slot: Slot) -> None:
    layout = slots.layout
    at, pages = f"slot {slot.index}", tuple(len(table) for table in slot.tables)
    assert slot.num_pages == sum(pages), f"{at}: {slot.num_pages} pages, table {pages}"
    assert slot.num_claimed == sum(slot.claimed), f"{at}: claim {slot.claimed}"
    assert all(c <= p for c, p in zip(slot.claimed, pages, strict=True)), (
        f"{at}: claims {slot.claimed} of {pages} pages"
    )
    state = (slot.backed, slot.tokens, slot.claimed)
    if slot.index in slots.closed | slots.kept:
        assert state == (-1, 0, layout.pages_for(slot.kept)), f"{at} is closed with {state}"
        assert (slot.kept > 0) == (slot.index in slots.kept), f"{at} keeps {slot.kept}"
    else:
        backed = layout.tokens_in(slot.claimed)
        assert slot.tokens <= slot.backed == backed, (
            f"{at}: {slot.tokens} live, {slot.backed} backed, {backed} fit the claim"
        )
        assert slot.kept == 0, f"{at} is open and keeps {slot.kept}"
    assert (slot.surplus > 0) == (slot.index in slots.with_surplus), f"{at}: surplus"
    assert slot.aliased_end == layout.tokens_on(slot.aliased), f"{at}: {slot.aliased} aliased"
    for table, aliased in zip(slot.tables, slot.aliased, strict=True):
        assert aliased <= len(table), f"{at}: {aliased} of {len(table)} pages aliased"
        for handle in table[aliased:]:
            assert slots.counts[handle] == 1, f"{at}: {handle} is shared unawares"


def _check_shared(slots: SlotTable) -> None:
    """Claims, live and shared bytes, page by page; where each page lies; the copies ordered."""
    layout, places = slots.layout, dict[Handle, set[tuple[int, int]]]()
    claimed, opened, live = set[Handle](), Counter[Handle](), dict[Handle, int]()
    for slot in slots.slots:
        for group, table in enumerate(slot.tables):
            end = slot.tokens * layout.group_bytes_per_token(group)
            for page, handle in enumerate(table):
                places.setdefault(handle, set()).add((group, page))
                nbytes = min(max(0, end - page * layout.page_size), layout.page_size)
                live[handle] = max(live.get(handle, 0), nbytes)
            claimed.update(table[: slot.claimed[group]])
            if slot.backed >= 0:
                opened.update(table[: slot.claimed[group]])
    assert all(len(place) == 1 for place in places.values()), "a page lies at several indices"
    assert slots.claimed_pages == len(claimed), f"{len(claimed)} pages are claimed"
    usage, saved = slots.usage(), opened.total() - len(opened)
    total = sum(live.values()) * layout.planes
    assert usage.live == total, f"{usage.live} live, pages hold {total}"
    assert usage.shared == saved * layout.page_bytes, f"{usage.shared} shared, {saved} pages are"
    for _, copy in slots.sharing.copies:
        for at in (copy.source, copy.target):
            index, offset = divmod(at, layout.slab_size(copy.group))
            slot, page = slots.slots[index], offset // layout.page_size
            assert page < len(slot.tables[copy.group]), f"{copy}: slot {index} has no page {page}"
            assert page < slot.claimed[copy.group] or slot.fence > slots.retired, (
                f"{copy}: page {page} of slot {index} may be taken"
            )
