"""What a machine must offer so that tensors can grow in place: reserve, commit, map, alias.

The names follow CUDA's virtual memory management API, whose meaning `VirtualMemory` fixes:
address space and physical pages are obtained separately, one page may be mapped at several
addresses, and touching an address with no page behind it is a fault, not a zero.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NewType

Handle = NewType("Handle", int)
"""One physical page: `VirtualMemory.granularity` bytes in each of its planes."""

NO_PAGE = Handle(-1)
"""What a `Reservation` has for an address that no page is behind."""


class AllocatorError(Exception):
    """A rule of the allocator was broken, or the operating system refused a request."""


class Refused(AllocatorError):  # noqa: N818 - says what has happened
    """The operating system refused a request; the message names the reason."""


class OutOfPages(Refused):
    """No physical memory, no budget, or no room for another mapping. Nothing was changed."""


class OutOfBudget(OutOfPages):
    """The KV budget is used up; the machine may have more memory."""


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


class VirtualMemory(ABC):
    """Address space and physical pages, obtained separately and joined by `map`.

    Addresses and sizes are in bytes and multiples of `granularity`. Every method is all or
    nothing: when it raises, the state is as before the call. A broken rule (overlapping map, unmap
    of an unmapped page, destroying a mapped page, ...) raises `AllocatorError`. Instances are used
    by one thread at a time.

    A page may have a part in each of several planes, as an array of structures is turned into a
    structure of arrays. What is said of an address then holds in all planes of its reservation,
    which lie one behind the other; calls name the address in the first.

    This class checks the rules and keeps the only record of which page is at which address. A
    subclass makes the calls of a system: each of its methods is called once the rules are kept,
    before the change is recorded.

    Args:
        granularity: bytes of one physical page in each plane.
        planes: parts of a page.

    Attributes:
        reservations: by their addresses.
        counts: page that exists -> number of addresses it is mapped at.
        closed: whether the memory is, so that every call raises.
    """

    def __init__(self, granularity: int, planes: int) -> None:
        self.granularity, self.planes = granularity, planes
        self.reservations: dict[int, Reservation] = {}
        self.counts: dict[Handle, int] = {}
        self.closed = False
        self._bases: list[int] = []  # of reservations, ascending
        self._created = 0  # handles are never used again: a stale one is always told

    @abstractmethod
    def _reserve(self, size: int) -> int: ...

    @abstractmethod
    def _free(self, address: int, size: int) -> None: ...

    @abstractmethod
    def _create(self, handles: Sequence[Handle]) -> None: ...

    @abstractmethod
    def _destroy(self, handles: Sequence[Handle]) -> Iterable[Handle]:
        """Yields each page once it is gone: an error leaves the others."""

    @abstractmethod
    def _map(self, address: int, handles: Sequence[Handle]) -> None: ...

    @abstractmethod
    def _unmap(self, address: int, pages: Sequence[Handle]) -> None:
        """Take `pages` from behind the addresses where they are."""

    @abstractmethod
    def _close(self) -> None: ...

    def reserve(self, size: int, slab: int | None = None) -> int:
        """Reserve `size` bytes of address space a plane, without memory; touching it is a fault.

        Args:
            size: a multiple of `slab`.
            slab: bytes of equal parts, each range lying in one of them; None for a single part.
                They are best filled from their begin: addresses before the last page cost memory.

        Returns:
            The address, a multiple of the system's page size. Plane k begins `k * size` on.
        """
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
        address, slab = self._reserve(size), slab or size
        self.reservations[address] = Reservation(size, slab, [[] for _ in range(size // slab)])
        insort(self._bases, address)
        return address

    def free(self, address: int, size: int) -> None:
        """Give back a whole reservation of `size` bytes a plane, in which nothing is mapped."""
        self.check_open()
        held = self.reservations.get(address)
        if held is None or held.size != size:
            why = "no reservation begins there" if held is None else f"it has {held.size} bytes"
            raise AllocatorError(f"cannot free {size} bytes at {address:#x}: {why}")
        if mapped := sum(len(slab) - slab.count(NO_PAGE) for slab in held.slabs):
            raise AllocatorError(
                f"cannot free {size} bytes at {address:#x}: {mapped} pages are still mapped there"
            )
        self._free(address, size)
        del self.reservations[address]
        self._bases.remove(address)

    def create(self, count: int) -> list[Handle]:
        """Make `count` physical pages, consecutive handles where possible.

        A new page's contents are undefined. It has memory from now on, or from when it is first
        mapped.

        Raises:
            OutOfPages: the machine has no memory for all of them.
        """
        self.check_open()
        if count < 0:
            raise AllocatorError(f"cannot create {count} pages")
        handles = [Handle(self._created + i) for i in range(count)]
        self._create(handles)
        self._created += count
        self.counts.update(dict.fromkeys(handles, 0))
        return handles

    def destroy(self, handles: Sequence[Handle]) -> None:
        """Give pages back to the machine. None may be mapped anywhere."""
        self.check_open()
        self._check_exist(handles)
        if len(set(handles)) != len(handles):
            raise AllocatorError(f"cannot destroy a page twice in one call: {sorted(handles)}")
        for handle in handles:
            if count := self.counts[handle]:
                raise AllocatorError(f"cannot destroy page {handle}: it is mapped {count} times")
        for handle in self._destroy(handles):
            del self.counts[handle]

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        """Put `handles` behind the range that begins at `address`, readable and writable.

        The range must lie in one slab of a reservation and be unmapped. A page may be mapped
        elsewhere too.

        Raises:
            OutOfPages: the system has no room for another mapping, or no memory.
        """
        slab, first = self._place(address, len(handles))
        self._check_exist(handles)
        count, there = len(handles), slab[first : first + len(handles)]
        if mapped := len(there) - there.count(NO_PAGE):
            raise AllocatorError(
                f"cannot map {count} pages at {address:#x}: at {mapped} of them is a page already"
            )
        self._map(address, handles)
        if first > len(slab):
            slab += [NO_PAGE] * (first - len(slab))
        slab[first : first + count] = handles
        for handle in handles:
            self.counts[handle] += 1

    def unmap(self, address: int, count: int) -> None:
        """Take the pages from behind `count` mapped pages of addresses, which then fault again."""
        slab, first = self._place(address, count)
        pages = slab[first : first + count]
        if missing := count - len(pages) + pages.count(NO_PAGE):
            raise AllocatorError(
                f"cannot unmap {count} pages at {address:#x}: at {missing} of them is none"
            )
        self._unmap(address, pages)
        for handle in pages:
            self.counts[handle] -= 1
        if first + count < len(slab):
            slab[first : first + count] = [NO_PAGE] * count
            return
        del slab[first:]
        while slab and slab[-1] == NO_PAGE:
            slab.pop()

    def close(self) -> None:
        """Release everything: mappings, pages and reservations. Idempotent."""
        if not self.closed:
            self.closed = True
            try:
                self._close()
            finally:
                self.reservations.clear()
                self._bases.clear()
                self.counts.clear()

    def check_open(self) -> None:
        """Raise AllocatorError where the memory is closed."""
        if self.closed:
            raise AllocatorError("this memory is closed")

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
