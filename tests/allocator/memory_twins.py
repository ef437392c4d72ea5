"""Every implementation of `VirtualMemory`, with what a test needs to look at its memory.

A new implementation joins the contract suite by one more entry in `TWINS`.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from allocator.host import HostMemory
from allocator.vmm import VirtualMemory

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Twin:
    name: str
    memory: VirtualMemory
    read: Callable[[int, int], bytes]  # address, size
    write: Callable[[int, bytes], None]  # address, data


def host(page_size: int = 64 << 10) -> Twin:
    return Twin(
        "host",
        HostMemory(page_size),
        ctypes.string_at,
        lambda address, data: ctypes.memmove(address, data, len(data)) and None,
    )


TWINS: dict[str, Callable[..., Twin]] = {"host": host}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, where a fault or a resource limit kills no test."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
