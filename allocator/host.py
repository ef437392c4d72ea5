"""`VirtualMemory` on Linux: reserved address space, and one memfd that holds the pages."""

import ctypes
import errno
import mmap
import os
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence

from batchrun import platforms
from batchrun.allocator.system import (
    SHARED_MEMORY,
    is_memfd,
    load_libc,
    max_map_count,
    memory_file,
    refusal,
    refused,
    why_no_addresses,
)
from batchrun.allocator.vmm import AllocatorError, Handle, OutOfPages, Refused, VirtualMemory

if platforms.LINUX:
    import resource

# From <linux/mman.h> and <linux/falloc.h>; the `mmap` module lacks some before Python 3.13.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE demands FALLOC_FL_KEEP_SIZE
_MAP_FAILED = ctypes.c_void_p(-1).value
_SPARE_PLACES = 1 << 31  # pages: beyond any reservation
_SPARE_STRIDE = 1 << 32  # pages from one plane of the spare places to the next
_NO_MEMORY = {errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT}


class HostMemory(VirtualMemory):
    """Pages of a memfd, mapped shared into reservations; other addresses fault.

    The memfd is sparse and as large as all reservations together. A page gets memory and a place in
    the file when it is first mapped: the place that belongs to the address, unless that place is
    taken by a page now mapped elsewhere. Pages at neighbouring addresses are thus neighbours in the
    file and share one kernel mapping, in whatever order they were mapped. Linux limits the mappings
    of a process (vm.max_map_count), and at the limit even unmapping can fail, so this class counts
    its own mappings and stops short of it.

    With `guard` off, a reservation shows the memfd from the start. A page mapped at its own place
    then needs memory but no mapping of its own, which saves three system calls, and a fault for
    each 4 KiB. Addresses without a page do not fault in this mode, but must not be touched. A page
    that is mapped nowhere loses its place, its memory and its contents, so that it can have the
    right place again wherever it is mapped next.

    Args:
        page_size: bytes of one page in each plane, a multiple of the system's page size.
        planes: parts of a page. Each plane of a reservation has its own range of the file.
        guard: whether touching an address without a page is a fault.
        max_mappings: kernel mappings to use at most; by default three quarters of the process's
            limit, which leaves the rest to libraries, threads and files.
    """

    def __init__(
        self,
        page_size: int = 256 << 10,
        *,
        planes: int = 1,
        guard: bool = True,
        max_mappings: int | None = None,
    ) -> None:
        if not platforms.LINUX:
            raise AllocatorError(f"HostMemory needs Linux (memfd, mmap); this is {platforms.NAME}")
        if page_size <= 0 or page_size % mmap.PAGESIZE:
            raise AllocatorError(
                f"page size {page_size} is not a positive multiple of the system's {mmap.PAGESIZE}"
            )
        if max_mappings is None:
            max_mappings = max_map_count() * 3 // 4
        super().__init__(page_size, planes)
        self.max_mappings = max_mappings
        self._guard = guard
        self._libc = load_libc()
        self._fd = memory_file()
        self._places: dict[Handle, int] = {}  # page -> where it is in the file, in pages
        self._taken: set[int] = set()  # those places
        self._begins: dict[int, int] = {}  # reservation -> the place of its first page
        self._end = 0  # past the places of every reservation ever made
        self._ranges: list[tuple[int, int]] = []  # of each: its first place, pages per plane
        self._spare = _SPARE_PLACES
        self._kernel_mappings = 0  # in each plane

    def _reserve(self, size: int) -> int:
        begin, pages = self._end, size // self.granularity
        self._check_file_limit(begin + pages * self.planes)
        address = self._mmap(None, size * self.planes, None)
        self._begins[address] = begin
        self._ranges.append((begin, pages))
        self._end += pages * self.planes
        self._kernel_mappings += 1
        try:
            for plane in range(0 if self._guard else self.planes):
                self._mmap(address + plane * size, size, begin, plane)
        except AllocatorError:
            self._free(address, size)
            raise
        return address

    def _free(self, address: int, size: int) -> None:
        if self._libc.munmap(address, size * self.planes):
            raise refused("munmap", f"{size} bytes at {address:#x}")
        del self._begins[address]
        self._kernel_mappings -= 1

    def _create(self, handles: Sequence[Handle]) -> None:
        """A page gets its memory when it is first mapped."""

    def _destroy(self, handles: Sequence[Handle]) -> Sequence[Handle]:
        self._displace([handle for handle in handles if handle in self._places])
        return handles

    def _map(self, address: int, handles: Sequence[Handle]) -> None:
        own = self._own_place(address)
        placed = self._place_in_file(own, handles)
        try:
            places = [self._places[handle] for handle in handles]
            if self._guard or places != list(range(own, own + len(places))):
                self._show(address, places, populate=True)
        except AllocatorError:
            self._displace(placed)
            raise

    def _unmap(self, address: int, pages: Sequence[Handle]) -> None:
        if self._guard:
            self._show(address, [None] * len(pages))
            return
        own = self._own_place(address)
        places = list(range(own, own + len(pages)))
        if [self._places[page] for page in pages] != places:
            self._show(address, places)
        self._displace([page for page, n in Counter(pages).items() if self.counts[page] == n])

    def _close(self) -> None:
        for address, held in self.reservations.items():
            self._libc.munmap(address, held.size * self.planes)
        os.close(self._fd)
        self._places.clear()
        self._taken.clear()
        self._begins.clear()
        self._kernel_mappings = 0

    def _own_place(self, address: int) -> int:
        """The place in the file that belongs to an address."""
        base, _ = self.reservation_of(address)
        return self._begins[base] + (address - base) // self.granularity

    def _show(self, address: int, places: Sequence[int | None], *, populate: bool = False) -> None:
        """Make addresses show these places of the file (None: nothing). All or no change."""
        page = self.granularity
        base, held = self.reservation_of(address)
        end = address + len(places) * page
        left = self._shown(address - page, 1) if address > base else []
        right = self._shown(end, 1) if end < base + held.size else []
        before = self._shown(address, len(places))
        runs = [r for r in _runs(places) if before[slice(*r)] != list(places[slice(*r)])]
        # At worst, a run splits the mapping that it lands in at both ends.
        if populate and (self._kernel_mappings + len(runs) + 1) * self.planes > self.max_mappings:
            raise self._out_of_mappings(len(runs))
        done: list[tuple[int, Sequence[int | None], int]] = []  # address, what it showed, plane
        try:
            for plane in range(self.planes):
                for start, stop in runs:
                    at = address + plane * held.size + start * page
                    self._mmap(at, (stop - start) * page, places[start], plane, populate=populate)
                    done.append((at, before[start:stop], plane))
        except AllocatorError:
            self._undo(done, hide=populate)
            raise
        self._kernel_mappings += _cuts([*left, *places, *right]) - _cuts([*left, *before, *right])

    def _undo(self, done: Sequence[tuple[int, Sequence[int | None], int]], *, hide: bool) -> None:
        """Make addresses show what they showed before; with `hide`, make them inaccessible.

        At the kernel's limit on mappings another mmap would fail too; mprotect does not.
        """
        page = self.granularity
        for address, before, plane in done:
            if hide and self._libc.mprotect(address, len(before) * page, 0):
                raise refused("mprotect", f"{len(before)} pages at {address:#x}") from None
            for start, stop in () if hide else _runs(before):
                self._mmap(address + start * page, (stop - start) * page, before[start], plane)
        self._guard = self._guard or hide  # those pages no longer show their own places

    def _shown(self, address: int, count: int) -> list[int | None]:
        """The place that each address of a range shows."""
        pages = self.pages(address, count)
        if self._guard:
            return [self._places.get(page) for page in pages]
        own = self._own_place(address)
        return [self._places.get(page, own + index) for index, page in enumerate(pages)]

    def _place_in_file(self, own: int, handles: Sequence[Handle]) -> list[Handle]:
        """Give memory and a place in the file to the pages that have none; returns those pages."""
        placed: list[Handle] = []
        for position, handle in enumerate(handles):
            if handle in self._places:
                continue
            place = own + position
            if place in self._taken:
                place = self._spare
                self._spare += 1
            self._places[handle] = place
            self._taken.add(place)
            placed.append(handle)
        places = [self._places[handle] for handle in placed]
        for start, stop in _runs(places):
            failure = self._fallocate(0, places[start], stop - start)
            if failure:
                error = self._commit_error(len(placed), failure)
                self._displace(placed)
                raise error
        return placed

    def _displace(self, handles: Sequence[Handle]) -> None:
        """Take away the memory of pages and their places in the file."""
        places = sorted(self._places.pop(handle) for handle in handles)
        self._taken.difference_update(places)
        for start, stop in _runs(places):
            # If punching fails, the memory stays until the place is taken again.
            self._fallocate(_PUNCH_HOLE, places[start], stop - start)

    def _mmap(
        self,
        address: int | None,
        size: int,
        place: int | None,
        plane: int = 0,
        *,
        populate: bool = False,
    ) -> int:
        """Map a plane's file from `place` on at `address`; without a place, reserve the range."""
        fixed = 0 if address is None else _MAP_FIXED
        protection, fd, offset = 0, -1, 0
        if place is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | fixed
        else:
            protection, fd = mmap.PROT_READ | mmap.PROT_WRITE, self._fd
            offset = self._offset(place, plane)
            # Populating now costs one call; otherwise each 4 KiB faults on first touch.
            flags = mmap.MAP_SHARED | _MAP_NORESERVE | fixed | (populate and mmap.MAP_POPULATE)
        got = self._libc.mmap(address, size, protection, flags, fd, offset)
        if got == _MAP_FAILED:
            if ctypes.get_errno() == errno.ENOMEM and address and place is not None:
                raise self._out_of_mappings(1)
            raise refused("mmap", f"{size} bytes", why_no_addresses() if place is None else "")
        return int(got)

    def _offset(self, place: int, plane: int) -> int:
        """The file offset of a plane's part of a place, no larger than the address space requires.

        A limit on file sizes then allows as much as it would without planes.
        """
        stride = _SPARE_STRIDE
        if plane and place < _SPARE_PLACES:
            stride = self._ranges[bisect_right(self._ranges, (place, sys.maxsize)) - 1][1]
        return (place + plane * stride) * self.granularity

    def _fallocate(self, mode: int, index: int, count: int) -> int:
        """Commit or punch pages of the file, in all planes. Returns 0 or the errno."""
        page = self.granularity
        for plane in range(self.planes):
            at = self._offset(index, plane)
            while self._libc.fallocate(self._fd, mode, at, count * page):
                if ctypes.get_errno() != errno.EINTR:
                    return ctypes.get_errno()
        return 0

    def _commit_error(self, count: int, number: int) -> AllocatorError:
        if number not in _NO_MEMORY:
            return refusal("fallocate", f"{count} pages", number)
        held, size = len(self._places), self.granularity * self.planes
        cure = "free memory, or use a smaller KV budget"
        if number == errno.EFBIG:
            cure = "lift the limit on file sizes (`ulimit -f unlimited`)"
        elif number == errno.ENOSPC and not is_memfd(self._fd):
            cure = f"make {SHARED_MEMORY} larger (docker run --shm-size), or allow memfd_create"
        return OutOfPages(
            f"cannot commit {count} pages of {size} bytes: {os.strerror(number)} "
            f"({held - count} pages are held, {(held - count) * size} bytes); {cure}"
        )

    def _check_file_limit(self, places: int) -> None:
        """Refuse a reservation whose pages would exceed the limit on file sizes."""
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit != resource.RLIM_INFINITY and places * self.granularity > limit:
            raise Refused(
                f"the KV cache needs an in-memory file of {places * self.granularity} bytes, "
                f"and files are limited to {limit} bytes here; "
                "lift the limit on file sizes (`ulimit -f unlimited`)"
            )

    def _out_of_mappings(self, more: int) -> OutOfPages:
        more, used = more * self.planes, self._kernel_mappings * self.planes
        return OutOfPages(
            f"cannot add {more} memory mappings: {used} of {self.max_mappings} are in use, and "
            "vm.max_map_count limits them; run `sysctl -w vm.max_map_count=1048576`, or "
            "use larger pages or fewer sequences at once"
        )


def _runs(places: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """Positions [start, stop) of each maximal run of consecutive places, or of Nones."""
    start = 0
    for position in range(1, len(places) + 1):
        if position == len(places) or _cut(places[position - 1], places[position]):
            yield start, position
            start = position


def _cuts(places: Sequence[int | None]) -> int:
    """How many boundaries between kernel mappings lie in addresses that show these places."""
    return sum(map(_cut, places, places[1:]))


def _cut(left: int | None, right: int | None) -> bool:
    if left is None or right is None:
        return left is not right
    return right != left + 1
