"""What a machine must offer so that tensors can grow in place: reserve, commit, map, alias.

The names follow CUDA's virtual memory management API, whose meaning `VirtualMemory` fixes:
address space and physical pages are obtained separately, one page may be mapped at several
addresses, and touching an address with no page behind it is a fault, not a zero.
"""

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

Handle = NewType("Handle", int)
"""One physical page: `VirtualMemory.granularity` bytes in each of its planes."""

NO_PAGE = Handle(-1)
"""What `MappingTable` has for an address that no page is behind."""


class AllocatorError(Exception):
    """A rule of the allocator was broken, or the operating system refused a request."""


class Refused(AllocatorError):  # noqa: N818 - says what has happened
    """The operating system refused a request, for a reason that the message names."""


class OutOfPages(Refused):
    """No physical memory, no budget, or no room for another mapping. Nothing was changed."""


class OutOfBudget(OutOfPages):
    """The machine may have more: the KV budget has not."""


Place = tuple[list[Handle], int]
"""A slab of a `Reservation`, and the index of a range's first page there."""


@dataclass(slots=True)
class Reservation:
    """Address space that is reserved.

    Attributes:
        size: bytes of each plane.
        slab: bytes of each slab.
        slabs: of each slab, what is at every address from its begin to its last page.
    """

    size: int
    slab: int
    slabs: list[list[Handle]]


class MappingTable:
    """What a `VirtualMemory` has given out, and the rules of that protocol checked against it.

    The only record of which page is at which address, and of how many addresses a page is at. It
    calls no system. Each `check_*` raises `AllocatorError` where a rule would be broken, and
    changes nothing.

    Args:
        granularity: bytes of one page in each plane.

    Attributes:
        reservations: by their addresses.
        counts: page that exists -> number of addresses it is mapped at.
        closed: whether the memory is, so that every check raises.
    """

    def __init__(self, granularity: int) -> None:
        self.granularity = granularity
        self.reservations: dict[int, Reservation] = {}
        self._bases: list[int] = []  # of them, ascending
        self.counts: dict[Handle, int] = {}
        self.closed = False

    def check_open(self) -> None:
        """The memory is not closed."""
        if self.closed:
            raise AllocatorError("this memory is closed")

    def check_reserve(self, size: int, slab: int | None) -> None:
        """`size` is whole slabs, and a slab whole pages; at least one each."""
        self.check_open()
        if size <= 0 or size % self.granularity:
            raise AllocatorError(
                f"cannot reserve {size} bytes: not a positive multiple of the page size, "
                f"{self.granularity}"
            )
        if slab is not None and (slab <= 0 or slab % self.granularity or size % slab):
            raise AllocatorError(
                f"cannot reserve {size} bytes in slabs of {slab}: not whole slabs, or pages "
                f"of {self.granularity}"
            )

    def check_free(self, address: int, size: int) -> None:
        """The range is one whole reservation, and nothing is mapped in it."""
        self.check_open()
        held = self.reservations.get(address)
        if held is None or held.size != size:
            why = "no reservation begins there" if held is None else f"it has {held.size} bytes"
            raise AllocatorError(f"cannot free {size} bytes at {address:#x}: {why}")
        if mapped := sum(len(slab) - slab.count(NO_PAGE) for slab in held.slabs):
            raise AllocatorError(
                f"cannot free {size} bytes at {address:#x}: {mapped} pages are still mapped there"
            )

    def check_create(self, count: int) -> None:
        """`count` is no negative number."""
        self.check_open()
        if count < 0:
            raise AllocatorError(f"cannot create {count} pages")

    def check_destroy(self, handles: Sequence[Handle]) -> None:
        """Every page exists, is named once, and is mapped nowhere."""
        self.check_open()
        self._check_exist(handles)
        if len(set(handles)) != len(handles):
            raise AllocatorError(f"cannot destroy a page twice in one call: {sorted(handles)}")
        for handle in handles:
            if count := self.counts[handle]:
                raise AllocatorError(f"cannot destroy page {handle}: it is mapped {count} times")

    def check_map(self, address: int, handles: Sequence[Handle]) -> Place:
        """Every page exists, and the range is in one slab and unmapped. Returns its place."""
        slab, first = place = self._place(address, len(handles))
        self._check_exist(handles)
        count, there = len(handles), slab[first : first + len(handles)]
        if mapped := len(there) - there.count(NO_PAGE):
            raise AllocatorError(
                f"cannot map {count} pages at {address:#x}: at {mapped} of them is a page already"
            )
        return place

    def check_unmap(self, address: int, count: int) -> tuple[Place, list[Handle]]:
        """The range is in one slab and mapped throughout. Returns its place and its pages."""
        slab, first = place = self._place(address, count)
        pages = slab[first : first + count]
        if missing := count - len(pages) + pages.count(NO_PAGE):
            raise AllocatorError(
                f"cannot unmap {count} pages at {address:#x}: at {missing} of them is none"
            )
        return place, pages

    def reserved(self, address: int, size: int, slab: int | None) -> None:
        """Enter a reservation."""
        slab = slab or size
        self.reservations[address] = Reservation(size, slab, [[] for _ in range(size // slab)])
        insort(self._bases, address)

    def freed(self, address: int) -> None:
        """Enter that a reservation is given back."""
        del self.reservations[address]
        self._bases.remove(address)

    def created(self, handles: Sequence[Handle]) -> None:
        """Enter that pages exist."""
        self.counts.update(dict.fromkeys(handles, 0))

    def destroyed(self, handles: Sequence[Handle]) -> None:
        """Enter that pages are given back."""
        for handle in handles:
            del self.counts[handle]

    def mapped(self, place: Place, handles: Sequence[Handle]) -> None:
        """Enter that `handles` are mapped at what `check_map` returned."""
        slab, first = place
        if first > len(slab):
            slab += [NO_PAGE] * (first - len(slab))
        slab[first : first + len(handles)] = handles
        for handle in handles:
            self.counts[handle] += 1

    def unmapped(self, place: Place, count: int) -> None:
        """Enter that nothing is mapped any more at what `check_unmap` returned."""
        slab, first = place
        for handle in slab[first : first + count]:
            self.counts[handle] -= 1
        if first + count < len(slab):
            slab[first : first + count] = [NO_PAGE] * count
            return
        del slab[first:]
        while slab and slab[-1] == NO_PAGE:
            slab.pop()

    def close(self) -> None:
        """Forget everything; every check raises from now on."""
        self.closed = True
        self.reservations.clear()
        self._bases.clear()
        self.counts.clear()

    def pages(self, address: int, count: int) -> list[Handle]:
        """What is at each address of a range in one slab: a page, or `NO_PAGE`."""
        slab, first = self._place(address, count)
        found = slab[first : first + count]
        return found + [NO_PAGE] * (count - len(found))

    def all_mapped(self) -> Iterator[tuple[int, Handle]]:
        """Every address that has a page, with the page."""
        for base, held in self.reservations.items():
            for number, slab in enumerate(held.slabs):
                begin = base + number * held.slab
                every = zip(range(begin, begin + held.slab, self.granularity), slab, strict=False)
                yield from ((address, page) for address, page in every if page != NO_PAGE)

    def reservation_of(self, address: int, count: int = 0) -> tuple[int, Reservation]:
        """The reservation that holds a range of `count` pages, and where it begins."""
        at = bisect_right(self._bases, address)
        if at:
            base = self._bases[at - 1]
            held = self.reservations[base]
            if address + count * self.granularity <= base + held.size:
                return base, held
        raise AllocatorError(f"{count} pages at {address:#x} do not lie in one reservation")

    def _place(self, address: int, count: int) -> Place:
        if self.closed:
            self.check_open()
        if count <= 0:
            raise AllocatorError(f"a range of {count} pages at {address:#x} is empty")
        base, held = self.reservation_of(address, count)
        index, offset = divmod(address - base, held.slab)
        if offset % self.granularity:
            raise AllocatorError(
                f"address {address:#x} is not on a page boundary of the reservation at {base:#x}"
            )
        if offset + count * self.granularity > held.slab:
            raise AllocatorError(f"{count} pages at {address:#x} do not lie in one slab")
        return held.slabs[index], offset // self.granularity

    def _check_exist(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            if handle not in self.counts:
                raise AllocatorError(f"page {handle} does not exist (never created, or destroyed)")


class VirtualMemory(Protocol):
    """Address space and physical pages, obtained separately and joined by `map`.

    Addresses and sizes are in bytes and multiples of `granularity`. Every method is all or
    nothing: when it raises, the state is as before the call. A broken rule (overlapping map, unmap
    of an unmapped page, destroying a mapped page, ...) raises `AllocatorError`. Instances are used
    by one thread at a time.

    A page may have a part in each of several planes, as an array of structures is turned into a
    structure of arrays. What is said of an address then holds in all planes of its reservation,
    which lie one behind the other; calls name the address in the first.
    """

    @property
    def granularity(self) -> int:
        """Bytes of one physical page in each plane."""

    @property
    def planes(self) -> int:
        """Parts of a page."""

    @property
    def mappings(self) -> MappingTable:
        """Which page is where. To be read by all; only the memory itself changes it."""

    def reserve(self, size: int, slab: int | None = None) -> int:
        """Reserve `size` bytes of address space a plane, without memory; touching it is a fault.

        Args:
            size: a multiple of `slab`.
            slab: bytes of equal parts, each range lying in one of them; None for a single part.
                They are best filled from their begin: addresses before the last page cost memory.

        Returns:
            The address, a multiple of the system's page size. Plane k begins `k * size` on.
        """

    def free(self, address: int, size: int) -> None:
        """Give back a whole reservation of `size` bytes a plane, in which nothing is mapped."""

    def create(self, count: int) -> list[Handle]:
        """Make `count` physical pages, consecutive handles where possible.

        A new page's contents are undefined. It has memory from now on, or from when it is first
        mapped.

        Raises:
            OutOfPages: the machine has no memory for all of them.
        """

    def destroy(self, handles: Sequence[Handle]) -> None:
        """Give pages back to the machine. None may be mapped anywhere."""

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        """Put `handles` behind the range that begins at `address`, readable and writable.

        The range must lie in one slab of a reservation and be unmapped. A page may be mapped
        elsewhere too.

        Raises:
            OutOfPages: the system has no room for another mapping, or no memory.
        """

    def unmap(self, address: int, count: int) -> None:
        """Take the pages from behind `count` mapped pages of addresses, which then fault again."""

    def close(self) -> None:
        """Release everything: mappings, pages and reservations. Idempotent."""
