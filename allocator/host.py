"""`VirtualMemory` on Linux: reserved address space, and one memfd that holds the pages."""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

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
        self._fd: int | None = os.memfd_create("batchrun-kv")
        self._file_pages = 0
        self._holes: list[int] = []  # ascending: pages of the file with nothing behind them
        self._mapped_at: dict[Handle, int] = {}  # live page -> number of addresses it is mapped at
        self._reservations: dict[int, int] = {}  # address -> size
        self._table: dict[int, Handle] = {}  # address of a mapped page -> the page
        self._mappings = 0

    def reserve(self, size: int) -> int:
        """See `VirtualMemory.reserve`."""
        self._open_fd()
        if size <= 0 or size % self.granularity:
            raise AllocatorError(
                f"cannot reserve {size} bytes: not a positive multiple of the page size, "
                f"{self.granularity}"
            )
        address = self._mmap(None, size, None)
        self._reservations[address] = size
        self._mappings += 1
        return address

    def free(self, address: int, size: int) -> None:
        """See `VirtualMemory.free`."""
        self._open_fd()
        if self._reservations.get(address) != size:
            held = self._reservations.get(address)
            why = "no reservation begins there" if held is None else f"it has {held} bytes"
            raise AllocatorError(f"cannot free {size} bytes at {address:#x}: {why}")
        mapped = sum(address <= page < address + size for page in self._table)
        if mapped:
            raise AllocatorError(
                f"cannot free {size} bytes at {address:#x}: {mapped} pages are still mapped there"
            )
        if self._libc.munmap(address, size):
            raise _os_error("munmap", f"{size} bytes at {address:#x}")
        del self._reservations[address]
        self._mappings -= 1

    def create(self, count: int) -> list[Handle]:
        """See `VirtualMemory.create`."""
        self._open_fd()
        if count < 0:
            raise AllocatorError(f"cannot create {count} pages")
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
        self._mapped_at.update(dict.fromkeys(handles, 0))
        return handles

    def destroy(self, handles: Sequence[Handle]) -> None:
        """See `VirtualMemory.destroy`."""
        self._open_fd()
        self._check_live(handles)
        if len(set(handles)) != len(handles):
            raise AllocatorError(f"cannot destroy a page twice in one call: {sorted(handles)}")
        for handle in handles:
            if self._mapped_at[handle]:
                raise AllocatorError(
                    f"cannot destroy page {handle}: it is mapped at {self._mapped_at[handle]} "
                    "addresses"
                )
        self._punch(sorted(handles))
        for handle in handles:
            del self._mapped_at[handle]
        self._holes = sorted([*self._holes, *handles])

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        """See `VirtualMemory.map`."""
        self._check_range(address, len(handles))
        self._check_live(handles)
        page = self.granularity
        for position in range(len(handles)):
            if address + position * page in self._table:
                raise AllocatorError(
                    f"cannot map {len(handles)} pages at {address:#x}: "
                    f"page {position} of the range is mapped already"
                )
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
        for position, handle in enumerate(handles):
            self._table[address + position * page] = handle
            self._mapped_at[handle] += 1
        self._mappings += self._cuts(address, len(handles)) - before

    def unmap(self, address: int, count: int) -> None:
        """See `VirtualMemory.unmap`."""
        self._check_range(address, count)
        page = self.granularity
        pages = [address + position * page for position in range(count)]
        missing = next((p for p in pages if p not in self._table), None)
        if missing is not None:
            raise AllocatorError(
                f"cannot unmap {count} pages at {address:#x}: nothing is mapped at {missing:#x}"
            )
        before = self._cuts(address, count)
        # Mapping nothing over it, rather than munmap, keeps the range reserved.
        self._mmap(address, count * page, None)
        for at in pages:
            self._mapped_at[self._table.pop(at)] -= 1
        self._mappings += self._cuts(address, count) - before

    def close(self) -> None:
        """See `VirtualMemory.close`."""
        if self._fd is None:
            return
        for address, size in self._reservations.items():
            self._libc.munmap(address, size)
        os.close(self._fd)
        self._fd = None
        self._reservations.clear()
        self._table.clear()
        self._mapped_at.clear()
        self._mappings = 0

    def _cuts(self, address: int, count: int) -> int:
        """Places in and around a range where one kernel mapping ends and another begins."""
        page, table = self.granularity, self._table
        base, size = self._reservation_of(address, count)
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
            protection, fd = mmap.PROT_READ | mmap.PROT_WRITE, self._open_fd()
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
        while self._libc.fallocate(self._open_fd(), mode, index * page, count * page):
            if ctypes.get_errno() != errno.EINTR:
                return ctypes.get_errno()
        return 0

    def _punch(self, indices: Sequence[int]) -> None:
        for start, stop in _runs(indices):
            if self._fallocate(_PUNCH_HOLE, indices[start], stop - start):
                raise _os_error("fallocate", f"punching {stop - start} pages")

    def _reservation_of(self, address: int, count: int) -> tuple[int, int]:
        end = address + count * self.granularity
        for base, size in self._reservations.items():
            if base <= address and end <= base + size:
                return base, size
        raise AllocatorError(f"{count} pages at {address:#x} do not lie in one reservation")

    def _check_range(self, address: int, count: int) -> None:
        self._open_fd()
        if count <= 0:
            raise AllocatorError(f"a range of {count} pages at {address:#x} is empty")
        base, _ = self._reservation_of(address, count)
        if (address - base) % self.granularity:
            raise AllocatorError(
                f"address {address:#x} is not on a page boundary of the reservation at {base:#x}"
            )

    def _check_live(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            if handle not in self._mapped_at:
                raise AllocatorError(f"page {handle} does not exist (never created, or destroyed)")

    def _open_fd(self) -> int:
        if self._fd is None:
            raise AllocatorError("this HostMemory is closed")
        return self._fd

    def _create_error(self, count: int, number: int) -> AllocatorError:
        if number not in _NO_MEMORY:
            return AllocatorError(f"cannot commit {count} pages: {os.strerror(number)}")
        held = len(self._mapped_at)
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
