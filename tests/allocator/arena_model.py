"""An arena with a model beside it of what every token of every slot must hold.

Steps run late: what a step copies, writes and reads happens when it is executed, at the latest
before it is retired, while the arena's state is that of later steps. So a page that was unmapped,
given away or overwritten too early shows, as a wrong pattern or a fault.
"""

from collections import Counter, deque
from dataclasses import dataclass

import pytest
import torch
from memory_twins import DEVICE, PAGE, SCALE, Twin, open_memory

from batchrun.allocator.arena import KVArena
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.sharing import MemoryCopy
from batchrun.allocator.tensor import strided_view
from batchrun.allocator.vmm import AllocatorError, Handle
from tests.allocator.invariants import check_arena

MAX_TOKENS = 96
LAYOUTS = [
    # 400, 1000 and 1028 bytes a token where pages are 4 KiB: they hold 10.24, 4.1 and 3.98 tokens.
    KVLayout((LayerKV(SCALE, 25, 25),) * 2, 4, PAGE, MAX_TOKENS, 2),
    KVLayout((LayerKV(5 * SCALE, 60, 40), LayerKV(SCALE, 514, 0)), 2, PAGE, MAX_TOKENS, 1),
    KVLayout(
        (LayerKV(2 * SCALE, 31, 33), LayerKV(3 * SCALE, 64, 64), LayerKV(SCALE, 7, 1)),
        *(4, PAGE, MAX_TOKENS, 2),
    ),
    KVLayout(
        (LayerKV(SCALE, 25, 25), LayerKV(5 * SCALE, 30, 20)) * 3, 4, PAGE, MAX_TOKENS, 1, planes=3
    ),
]
_TOKENS = torch.arange(MAX_TOKENS, dtype=torch.int32, device=DEVICE)


@dataclass(eq=False)
class Occupant:
    """What is in a slot. A token's words are made from its position and the name of its write."""

    names: torch.Tensor  # int32 [tokens], one per live token
    written: int = 0  # tokens that the steps so far, and copies that are ordered, provide
    durable: int = 0  # tokens that the steps so far provide
    solid: int = 0  # tokens that the executed steps have provided
    last_step: int = -1  # that touches it

    def bound(self, tokens: int) -> None:
        """Tokens from here on are not what they were."""
        self.written = min(self.written, tokens)
        self.durable = min(self.durable, tokens)
        self.solid = min(self.solid, tokens)


@dataclass
class Step:
    """A launched step: copies, then writes, then reads of everything that is live."""

    number: int
    copies: tuple[MemoryCopy, ...]
    writes: list[tuple[Occupant, int, int, int, int]]  # occupant, slot, begin, end, name
    reads: list[tuple[Occupant, int, torch.Tensor]]
    kept: list[tuple[Occupant, torch.Tensor]]


class ArenaModel:
    """Operations on an arena as an engine makes them, each with what must be true after it."""

    def __init__(self, layout: KVLayout, num_slots: int, budget: int | None, slack: float) -> None:
        self.memory = open_memory(planes=layout.planes)
        self.twin = Twin(self.memory)
        self.layout, self.budget, self.ceiling = layout, budget, budget
        self.arena = KVArena(
            self.memory,
            layout,
            num_slots=num_slots,
            budget=None if budget is None else lambda: self.budget * layout.page_bytes,
            slack=slack,
        )
        planes, groups = range(layout.planes), range(layout.num_groups)
        self.words = [self._words(group, plane) for plane in planes for group in groups]
        self.open_slots: dict[int, Occupant] = {}  # in order of admission
        self.kept: dict[int, Occupant] = {}
        self.left: dict[int, Occupant] = {}  # closed, and not opened since
        self.writes: list[tuple[Occupant, int, int, int, int]] = []
        self.running: deque[Step] = deque()
        self.names = self.step = 0
        self.retired = -1
        self.counts = Counter[str]()

    def finish(self) -> None:
        """Give everything back, and see that it is."""
        self.drain()
        self.arena.release()
        check_arena(self.arena)
        assert (self.memory.reservations, self.memory.counts) == ({}, {})
        self.memory.close()

    def open(self, expected: int) -> int | None:
        before = self.arena.usage()
        slot = self.arena.open(expected)
        after = self.arena.usage()
        assert (after.work["map"].calls, after.mapped) == (before.work["map"].calls, before.mapped)
        if slot is None:
            for state in self.closed_states():
                assert min(state.aliased_end, state.fence - self.retired) > 0, f"{state} is free"
        else:
            self.admit(slot, Occupant(_TOKENS[:0]))
        return slot

    def admit(self, slot: int, occupant: Occupant) -> None:
        assert slot not in self.open_slots
        assert slot not in self.kept
        self.left.pop(slot, None)
        self.open_slots[slot] = occupant

    def share(self, source: int, tokens: int, expected: int) -> int | None:
        """Share `tokens`, or as many as the source provides."""
        origin = self.source(source)
        tokens = min(tokens, self.shareable(source))
        before = self.arena.usage()
        free = [s for s in self.closed_states() if s.index != source and s.fence <= self.retired]
        slot = self.arena.share(source, tokens, expected, self.step + 1)
        self.counts["shares" if slot is not None else "shares_refused"] += 1
        if slot is None:
            assert self.arena.usage().live == before.live
            if free:
                wanted = self.layout.pages_for(tokens)
                copies = sum(map(int.__gt__, wanted, self.layout.whole_pages(tokens)))
                origins = {h for table in self.arena._slots[source].tables for h in table}
                held = len(self.pinned() | origins) + copies
                assert self.budget is not None, "there are slots and pages"
                assert held > self.budget, f"{held} pages wanted in all, of {self.budget}"
            return None
        self.counts["pages_shared"] += sum(self.layout.whole_pages(tokens))
        child = Occupant(origin.names[:tokens], tokens, origin.durable, origin.solid)
        whole = self.layout.tokens_in(self.layout.whole_pages(tokens))
        child.durable, child.solid = min(child.durable, whole), min(child.solid, whole)
        self.admit(slot, child)
        return slot

    def source(self, slot: int) -> Occupant:
        return {**self.left, **self.kept, **self.open_slots}[slot]

    def shareable(self, slot: int) -> int:
        """Tokens that a slot can give now."""
        if slot in self.left:
            return min(self.left[slot].durable, self.arena.held_tokens(slot))
        return self.source(slot).written

    def ensure(self, slot: int, tokens: int) -> bool:
        occupant, state = self.open_slots[slot], self.arena._slots[slot]
        before, live = len(occupant.names), self.arena.usage().live
        if tokens < state.aliased_end:
            with pytest.raises(AllocatorError, match=f"shares {state.aliased_end} tokens"):
                self.arena.ensure(slot, tokens)
            self.counts["refused_below_shared"] += 1
            tokens = state.aliased_end
        unmapped = self.arena.usage().work["unmap"].calls
        done = self.arena.ensure(slot, tokens)
        self.counts["unmaps_to_grow"] += self.arena.usage().work["unmap"].calls - unmapped
        if not done:
            assert self.arena.usage().live == live
            self.check_that_no_page_was_to_be_had(slot, tokens)
            self.counts["growth_refused"] += 1
        elif tokens > before:
            self.names += 1
            self.writes.append((occupant, slot, before, tokens, self.names))
            name = torch.tensor([self.names], dtype=torch.int32, device=DEVICE)
            occupant.names = torch.cat([occupant.names, name.expand(tokens - before)])
        else:
            occupant.names = occupant.names[:tokens]
            occupant.bound(tokens)
        return done

    def check_that_no_page_was_to_be_had(self, slot: int, tokens: int) -> None:
        state, pinned = self.arena._slots[slot], self.pinned()
        wanted = self.layout.pages_for(tokens)
        usable = {h for n, table in zip(wanted, state.tables, strict=True) for h in table[:n]}
        assert self.budget is not None
        held = len(pinned | usable) + sum(wanted) - len(usable)
        assert held > self.budget, f"{held} pages wanted in all, of {self.budget}"

    def close(self, slot: int, keep: int = 0, *, late: bool = False) -> None:
        """Close a slot with the first `keep` tokens kept, or as many as the steps so far wrote."""
        occupant = self.open_slots.pop(slot)
        self.writes = [write for write in self.writes if write[0] is not occupant]
        keep = min(keep, occupant.written)
        self.arena.close(slot, self.step if late else occupant.last_step, keep)
        occupant.names = occupant.names[: keep or occupant.durable]
        occupant.bound(len(occupant.names))
        (self.kept if keep else self.left)[slot] = occupant
        assert self.arena.held_tokens(slot) >= keep

    def drop(self, slot: int) -> None:
        occupant = self.left[slot] = self.kept.pop(slot)
        occupant.names = occupant.names[: occupant.durable]
        self.arena.drop(slot)

    def launch(self) -> None:
        """The next step: its copies and writes, and it reads all that is live."""
        self.step += 1
        copies = self.arena.take_copies()
        self.counts["copies"] += len(copies)
        reads = [(o, slot, o.names) for slot, o in self.open_slots.items()]
        for occupant, _, names in reads:
            occupant.written = occupant.durable = len(names)
            occupant.last_step = self.step
        kept = [(occupant, occupant.names) for occupant in self.kept.values()]
        for occupant, names in kept:
            occupant.durable = len(names)
        self.running.append(Step(self.step, copies, self.writes, reads, kept))
        self.writes = []

    def execute(self) -> None:
        """Run the eldest launched step."""
        step = self.running.popleft()
        for copy in step.copies:
            for plane in range(self.layout.planes):
                base = self.arena.address(copy.group, plane)
                data = self.twin.read_plane(base + copy.source, copy.nbytes)
                self.twin.write_plane(base + copy.target, data)
        for _, slot, begin, end, name in step.writes:
            for slab, words in enumerate(self.words):
                words[slot, begin:end] = self.pattern(slab, name, begin, end)[:, None]
        for occupant, slot, names in step.reads:
            self.verify(slot, names)
            self.settle(occupant, names)
        for occupant, names in step.kept:
            self.settle(occupant, names)

    def settle(self, occupant: Occupant, names: torch.Tensor) -> None:
        count = min(len(names), len(occupant.names))
        same = (names[:count] == occupant.names[:count]).tolist()
        occupant.solid = max(occupant.solid, same.index(False) if False in same else count)

    def retire(self, behind: int = 0) -> None:
        while self.running and self.running[0].number <= self.step - behind:
            self.execute()
        self.arena.retire(self.step - behind)
        self.retired = max(self.retired, self.step - behind)
        if self.budget is not None:
            self.ceiling = max(self.budget, len(self.pinned()))

    def drain(self) -> None:
        """Run and retire everything that was launched."""
        self.retire(0)

    def set_budget(self, room: int) -> None:
        """Another process takes memory, or gives some back."""
        created = self.arena.pool.created
        self.budget = max(0, created + room)
        self.ceiling = max(self.budget, created)
        self.arena.pool.remeasure()  # it asks anew once a step, and this is the next

    def trim(self) -> None:
        self.arena.trim()
        assert self.arena.pool.free == 0
        assert self.arena.pool.created == len(self.pinned())

    def run_alone(self, tokens: int) -> None:
        """Preempt everything but the eldest sequence, which then gets what one alone can have."""
        for slot in [*self.open_slots][1:]:
            self.close(slot)
            self.counts["preempted"] += 1
        for slot in [*self.kept]:
            self.drop(slot)
        self.launch()
        self.drain()
        slot = next(iter(self.open_slots), None)
        if slot is None:
            slot = self.open(tokens)
            assert slot is not None, "nothing is open and everything is retired"
        if self.arena.can_fit(tokens):
            assert self.ensure(slot, tokens), f"{tokens} tokens fit one sequence alone"

    def pinned(self) -> set[Handle]:
        """Pages that are claimed, or mapped where an unfinished step may read them."""
        return {
            handle
            for state in self.arena._slots
            for table, claimed in zip(state.tables, state.claimed, strict=True)
            for handle in (table if self.fenced(state) else table[:claimed])
        }

    def fenced(self, state) -> bool:
        return state.fence > self.retired

    def left_states(self) -> set[int]:
        return {*range(self.arena.num_slots)} - {*self.open_slots} - {*self.kept}

    def closed_states(self) -> list:
        return [self.arena._slots[index] for index in sorted(self.left_states())]

    def check(self) -> None:
        """Every rule, and every byte that the executed steps have provided."""
        check_arena(self.arena)
        for slot, occupant in {**self.open_slots, **self.kept}.items():
            self.verify(slot, occupant.names[: occupant.solid])
        for slot, occupant in self.left.items():
            occupant.solid = min(occupant.solid, self.arena.held_tokens(slot))
            self.verify(slot, occupant.names[: occupant.solid])
        for slot, occupant in self.open_slots.items():
            assert self.arena.live_tokens(slot) == len(occupant.names)
        usage, created = self.arena.usage(), self.arena.pool.created
        assert created == len(self.memory.counts)
        assert usage.mapped == created * self.layout.page_bytes
        assert self.ceiling is None or created <= self.ceiling
        lengths = [len(occupant.names) for occupant in self.open_slots.values()]
        assert usage.paged == sum(-(-n // 16) * 16 for n in lengths) * self.layout.bytes_per_token
        assert usage.live <= sum(lengths) * self.layout.bytes_per_token
        assert usage.live <= usage.mapped
        assert self.arena.num_open == len(self.open_slots)

    def verify(self, slot: int, names: torch.Tensor) -> None:
        for slab, words in enumerate(self.words if len(names) else ()):
            found = words[slot, : len(names)]
            wanted = self.pattern(slab, names, 0, len(names))[:, None]
            assert torch.equal(found, wanted.expand_as(found)), f"slot {slot}, slab {slab}"

    def pattern(self, slab: int, names: torch.Tensor | int, begin: int, end: int) -> torch.Tensor:
        """What each word of the tokens [begin, end) must be."""
        return (names * len(self.words) + slab) * MAX_TOKENS + _TOKENS[begin:end]

    def _words(self, group: int, plane: int) -> torch.Tensor:
        """All slabs of a group in a plane, as [slots, tokens, words of 32 bits]."""
        slots, tokens = self.arena.num_slots, self.layout.slot_tokens
        size = self.layout.group_bytes_per_token(group) // 4
        return strided_view(
            self.arena.address(group, plane),
            slots * self.layout.slab_size(group),
            (slots, tokens, size),
            (tokens * size, size, 1),
            torch.int32,
            device=DEVICE,
        )
