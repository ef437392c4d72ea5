"""What a machine must offer so that tensors can grow in place: reserve, commit, map, alias.

The names follow CUDA's virtual memory management API, and `VirtualMemory` defines their meaning:
address space and physical pages are obtained separately, one page may be mapped at several
addresses, and touching an address without a page is a fault, not a zero.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NewType

Handle = NewType("Handle", int)
"""One physical page: `VirtualMemory.granularity` bytes in each of its planes."""

NO_PAGE = Handle(-1)
"""What a `Reservation` holds for an address without a page."""


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
    """Reserved address space.

    Attributes:
        size: bytes of each plane.
        slab: bytes of each slab.
        slabs: for each slab, the page at every address from its start to its last page.
    """

    size: int
    slab: int
    slabs: list[list[Handle]]


class VirtualMemory(ABC):
    """Address space and physical pages, obtained separately and joined by `map`.

    Addresses and sizes are in bytes and multiples of `granularity`. Every method is all or nothing:
    when it raises, the state is as before the call. A broken rule (overlapping map, unmap of an
    unmapped page, destroying a mapped page, ...) raises `AllocatorError`. Only one thread may use
    an instance at a time.

    A page may have a part in each of several planes, much as an array of structures can be stored
    as a structure of arrays. The planes of a reservation lie one after the other. Calls name the
    address in the first plane, and what they do applies to all of them.

    This class checks the rules and keeps the only record of which page is at which address. A
    subclass makes the system calls: each of its methods is called after the checks and before the
    change is recorded.

    Args:
        granularity: bytes of one physical page in each plane.
        planes: parts of a page.

    Attributes:
        reservations: by address.
        counts: existing page -> number of addresses it is mapped at.
        closed: whether the memory is closed; then every call raises.
    """

    def __init__(self, granularity: int, planes: int) -> None:
        self.granularity, self.planes = granularity, planes
        self.reservations: dict[int, Reservation] = {}
        self.counts: dict[Handle, int] = {}
        self.closed = False
        self._bases: list[int] = []  # of reservations, ascending
        self._created = 0  # handles are never reused, so a stale one is always detected

    @abstractmethod
    def _reserve(self, size: int) -> int: ...

    @abstractmethod
    def _free(self, address: int, size: int) -> None: ...

    @abstractmethod
    def _create(self, handles: Sequence[Handle]) -> None: ...

    @abstractmethod
    def _destroy(self, handles: Sequence[Handle]) -> Iterable[Handle]:
        """Yields each page once it is gone; after an error, the others still exist."""

    @abstractmethod
    def _map(self, address: int, handles: Sequence[Handle]) -> None: ...

    @abstractmethod
    def _unmap(self, address: int, pages: Sequence[Handle]) -> None:
        """Unmap `pages`, which start at `address`."""

    @abstractmethod
    def _close(self) -> None: ...

    def reserve(self, size: int, slab: int | None = None) -> int:
        """Reserve `size` bytes of address space per plane, without memory; touching it is a fault.

        Args:
            size: a multiple of `slab`.
            slab: bytes of each of the equal slabs; a range must lie in one slab. None for a single
                slab. Best filled from the start, as addresses before the last page cost memory in
                the record.

        Returns:
            The address, a multiple of the system's page size. Plane k begins `k * size` further on.
        """
        self.check_open()
        if size <= 0 or size % self.granularity:
            raise AllocatorError(
                f"cannot reserve {size} bytes: not a positive multiple of the page size, "
                f"{self.granularity}"
            )
        if slab is not None and (slab <= 0 or slab % self.granularity or size % slab):
            raise AllocatorError(
                f"cannot reserve {size} bytes in slabs of {slab}: not whole slabs, or not whole "
                f"pages of {self.granularity}"
            )
        address, slab = self._reserve(size), slab or size
        self.reservations[address] = Reservation(size, slab, [[] for _ in range(size // slab)])
        insort(self._bases, address)
        return address

    def free(self, address: int, size: int) -> None:
        """Give back a whole reservation of `size` bytes per plane; nothing may be mapped in it."""
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
        """Make `count` physical pages, with consecutive handles.

        A new page's contents are undefined. It gets memory now, or when it is first mapped.

        Raises:
            OutOfPages: the machine does not have memory for all of them.
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
        """Map `handles`, readable and writable, into the range that begins at `address`.

        The range must lie in one slab of a reservation and be unmapped. A page may also be mapped
        elsewhere.

        Raises:
            OutOfPages: the system has no room for another mapping, or no memory.
        """
        slab, first = self._place(address, len(handles))
        self._check_exist(handles)
        count, there = len(handles), slab[first : first + len(handles)]
        if mapped := len(there) - there.count(NO_PAGE):
            raise AllocatorError(
                f"cannot map {count} pages at {address:#x}: {mapped} are mapped there already"
            )
        self._map(address, handles)
        if first > len(slab):
            slab += [NO_PAGE] * (first - len(slab))
        slab[first : first + count] = handles
        for handle in handles:
            self.counts[handle] += 1

    def unmap(self, address: int, count: int) -> None:
        """Unmap `count` pages from `address` on; touching those addresses is a fault again."""
        slab, first = self._place(address, count)
        pages = slab[first : first + count]
        if missing := count - len(pages) + pages.count(NO_PAGE):
            raise AllocatorError(
                f"cannot unmap {count} pages at {address:#x}: {missing} are not mapped"
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
        """Raise AllocatorError if the memory is closed."""
        if self.closed:
            raise AllocatorError("this memory is closed")

    def pages(self, address: int, count: int) -> list[Handle]:
        """The page at each address of a range in one slab, or `NO_PAGE`."""
        slab, first = self._place(address, count)
        found = slab[first : first + count]
        return found + [NO_PAGE] * (count - len(found))

    def all_mapped(self) -> Iterator[tuple[int, Handle]]:
        """Every mapped address and its page."""
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
