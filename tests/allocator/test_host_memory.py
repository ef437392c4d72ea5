"""What only the Linux implementation promises: errors of the kernel, coalescing, no leaks."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_twins import opened, run_python

from batchrun.allocator.host import HostMemory
from batchrun.allocator.vmm import AllocatorError, OutOfPages


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    with opened(HostMemory(4096)) as memory:
        yield memory


def resident(memory: HostMemory) -> int:
    """Bytes that the kernel has committed for the memory's pages."""
    return os.fstat(memory._fd).st_blocks * 512


@pytest.mark.parametrize("size", [0, -4096, 1000])
def test_page_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises(AllocatorError, match=str(size)):
        HostMemory(size)


def test_pages_are_committed_when_first_mapped_and_returned_by_destroy(memory: HostMemory) -> None:
    base, handles = memory.reserve(16 * 4096), memory.create(10)
    assert resident(memory) == 0
    memory.map(base, handles[:8])
    assert resident(memory) == 8 * 4096
    memory.unmap(base, 8)
    assert resident(memory) == 8 * 4096, "what they hold stays"
    memory.destroy(handles[2:5])
    assert resident(memory) == 5 * 4096
    memory.map(base + 8 * 4096, [*memory.create(3), *handles[8:]])
    assert resident(memory) == 10 * 4096


def test_reserving_commits_nothing(memory: HostMemory) -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident_pages()
    for _ in range(8):
        memory.reserve(1 << 40)
    assert resident_pages() - before < 256
    assert resident(memory) == 0


def test_consecutive_pages_need_one_kernel_mapping(memory: HostMemory) -> None:
    base = memory.reserve(64 * 4096)
    handles = memory.create(64)
    memory.map(base, handles[:20])
    memory.map(base + 20 * 4096, handles[20:])
    assert memory._kernel_mappings == 1
    memory.unmap(base + 4096, 1)
    assert memory._kernel_mappings == 3


def test_pages_in_any_order_need_one_kernel_mapping(memory: HostMemory) -> None:
    slabs = [memory.reserve(8 * 4096) for _ in range(4)]
    for i in range(8):
        for slab in slabs:
            memory.map(slab + i * 4096, memory.create(1))
    assert memory._kernel_mappings == 4


def test_a_page_that_moved_keeps_its_place_and_its_bytes(memory: HostMemory) -> None:
    base = memory.reserve(4 * 4096)
    first, second = memory.create(2)
    memory.map(base, [first])
    ctypes.memset(base, 7, 4096)
    memory.unmap(base, 1)
    memory.map(base + 4096, [first])
    memory.map(base, [second])
    ctypes.memset(base, 8, 4096)
    assert ctypes.string_at(base + 4096, 4096) == bytes([7]) * 4096


def test_close_leaves_no_descriptor_and_no_mapping() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    memory = HostMemory(4096)
    base = memory.reserve(1 << 30)
    memory.map(base, memory.create(3))
    memory.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert "batchrun-kv" not in Path("/proc/self/maps").read_text()


def test_mapping_beyond_what_the_system_grants_changes_nothing() -> None:
    # The file size limit is the one shortage of memory that a process can have alone. The pages
    # that are there cut the range in several runs, of which the last fails.
    done = run_python("""
import os, resource
from batchrun.allocator.host import HostMemory
from batchrun.allocator.vmm import OutOfPages
memory = HostMemory(4096)
base = memory.reserve(16 * 4096)
for i in range(0, 10, 2):
    memory.map(base + i * 4096, memory.create(1))
    memory.unmap(base + i * 4096, 1)
there = list(range(5))
more = memory.create(8)
resource.setrlimit(resource.RLIMIT_FSIZE, (12 * 4096, 12 * 4096))
try:
    memory.map(base, [there[0], more[0], there[1], *more[1:]])
except OutOfPages as error:
    print(error)
print(os.fstat(memory._fd).st_blocks * 512 // 4096)
print([memory.counts[page] for page in [*there, *more]])
""")
    message, committed, mapped = done.stdout.splitlines()
    assert message.startswith("cannot commit 8 pages of 4096 bytes: File too large (5 pages are")
    assert "ulimit -f" in message
    assert committed == "5"
    assert mapped == str([0] * 13)
    assert done.returncode == 0, done.stderr


def test_too_many_mappings_is_out_of_pages_and_says_what_to_do() -> None:
    memory = HostMemory(4096, max_mappings=7)
    base, elsewhere = memory.reserve(16 * 4096), memory.reserve(16 * 4096)
    handles = memory.create(16)
    memory.map(elsewhere, handles)
    memory.unmap(elsewhere, 16)
    memory.free(elsewhere, 16 * 4096)
    memory.map(base, handles[::2][:5])
    with pytest.raises(OutOfPages, match=r"6 of 7 .*`sysctl -w vm.max_map_count=\d+"):
        memory.map(base + 6 * 4096, handles[1::2])
    memory.unmap(base, 5)
    memory.map(base, handles)
    memory.close()


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("limit", ["", ", max_mappings=10**9"], ids=["ours", "the kernel's"])
def test_the_mappings_a_process_really_has_run_out_as_out_of_pages(limit: str, planes: int) -> None:
    done = run_python(f"""
from batchrun.allocator.host import HostMemory
from batchrun.allocator.vmm import OutOfPages
memory = HostMemory(4096, planes={planes}{limit})
base = memory.reserve(1 << 30)
(page,) = memory.create(1)
before = open("/proc/self/maps").read().count(" rw-s ")
addresses = range(base, base + (1 << 30), 8192)
try:
    for count, address in enumerate(addresses):
        memory.map(address, [page])
except OutOfPages as error:
    print(error)
print(count)
if {planes} > 1:  # no plane of the page that was refused is mapped
    memory._libc.munmap(base, 8192 * 1000)  # room for reading the list of mappings
    left = open("/proc/self/maps").read().count(" rw-s ") - before
    assert left == {planes} * count - 1000, (left, count)
elif not {limit!r}:
    for address in addresses[:count]:
        memory.unmap(address, 1)
    memory.free(base, 1 << 30)
memory.close()
""")
    assert done.returncode == 0, done.stderr
    message, count = done.stdout.splitlines()
    assert "vm.max_map_count" in message
    allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert allowed / 4 < int(count) * planes <= allowed / 2


def test_a_run_that_the_kernel_cuts_short_is_not_left_half_mapped() -> None:
    done = run_python("""
from batchrun.allocator.host import HostMemory
from batchrun.allocator.vmm import OutOfPages

def fill(memory, addresses):
    for count, address in enumerate(addresses):
        try:
            memory.map(address, [0])
        except OutOfPages:
            return count

def reserve():
    memory = HostMemory(4096, max_mappings=10**9)
    base = memory.reserve(1 << 30)
    memory.map(base, memory.create(17))
    memory.unmap(base, 17)
    return memory, base

memory, base = reserve()
most = fill(memory, range(base, base + (1 << 30), 8192))
memory.close()
memory, base = reserve()
fill(memory, range(base, base + (most - 3) * 8192, 8192))
run = base + (1 << 30) - 8 * 4096
before = open("/proc/self/maps").read().count(" rw-s ")
try:
    memory.map(run, list(range(16, 0, -2)))
except OutOfPages:
    print("refused")
memory._libc.munmap(base, 8192 * 1000)  # room for reading the list of mappings
print(open("/proc/self/maps").read().count(" rw-s ") - before + 1000)
print([memory.counts[page] for page in range(2, 17, 2)])
memory.close()
""")
    assert done.stdout == f"refused\n0\n{[0] * 8}\n", done.stderr


def test_memory_that_the_kernel_does_not_take_back_stays_with_its_place() -> None:
    done = run_python("""
import errno
from batchrun.allocator.host import HostMemory
from tests.faults.seccomp import forbid
memory = HostMemory(4096, guard=False)
base = memory.reserve(8 * 4096)
pages = memory.create(2)
memory.map(base, pages)
forbid("fallocate", errno.ENOMEM)  # from now on nothing is punched out
memory.unmap(base, 2)
memory.destroy(pages)
memory.free(base, 8 * 4096)
memory.close()
print("closed")
""")
    assert done.stdout == "closed\n", done.stderr
