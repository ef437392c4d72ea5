"""`VirtualMemory` on Linux: reserved address space, and one memfd that holds the pages."""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .ledger import Ledger
from .vmm import AllocatorError, Handle, OutOfPages

# From <linux/mman.h> and <linux/falloc.h>; the `mmap` module lacks some before Python 3.13.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE demands FALLOC_FL_KEEP_SIZE
_MAP_FAILED = ctypes.c_void_p(-1).value
_NO_MEMORY = {errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT}


class HostMemory:
    """Pages of a memfd, mapped shared into reservations that otherwise fault.

    A handle is the index of a page in the memfd, so pages with consecutive handles at consecutive
    addresses need one `mmap` call and one kernel mapping. Linux bounds the mappings of a process
    (vm.max_map_count), and past that bound even unmapping can fail; this class counts its own and
    stops short of it.

    Args:
        page_size: bytes of one page, a multiple of the system's page size.
        max_mappings: kernel mappings to use at most; by default three quarters of what a process
            may have, which leaves the rest to libraries, threads and files.
    """

    def __init__(self, page_size: int = 256 << 10, *, max_mappings: int | None = None) -> None:
        if sys.platform != "linux":
            raise AllocatorError(f"HostMemory needs Linux (memfd, mmap); this is {sys.platform}")
        if page_size <= 0 or page_size % mmap.PAGESIZE:
            raise AllocatorError(
                f"page size {page_size} is not a positive multiple of the system's {mmap.PAGESIZE}"
            )
        if max_mappings is None:
            max_mappings = int(Path("/proc/sys/vm/max_map_count").read_text()) * 3 // 4
        self.granularity = page_size
        self.max_mappings = max_mappings
        self._libc = _load_libc()
        self.ledger = Ledger(page_size)
        self._fd = os.memfd_create("batchrun-kv")
        self._file_pages = 0
        self._holes: list[int] = []  # ascending: pages of the file with nothing behind them
        self._mappings = 0

    def reserve(self, size: int) -> int:
        """See `VirtualMemory.reserve`."""
        self.ledger.check_reserve(size)
        address = self._mmap(None, size, None)
        self.ledger.reservations[address] = size
        self._mappings += 1
        return address

    def free(self, address: int, size: int) -> None:
        """See `VirtualMemory.free`."""
        self.ledger.check_free(address, size)
        if self._libc.munmap(address, size):
            raise _os_error("munmap", f"{size} bytes at {address:#x}")
        del self.ledger.reservations[address]
        self._mappings -= 1

    def create(self, count: int) -> list[Handle]:
        """See `VirtualMemory.create`."""
        self.ledger.check_create(count)
        reused = self._holes[:count]
        end = self._file_pages + count - len(reused)
        indices = reused + list(range(self._file_pages, end))
        committed: list[int] = []
        for start, stop in _runs(indices):
            failure = self._fallocate(0, indices[start], stop - start)
            if failure:
                self._punch(committed)
                raise self._create_error(count, failure)
            committed += indices[start:stop]
        del self._holes[: len(reused)]
        self._file_pages = end
        handles = [Handle(index) for index in indices]
        self.ledger.mapped_at.update(dict.fromkeys(handles, 0))
        return handles

    def destroy(self, handles: Sequence[Handle]) -> None:
        """See `VirtualMemory.destroy`."""
        self.ledger.check_destroy(handles)
        self._punch(sorted(handles))
        for handle in handles:
            del self.ledger.mapped_at[handle]
        self._holes = sorted([*self._holes, *handles])

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        """See `VirtualMemory.map`."""
        pages, page = self.ledger.check_map(address, handles), self.granularity
        runs = list(_runs(handles))
        # A run cuts the mapping that it lands in at both ends, at worst.
        if self._mappings + len(runs) + 1 > self.max_mappings:
            raise self._out_of_mappings(len(runs))
        before = self._cuts(address, len(handles))
        for start, stop in runs:
            try:
                self._mmap(address + start * page, (stop - start) * page, handles[start])
            except AllocatorError:
                # At the kernel's bound mmap would fail again; taking access away does not.
                if start and self._libc.mprotect(address, start * page, 0):
                    raise _os_error("mprotect", f"{start} pages at {address:#x}") from None
                raise
        self.ledger.mapped(pages, handles)
        self._mappings += self._cuts(address, len(handles)) - before

    def unmap(self, address: int, count: int) -> None:
        """See `VirtualMemory.unmap`."""
        pages = self.ledger.check_unmap(address, count)
        before = self._cuts(address, count)
        # Mapping nothing over it, rather than munmap, keeps the range reserved.
        self._mmap(address, count * self.granularity, None)
        self.ledger.unmapped(pages)
        self._mappings += self._cuts(address, count) - before

    def close(self) -> None:
        """See `VirtualMemory.close`."""
        if self.ledger.closed:
            return
        for address, size in self.ledger.reservations.items():
            self._libc.munmap(address, size)
        os.close(self._fd)
        self.ledger.close()
        self._mappings = 0

    def _cuts(self, address: int, count: int) -> int:
        """Places in and around a range where one kernel mapping ends and another begins."""
        page, table = self.granularity, self.ledger.table
        base, size = self.ledger.reservation_of(address, count)
        first = max(address, base + page)
        last = min(address + count * page, base + size - page)
        cuts = 0
        for at in range(first, last + page, page):
            left, right = table.get(at - page), table.get(at)
            if left is None or right is None:
                cuts += left is not right
            else:
                cuts += right != left + 1
        return cuts

    def _mmap(self, address: int | None, size: int, handle: Handle | None) -> int:
        """Map pages from `handle` on at `address`; without a handle, reserve the range."""
        fixed = 0 if address is None else _MAP_FIXED
        protection, fd, offset = 0, -1, 0
        if handle is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | fixed
        else:
            protection, fd = mmap.PROT_READ | mmap.PROT_WRITE, self._fd
            offset = handle * self.granularity
            # Populating now costs one call; otherwise each 4 KiB faults when it is first touched.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE | fixed
        got = self._libc.mmap(address, size, protection, flags, fd, offset)
        if got == _MAP_FAILED:
            if ctypes.get_errno() == errno.ENOMEM and handle is not None:
                raise self._out_of_mappings(1)
            raise _os_error("mmap", f"{size} bytes")
        return int(got)

    def _fallocate(self, mode: int, index: int, count: int) -> int:
        """Commit or punch pages of the file. Returns 0 or the errno."""
        page = self.granularity
        while self._libc.fallocate(self._fd, mode, index * page, count * page):
            if ctypes.get_errno() != errno.EINTR:
                return ctypes.get_errno()
        return 0

    def _punch(self, indices: Sequence[int]) -> None:
        for start, stop in _runs(indices):
            if self._fallocate(_PUNCH_HOLE, indices[start], stop - start):
                raise _os_error("fallocate", f"punching {stop - start} pages")

    def _create_error(self, count: int, number: int) -> AllocatorError:
        if number not in _NO_MEMORY:
            return AllocatorError(f"cannot commit {count} pages: {os.strerror(number)}")
        held = len(self.ledger.mapped_at)
        return OutOfPages(
            f"cannot commit {count} pages of {self.granularity} bytes: {os.strerror(number)} "
            f"({held} pages are held, {held * self.granularity} bytes); free memory, or use a "
            "smaller KV budget"
        )

    def _out_of_mappings(self, more: int) -> OutOfPages:
        return OutOfPages(
            f"cannot add {more} memory mappings: {self._mappings} of {self.max_mappings} are in "
            "use, and Linux bounds them by vm.max_map_count; run "
            "`sysctl -w vm.max_map_count=1048576`, or use larger pages or fewer sequences at once"
        )


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Positions [start, stop) of each maximal run of consecutive numbers."""
    start = 0
    for position in range(1, len(indices) + 1):
        if position == len(indices) or indices[position] != indices[position - 1] + 1:
            yield start, position
            start = position


def _os_error(call: str, what: str) -> AllocatorError:
    return AllocatorError(f"{call} failed for {what}: {os.strerror(ctypes.get_errno())}")


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, offset, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
    libc.mmap.argtypes = [pointer, size, number, number, number, offset]
    libc.mmap.restype = pointer
    libc.munmap.argtypes = [pointer, size]
    libc.mprotect.argtypes = [pointer, size, number]
    libc.fallocate.argtypes = [number, number, offset, offset]
    return libc
