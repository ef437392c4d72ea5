"""What a `VirtualMemory` has given out, and the rules of that protocol checked against it."""

from bisect import bisect_right, insort
from collections.abc import Sequence

from batchrun.allocator.vmm import AllocatorError, Handle


class MappingTable:
    """Reservations, pages and mappings of one memory. It only keeps book: no call to a system.

    Each `check_*` raises `AllocatorError` where a rule would be broken, and changes nothing.

    Args:
        granularity: bytes of one page.

    Attributes:
        reservations: address -> size.
        mapped_at: page that exists -> number of addresses it is mapped at.
        table: address of a mapped page -> the page.
        closed: whether the memory is, so that every check raises.
    """

    def __init__(self, granularity: int) -> None:
        self.granularity = granularity
        self.reservations: dict[int, int] = {}
        self._bases: list[int] = []  # of them, ascending
        self.mapped_at: dict[Handle, int] = {}
        self.table: dict[int, Handle] = {}
        self.closed = False

    def check_open(self) -> None:
        """The memory is not closed."""
        if self.closed:
            raise AllocatorError("this memory is closed")

    def check_reserve(self, size: int) -> None:
        """`size` is whole pages, and at least one."""
        self.check_open()
        if size <= 0 or size % self.granularity:
            raise AllocatorError(
                f"cannot reserve {size} bytes: not a positive multiple of the page size, "
                f"{self.granularity}"
            )

    def check_free(self, address: int, size: int) -> None:
        """The range is one whole reservation, and nothing is mapped in it."""
        self.check_open()
        held = self.reservations.get(address)
        if held != size:
            why = "no reservation begins there" if held is None else f"it has {held} bytes"
            raise AllocatorError(f"cannot free {size} bytes at {address:#x}: {why}")
        mapped = sum(address <= page < address + size for page in self.table)
        if mapped:
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
            if self.mapped_at[handle]:
                raise AllocatorError(
                    f"cannot destroy page {handle}: it is mapped at {self.mapped_at[handle]} "
                    "addresses"
                )

    def check_map(self, address: int, handles: Sequence[Handle]) -> range:
        """Every page exists, and the range is in one reservation and unmapped.

        Returns:
            The address of each page of the range.
        """
        pages = self._range(address, len(handles))
        self._check_exist(handles)
        for position, at in enumerate(pages):
            if at in self.table:
                raise AllocatorError(
                    f"cannot map {len(handles)} pages at {address:#x}: "
                    f"page {position} of the range is mapped already"
                )
        return pages

    def check_unmap(self, address: int, count: int) -> range:
        """The range is in one reservation and mapped throughout.

        Returns:
            The address of each page of the range.
        """
        pages = self._range(address, count)
        for at in pages:
            if at not in self.table:
                raise AllocatorError(
                    f"cannot unmap {count} pages at {address:#x}: nothing is mapped at {at:#x}"
                )
        return pages

    def reserved(self, address: int, size: int) -> None:
        """Enter a reservation."""
        self.reservations[address] = size
        insort(self._bases, address)

    def freed(self, address: int) -> None:
        """Enter that a reservation is given back."""
        del self.reservations[address]
        self._bases.remove(address)

    def mapped(self, pages: range, handles: Sequence[Handle]) -> None:
        """Enter that `handles` are mapped at the addresses `pages`."""
        for at, handle in zip(pages, handles, strict=True):
            self.table[at] = handle
            self.mapped_at[handle] += 1

    def unmapped(self, pages: range) -> None:
        """Enter that nothing is mapped at the addresses `pages` any more."""
        for at in pages:
            self.mapped_at[self.table.pop(at)] -= 1

    def close(self) -> None:
        """Forget everything; every check raises from now on."""
        self.closed = True
        self.reservations.clear()
        self._bases.clear()
        self.mapped_at.clear()
        self.table.clear()

    def reservation_of(self, address: int, count: int) -> tuple[int, int]:
        """Address and size of the reservation that holds a range of `count` pages."""
        end = address + count * self.granularity
        at = bisect_right(self._bases, address)
        if at:
            base = self._bases[at - 1]
            size = self.reservations[base]
            if end <= base + size:
                return base, size
        raise AllocatorError(f"{count} pages at {address:#x} do not lie in one reservation")

    def _range(self, address: int, count: int) -> range:
        self.check_open()
        if count <= 0:
            raise AllocatorError(f"a range of {count} pages at {address:#x} is empty")
        base, _ = self.reservation_of(address, count)
        if (address - base) % self.granularity:
            raise AllocatorError(
                f"address {address:#x} is not on a page boundary of the reservation at {base:#x}"
            )
        return range(address, address + count * self.granularity, self.granularity)

    def _check_exist(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            if handle not in self.mapped_at:
                raise AllocatorError(f"page {handle} does not exist (never created, or destroyed)")
