"""What Linux says of the machine and of this process."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

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


def peak_rss() -> int:
    """Bytes of memory that this process had at most; `getrusage` would count its parent's too."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


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
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")
