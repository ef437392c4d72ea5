"""What the driver's virtual memory calls cost, and whether they stall running kernels."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from batchrun.allocator.host import HostMemory
from batchrun.allocator.vmm import Handle, VirtualMemory
from benchmarks.gpu.bench import Bench

LENGTHS = (1, 2, 4, 16, 64, 256)  # pages in one range
SIZES = (1, 2, 4, 8, 16, 32, 64)  # of one page, as multiples of the least
CALLS = {
    "cuMemCreate": "create",
    "cuMemMap": "map",
    "cuMemSetAccess": "set_access",
    "cuMemUnmap": "unmap",
    "cuMemRelease": "release",
}
RUN = 16  # pages a call while kernels run


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Cost by range length and page size on an idle device; the same calls while kernels run."""
    memory = open_memory(bench)
    try:
        yield {"granularity": memory.granularity}
        yield {"ranges": [costs(bench, memory, length) for length in LENGTHS]}
        for name, prepare in {"create": creating, "map": mapping, "unmap": unmapping}.items():
            yield {f"under_{name}": under(bench, prepare, memory)}
    finally:
        memory.close()
    yield {"sizes": [by_size(bench, size * memory.granularity) for size in SIZES]}


def by_size(bench: Bench, page_size: int) -> dict[str, float]:
    """The same for one page of that size."""
    memory = open_memory(bench, page_size)
    try:
        return {"bytes": page_size} | costs(bench, memory, 1)
    finally:
        memory.close()


def open_memory(bench: Bench, page_size: int | None = None) -> Any:
    """The device's memory, or the host's."""
    if bench.toy:
        return HostMemory(page_size or 64 << 10)
    from batchrun.allocator.cuda import CudaMemory  # noqa: PLC0415 - only where there is a driver

    torch.zeros(1, device=bench.device)  # the context that torch makes and the memory retains
    return CudaMemory(page_size=page_size)


class TimedDriver:
    """The driver, with the seconds of every call kept by its name."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.types = driver.types
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def call(self, name: str, *args: Any) -> Any:
        """See `batchrun.allocator.cuda.Driver.call`."""
        began = time.perf_counter()
        try:
            return self._driver.call(name, *args)
        finally:
            self.seconds[name].append(time.perf_counter() - began)


def costs(bench: Bench, memory: Any, length: int) -> dict[str, float]:
    """Median microseconds of each driver call, and of each method, for ranges of `length` pages."""
    driver = getattr(memory, "driver", None)
    timed = TimedDriver(driver) if driver else None
    whole: dict[str, list[float]] = defaultdict(list)

    def clock(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        whole[name].append(time.perf_counter() - began)
        return result

    if timed:
        memory.driver = timed
    base = memory.reserve(length * memory.granularity)
    for _ in range(bench.size(5 if length > 16 else 20, 3)):
        handles = clock("create_all", lambda: memory.create(length))
        clock("map_all", lambda taken=handles: memory.map(base, taken))
        clock("unmap_all", lambda: memory.unmap(base, length))
        clock("destroy_all", lambda taken=handles: memory.destroy(taken))
    memory.free(base, length * memory.granularity)
    if timed:
        memory.driver = driver
    found = {name: microseconds(seconds) for name, seconds in whole.items()}
    if timed:
        found |= {label: microseconds(timed.seconds[name]) for name, label in CALLS.items()}
    return {"pages": length} | found


def microseconds(seconds: list[float]) -> float:
    """The median, in microseconds."""
    return round(statistics.median(seconds) * 1e6, 2)


Calls = tuple[list[Callable[[], object]], Callable[[], None]]  # to be timed, and how to undo them


def creating(memory: VirtualMemory, count: int) -> Calls:
    """Creating RUN pages, `count` times."""
    made: list[Handle] = []
    calls = [lambda: made.extend(memory.create(RUN)) for _ in range(count)]
    return list(calls), lambda: memory.destroy(made)


def mapping(memory: VirtualMemory, count: int) -> Calls:
    """Mapping the same RUN pages at `count` ranges that were never mapped before."""
    handles, size = memory.create(RUN), RUN * memory.granularity
    base = memory.reserve(count * size)
    addresses = range(base, base + count * size, size)
    calls = [lambda at=at: memory.map(at, handles) for at in addresses]

    def undo() -> None:
        memory.unmap(base, count * RUN)
        memory.free(base, count * size)
        memory.destroy(handles)

    return calls, undo


def unmapping(memory: VirtualMemory, count: int) -> Calls:
    """Unmapping `count` ranges that no kernel uses."""
    handles, size = memory.create(RUN), RUN * memory.granularity
    base = memory.reserve(count * size)
    for at in range(base, base + count * size, size):
        memory.map(at, handles)
    calls = [lambda at=at: memory.unmap(at, RUN) for at in range(base, base + count * size, size)]

    def undo() -> None:
        memory.free(base, count * size)
        memory.destroy(handles)

    return calls, undo


def under(
    bench: Bench, prepare: Callable[[VirtualMemory, int], Calls], memory: VirtualMemory
) -> dict[str, float]:
    """The calls on an idle device and while copies run, and the copies with and without them.

    Copies that take longer beside the calls were stalled by them; a call that lasts as long as the
    copies waited for them.
    """
    count = bench.size(100, 3)
    size = bench.size(1 << 30, 1 << 20)
    source = torch.zeros(size, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(bench.size(400, 3)):
            target.copy_(source)

    def beside(calls: list[Callable[[], object]]) -> tuple[list[float], float]:
        """Seconds of each call made while copies run, and of the copies."""
        if bench.toy:
            return [_seconds(call) for call in calls], _seconds(copies)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        copies()
        end.record()
        busy = [_seconds(call) for call in calls]
        torch.cuda.synchronize()
        return busy, begin.elapsed_time(end) / 1e3

    calls, undo = prepare(memory, count)
    bench.synchronise()
    idle = [_seconds(call) for call in calls]
    undo()
    _, alone = beside([])
    calls, undo = prepare(memory, count)
    bench.synchronise()
    busy, together = beside(calls)
    undo()
    return {
        "pages": RUN,
        "calls": count,
        "idle_us": microseconds(idle),
        "busy_us": microseconds(busy),
        "longest_busy_us": round(max(busy) * 1e6, 1),
        "copies_alone_s": alone,
        "copies_beside_s": together,
    }


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
