"""What only `CudaMemory` promises, over the fake driver; run by test_twins.py, in its process."""

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_twins import PAGE, Twin, open_memory, opened, run_python

from batchrun.allocator.cuda import CudaMemory
from batchrun.allocator.vmm import AllocatorError, OutOfPages
from tests.fake_cuda.control import FAKE, INVALID_CONTEXT, OUT_OF_MEMORY, calls, fail


def state(memory: CudaMemory) -> tuple[object, ...]:
    """What the driver holds, and what the memory believes it does."""
    pages = (dict(memory.counts), dict(memory.all_mapped()), sorted(memory.reservations))
    return FAKE.fake_committed(), FAKE.fake_mappings(), FAKE.fake_reservations(), *pages


@pytest.fixture
def memory() -> Iterator[CudaMemory]:
    with opened(open_memory()) as memory:
        yield memory
    assert (FAKE.fake_committed(), FAKE.fake_mappings(), FAKE.fake_reservations()) == (0, 0, 0)
    assert FAKE.fake_contexts() == 0


def test_a_range_is_granted_access_by_one_call(memory: CudaMemory) -> None:
    base, before = memory.reserve(64 * PAGE), calls("cuMemSetAccess")
    memory.map(base, memory.create(48))
    assert calls("cuMemSetAccess") == before + 1
    assert FAKE.fake_mappings() == 48


def test_pages_are_of_the_minimum_granularity_or_multiples(memory: CudaMemory) -> None:
    assert memory.granularity == 4096, "the fake driver recommends four times that"
    with opened(CudaMemory(page_size=3 * 4096)) as larger:
        larger.create(2)
        assert FAKE.fake_committed() == 6 * 4096
    for size in (0, -4096, 4097):
        with pytest.raises(AllocatorError, match=f"page size {size} .*the driver's 4096"):
            CudaMemory(page_size=size)


def test_memory_info_sees_our_pages_and_other_processes(memory: CudaMemory) -> None:
    free, total = memory.memory_info()
    assert free == total == 4 << 30
    memory.create(5)
    assert memory.memory_info() == (total - 5 * PAGE, total)
    FAKE.fake_others_take(1 << 30)
    assert memory.memory_info() == (total - 5 * PAGE - (1 << 30), total)
    FAKE.fake_others_take(0)


def test_create_beyond_the_device_takes_nothing_and_says_what_is_free(memory: CudaMemory) -> None:
    memory.create(2)
    FAKE.fake_others_take((4 << 30) - 7 * PAGE)
    before = state(memory)
    wanted = (
        r"^cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY \(2\): out of memory; 6 pages of 4096 "
        rf"bytes are needed, {5 * PAGE} of {4 << 30} bytes are free on the device and 2 pages are"
    )
    with pytest.raises(OutOfPages, match=wanted):
        memory.create(6)
    assert state(memory) == before
    assert len(memory.create(5)) == 5
    FAKE.fake_others_take(0)


@pytest.mark.parametrize(("nth", "planes"), [(1, 1), (3, 1), (5, 1), (1, 3), (6, 3), (13, 3)])
@pytest.mark.parametrize("code", [OUT_OF_MEMORY, INVALID_CONTEXT])
@pytest.mark.parametrize("function", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap"])
def test_a_driver_error_in_the_middle_is_undone(
    function: str, nth: int, planes: int, code: int
) -> None:
    with opened(open_memory(planes=planes)) as memory:
        undo(memory, function, nth, code)
    assert (FAKE.fake_committed(), FAKE.fake_mappings(), FAKE.fake_reservations()) == (0, 0, 0)


def undo(memory: CudaMemory, function: str, nth: int, code: int) -> None:
    twin = Twin(memory)
    base = memory.reserve(16 * PAGE)
    held, more = memory.create(5), memory.create(5)
    memory.map(base, held)
    twin.write(base, b"\7" * 5 * PAGE)
    act = {
        "cuMemCreate": lambda: memory.create(5),
        "cuMemUnmap": lambda: memory.unmap(base, 5),
    }.get(function, lambda: memory.map(base + 5 * PAGE, more))
    before = state(memory)
    fail(function, -(-nth // 5) if function == "cuMemSetAccess" else nth, code)
    with pytest.raises(AllocatorError, match=rf"^{function} failed with .* \({code}\)") as raised:
        act()
    assert isinstance(raised.value, OutOfPages) == (code == OUT_OF_MEMORY)
    assert state(memory) == before
    assert twin.read(base, 5 * PAGE) == b"\7" * 5 * PAGE
    act()


def test_a_reservation_that_fails_is_told(memory: CudaMemory) -> None:
    fail("cuMemAddressReserve", 1, OUT_OF_MEMORY)
    with pytest.raises(OutOfPages, match=r"cuMemAddressReserve failed with .* \(2\)"):
        memory.reserve(PAGE)
    assert memory.reservations == {}


def test_handles_are_never_used_again(memory: CudaMemory) -> None:
    stale = memory.create(3)
    memory.destroy(stale)
    assert not set(stale) & set(memory.create(3))
    with pytest.raises(AllocatorError, match="does not exist"):
        memory.map(memory.reserve(PAGE), stale[:1])


@pytest.mark.parametrize("prepare", ["", "driver.call('cuCtxSetCurrent', other)"])
def test_any_thread_may_call_whatever_context_it_has(prepare: str) -> None:
    done = run_python(
        f"""
import threading
from batchrun.allocator.cuda import CudaMemory
memory = CudaMemory(0)
driver, other = memory.driver, memory.driver.call("cuDevicePrimaryCtxRetain", 1)
def work():
    {prepare or "pass"}
    base = memory.reserve(4096)
    memory.map(base, memory.create(1))
    print(memory.memory_info()[0] - (4 << 30))
    memory.unmap(base, 1)
    memory.destroy([0])
    memory.free(base, 4096)
    memory.close()
thread = threading.Thread(target=work)
thread.start()
thread.join()
""",
        FAKE_CUDA_DEVICES="2",
    )
    assert done.stdout == "-4096\n", done.stderr
    assert not done.stderr


def test_close_tries_every_call_before_it_raises() -> None:
    done = run_python("""
import ctypes
from batchrun.allocator.cuda import CudaMemory
from batchrun.allocator.vmm import AllocatorError
fake = ctypes.CDLL("libcuda.so.1")
memory = CudaMemory()
memory.map(memory.reserve(4 * 4096), memory.create(3))
memory.reserve(4096)
fake.fake_fail(b"cuMemUnmap", ctypes.c_long(2), 201)
try:
    memory.close()
except AllocatorError as error:
    print(error)
memory.close()
print(fake.fake_mappings(), fake.fake_reservations(), fake.fake_contexts())
""")
    message, left = done.stdout.splitlines()
    assert message.startswith("cuMemUnmap failed with CUDA_ERROR_INVALID_CONTEXT (201)")
    assert left == "1 1 0", "the mapping that failed, and the reservation around it"


UNUSABLE = {
    "no device": (
        {"FAKE_CUDA_DEVICES": "0"},
        r"cuInit failed with CUDA_ERROR_NO_DEVICE \(100\): no CUDA-capable device is detected; "
        "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    ),
    "no such device": (
        {"FAKE_CUDA_DEVICES": "3"},
        r"cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE \(101\): invalid device ordinal; "
        "`nvidia-smi -L` lists the devices",
    ),
    "another driver than its kernel module": (
        {"FAKE_CUDA_INIT": "803"},
        r"cuInit failed with CUDA_ERROR_SYSTEM_DRIVER_MISMATCH \(803\): system has unsupported "
        "display driver / cuda driver combination; reboot, or reload the NVIDIA kernel module",
    ),
    "an old driver": (
        {
            "FAKE_CUDA_WITHOUT": "cuMemGetAllocationGranularity",
            "FAKE_CUDA_VERSION": "10010",
            "FAKE_CUDA_DEVICES": "4",
        },
        r"the NVIDIA driver \(CUDA version 10010\) is too old: Function "
        '"cuMemGetAllocationGranularity" not found; update it',
    ),
    "an old device": (
        {"FAKE_CUDA_VMM": "0", "FAKE_CUDA_DEVICES": "4"},
        "CUDA device 3 has no virtual memory management",
    ),
}


@pytest.mark.parametrize("machine", UNUSABLE)
def test_a_machine_that_cannot_is_told_in_one_message(machine: str) -> None:
    environment, message = UNUSABLE[machine]
    done = run_python(
        "from batchrun.allocator.cuda import CudaMemory; CudaMemory(3)", **environment
    )
    assert re.search(
        rf"^batchrun.allocator.vmm.AllocatorError: {message}$", done.stderr, re.MULTILINE
    ), done.stderr


def test_a_missing_driver_or_package_is_told_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("no library")
    code = "from batchrun.allocator.cuda import CudaMemory; CudaMemory()"
    done = run_python(code, LD_LIBRARY_PATH=str(tmp_path))
    last = done.stderr.splitlines()[-1]
    assert last == (
        "batchrun.allocator.vmm.AllocatorError: no NVIDIA driver: Failed to dlopen libcuda.so.1; "
        "install one, or compute on the CPU"
    )
    done = run_python(f"import sys; sys.modules['cuda.bindings'] = None; {code}")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "batchrun.allocator.vmm.AllocatorError: CUDA needs the Python package cuda-bind"
    )
    assert last.endswith("run `pip install cuda-bindings`")


# What the driver documents, asked of it directly: three pages mapped at base with access, one
# mapped at base + 4 pages without.
BROKEN: dict[str, Callable[[int, Any, int], tuple[Any, ...]]] = {
    "unmap a part of a mapping": lambda base, a, p: ("cuMemUnmap", base, p // 2),
    "unmap what is not mapped": lambda base, a, p: ("cuMemUnmap", base + 3 * p, p),
    "unmap across a hole": lambda base, a, p: ("cuMemUnmap", base, 5 * p),
    "map over a mapping": lambda base, a, p: ("cuMemMap", base, p, 0, a, 0),
    "map outside": lambda base, a, p: ("cuMemMap", base + 8 * p, p, 0, a, 0),
    "map more than there is": lambda base, a, p: ("cuMemMap", base + 6 * p, 2 * p, 0, a, 0),
    "map off the granularity": lambda base, a, p: ("cuMemMap", base + 3 * p + 8, p, 0, a, 0),
    "free around mappings": lambda base, a, p: ("cuMemAddressFree", base, 8 * p),
    "free a part": lambda base, a, p: ("cuMemAddressFree", base + 5 * p, p),
    "release what is not": lambda base, a, p: ("cuMemRelease", 10**6),
    "reserve off the granularity": lambda base, a, p: ("cuMemAddressReserve", 8, 0, 0, 0),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_the_fake_driver_keeps_the_rules(memory: CudaMemory, rule: str) -> None:
    base, driver = memory.reserve(8 * PAGE), memory.driver
    memory.map(base, memory.create(3))
    (page,) = memory.create(1)
    allocation = memory._allocations[page][0]
    driver.call("cuMemMap", base + 4 * PAGE, PAGE, 0, allocation, 0)
    before = state(memory)
    with pytest.raises(AllocatorError, match=r"CUDA_ERROR_INVALID_VALUE \(1\)"):
        driver.call(*BROKEN[rule](base, allocation, PAGE))
    assert state(memory) == before
    driver.call("cuMemUnmap", base + 4 * PAGE, PAGE)


def test_the_fake_driver_frees_what_is_released_and_unmapped(memory: CudaMemory) -> None:
    base, driver = memory.reserve(2 * PAGE), memory.driver
    allocation = driver.call("cuMemCreate", PAGE, memory._properties, 0)
    driver.call("cuMemMap", base, PAGE, 0, allocation, 0)
    driver.call("cuMemSetAccess", base, PAGE, [memory._access], 1)
    assert ctypes.string_at(base, PAGE) == b"\xff" * PAGE, "undefined contents are never zero"
    driver.call("cuMemRelease", allocation)
    assert ctypes.string_at(base, 1) == b"\xff"
    assert FAKE.fake_committed() == PAGE
    with pytest.raises(AllocatorError, match="INVALID_VALUE"):
        driver.call("cuMemMap", base + PAGE, PAGE, 0, allocation, 0)
    driver.call("cuMemUnmap", base, PAGE)
    assert FAKE.fake_committed() == 0


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("driver.cuMemAddressReserve(4096, 0, 0, 0)", "CUDA_ERROR_NOT_INITIALIZED"),
        ("driver.cuInit(0); driver.cuMemAddressReserve(4096, 0, 0, 0)", "INVALID_CONTEXT"),
        ("enter(0); driver.cuDevicePrimaryCtxRelease(0); driver.cuMemGetInfo()", "IS_DESTROYED"),
        ("enter(1); driver.cuMemCreate(4096, memory._properties, 0)", "INVALID_CONTEXT"),
        (
            "enter(0); a = driver.cuMemCreate(4096, memory._properties, 0)[1]; "
            "base = memory.reserve(4096); enter(1); driver.cuMemMap(base, 4096, 0, a, 0)",
            "INVALID_CONTEXT",
        ),
    ],
)
def test_the_fake_driver_refuses_calls_without_the_right_context(code: str, error: str) -> None:
    *before, last = code.split("; ")
    done = run_python(
        f"""
from cuda.bindings import driver
from batchrun.allocator.cuda import CudaMemory
def enter(device):
    global memory
    memory = CudaMemory(0)
    driver.cuDevicePrimaryCtxRelease(0)
    driver.cuCtxSetCurrent(driver.cuDevicePrimaryCtxRetain(device)[1])
{"; ".join(before) or "pass"}
print({last}[0].name)
""",
        FAKE_CUDA_DEVICES="2",
    )
    assert error in done.stdout, done.stderr


def test_access_is_granted_before_use() -> None:
    done = run_python("""
import ctypes
from batchrun.allocator.cuda import CudaMemory
memory = CudaMemory()
base = memory.reserve(4096)
allocation = memory.driver.call("cuMemCreate", 4096, memory._properties, 0)
memory.driver.call("cuMemMap", base, 4096, 0, allocation, 0)
print("about to touch", flush=True)
ctypes.string_at(base, 1)
""")
    assert (done.stdout, done.returncode) == ("about to touch\n", -11), done.stderr
