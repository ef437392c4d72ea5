"""What the steps of a slow device use, and what must not happen to it until they are over.

Memory for keys and values is known by its pages: one page may be at several addresses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from batchrun.allocator.arena import KVArena
from batchrun.allocator.vmm import NO_PAGE, AllocatorError, Handle, VirtualMemory
from batchrun.engine.plan import StepPlan

Done = Counter[Any]  # operations, by stream
_NOTHING = range(0)


@dataclass(eq=False)
class Uses:
    """Pages that a step has at some addresses, and the bytes of them that its kernels touch.

    `copied` are those that its copies touch before: other copies are on the same stream, in order.
    """

    addresses: set[int] = field(default_factory=set)
    read: dict[Handle, range] = field(default_factory=dict)
    written: dict[Handle, range] = field(default_factory=dict)
    copied: dict[Handle, range] = field(default_factory=dict)

    def add(
        self,
        pages: dict[Handle, range],
        arena: KVArena,
        group: int,
        slot: int,
        bytes_: tuple[int, int],
    ) -> None:
        """Bytes `[first, last)` of a slab are touched."""
        first, last = bytes_
        size, table = arena.layout.page_size, arena._slots[slot].tables[group]
        for page in range(first // size, -(-last // size)):
            self.addresses.add(arena._table.address(group, slot, page))
            touched = range(max(first - page * size, 0), min(last - page * size, size))
            pages[table[page]] = _hull(pages.get(table[page], touched), touched)


def uses_of(plan: StepPlan, arena: KVArena, scratch: int | None = None) -> Uses:
    """What a step reads and writes: tokens up to its own, those of fillers, and copies."""
    uses, layout = Uses(), arena.layout
    spans = [(s.slot, s.start, s.start + s.length) for s in plan.segments]
    if scratch is not None:
        spans.append((scratch, 0, 1))
    for slot, start, end in spans:
        for group in range(layout.num_groups):
            size = layout.group_bytes_per_token(group)
            uses.add(uses.read, arena, group, slot, (0, end * size))
            uses.add(uses.written, arena, group, slot, (start * size, end * size))
    for copy in plan.copies:
        for at in (copy.source, copy.target):
            slot, first = divmod(at, layout.slab_size(copy.group))
            uses.add(uses.copied, arena, copy.group, slot, (first, first + copy.nbytes))
    return uses


@dataclass(eq=False)
class Step:
    """One launch, and the memory that its kernels use."""

    uses: Uses
    staged: list[range] = field(default_factory=list)  # bytes of staging memory on the device
    end: tuple[Any, int] | None = None  # its last operation; None while it is being launched

    def is_before(self, moment: Done) -> bool:
        """Whether all of it is among these operations."""
        return self.end is not None and moment[self.end[0]] >= self.end[1]


class Steps:
    """Those that are not over.

    Args:
        done: The operations that are.
        broken: Called with what is wrong.
    """

    def __init__(self, done: Callable[[], Done], broken: Callable[[str], None]) -> None:
        self._done, self._broken = done, broken
        self._steps: list[Step] = []
        self.next_uses = Uses()
        self.memory: WatchedMemory | None = None
        self._copying_stream: Any = None

    @contextmanager
    def launch(self, stream: Any, *, more: bool = False) -> Iterator[None]:
        """What is enqueued in this block is a step, on the given stream and those it waits for.

        Args:
            stream: On which.
            more: It belongs to the last step.
        """
        if not more:
            self._steps = [*self.unfinished(), Step(self.next_uses)]
            self.next_uses = Uses()
        step = self.last
        step.end = None
        try:
            yield
        finally:
            step.end = stream, stream.after[stream]

    @property
    def last(self) -> Step:
        """The step that is being launched, or was last."""
        return self._steps[-1]

    def unfinished(self) -> list[Step]:
        """Steps that are launched or being launched, and not over."""
        return [step for step in self._steps if not step.is_before(self._done())]

    def staging(self, after: Done, address: int, nbytes: int) -> None:
        """Inputs are copied to memory of the device, after these operations."""
        written = range(address, address + nbytes)
        for step in self.unfinished():
            if not step.is_before(after) and any(_meet(written, used) for used in step.staged):
                self._broken("staging memory on the device was written under a step that reads it")
        if self._steps and self.last.end is None:
            self.last.staged.append(written)

    def copying(self, stream: Any, after: Done, source: int, target: int, nbytes: int) -> bool:
        """Bytes of pages are copied for the step being launched, after these operations.

        Returns:
            False if the addresses are not those of pages.
        """
        places = [self.memory.page_at(at, nbytes) for at in (source, target) if self.memory]
        if None in places or not places:
            return False
        self._copying_stream = self._copying_stream or stream
        if stream is not self._copying_stream:
            self._broken("copies of pages are on two streams, in no order")
        self._copying(after, *places)
        return True

    def _copying(
        self, after: Done, source: tuple[Handle, range], target: tuple[Handle, range]
    ) -> None:
        for step in self.unfinished():
            if step is self.last or step.is_before(after):
                continue
            uses = step.uses
            if _meet(source[1], uses.written.get(source[0], _NOTHING)):
                self._broken("a copy reads a page under a step that writes it")
            for pages in (uses.written, uses.read):
                if _meet(target[1], pages.get(target[0], _NOTHING)):
                    self._broken("a copy writes a page under a step that uses it")

    def touching(self, addresses: Iterable[int], pages: Iterable[Handle], what: str) -> None:
        """Something is done to addresses and pages that no step may stand when it is not over."""
        addresses, pages = set(addresses), set(pages)
        for step in self.unfinished():
            uses = step.uses
            used = uses.read.keys() | uses.written.keys() | uses.copied.keys()
            if uses.addresses & addresses or used & pages:
                self._broken(f"{what} under a step that is not over")


class WatchedMemory:
    """A memory of which no page is unmapped or destroyed under a step."""

    def __init__(self, memory: VirtualMemory, steps: Steps) -> None:
        self.memory, self._steps = memory, steps
        steps.memory = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def unmap(self, address: int, count: int) -> None:
        size = self.memory.granularity
        unmapped = range(address, address + count * size, size)
        self._steps.touching(unmapped, (), "memory was unmapped")
        self.memory.unmap(address, count)

    def destroy(self, handles: Sequence[Handle]) -> None:
        self._steps.touching((), handles, "pages were destroyed")
        self.memory.destroy(handles)

    def page_at(self, address: int, nbytes: int) -> tuple[Handle, range] | None:
        """The mapped page at an address, and which bytes of it are meant; None outside."""
        try:
            base, _ = self.memory.reservation_of(address, 1)
        except AllocatorError:
            return None
        offset = (address - base) % self.memory.granularity
        [page] = self.memory.pages(address - offset, 1)
        assert page != NO_PAGE, "bytes are copied where there is no page"
        return page, range(offset, offset + nbytes)


def _meet(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def _hull(one: range, other: range) -> range:
    return range(min(one.start, other.start), max(one.stop, other.stop))
