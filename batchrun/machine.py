"""What Linux says of the machine and of this process."""

from __future__ import annotations

import os
import platform
from pathlib import Path

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


def _of_cpu(*names: str) -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")
