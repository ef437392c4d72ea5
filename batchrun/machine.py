"""What Linux says of the machine and of this process."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
from pathlib import Path

from batchrun import cgroups

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux calls them; the last one on Arm


def cpu_features() -> str:
    """The processor's features as Linux lists them, in one line; empty where it lists none."""
    return _of_cpu("flags", "Features")


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16."""
    return not _BFLOAT16.isdisjoint(cpu_features().split())


def description() -> str:
    """The processor's name and its cores, for benchmarks."""
    return f"{_of_cpu('model name') or platform.machine()}, {os.cpu_count()} cores"


def cores(root: Path = cgroups.ROOT) -> int:
    """Processors that this process may keep busy: by its affinity, and its groups' quota."""
    allowed = len(os.sched_getaffinity(0))
    quota = cgroups.cpu_quota(root)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def use_cores(root: Path = cgroups.ROOT) -> None:
    """Have libraries start no more threads than a quota has time for; before they are loaded.

    More than that and all of them stand still together for the rest of each period.
    """
    if cores(root) < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores(root)))


def available_memory(root: Path = cgroups.ROOT) -> int:
    """Bytes that can still be had without swapping: of the machine, or of this control group."""
    free = _line(root / "proc/meminfo", "MemAvailable")
    if free:
        available = int(free.split()[0]) * 1024
    else:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroups.memory_limit(root)
    return available if limit is None else min(available, limit.free)


def peak_rss() -> int:
    """Bytes of memory that this process had at most."""
    peak = _line(Path("/proc/self/status"), "VmHWM")
    if peak:
        return int(peak.split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # its parent's too


def return_freed_memory() -> None:
    """Have the C library give large blocks back to the kernel when they are freed."""
    _tune_heap(128 << 10, 128 << 10)


def keep_freed_memory() -> None:
    """Have it keep them, but for those that are free now.

    What each step allocates and frees would otherwise be made and zeroed by the kernel page by
    page, every time (benchmarks/README.md).
    """
    _tune_heap(128 << 20, 256 << 20)


def _tune_heap(mapped: int, trimmed: int) -> None:
    """Set from which size on blocks get a mapping, and free memory at the heap's end goes back."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, mapped)
        libc.mallopt(_M_TRIM_THRESHOLD, trimmed)


def _of_cpu(*names: str) -> str:
    return _line(Path("/proc/cpuinfo"), *names)


def _line(path: Path, *names: str) -> str:
    """What the first line that begins with one of the names says behind its colon, or nothing.

    Nothing, too, where there is no such file: a container may come without /proc.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")
