"""Every implementation of `VirtualMemory`, with what a test needs to look at its memory.

One process tests one of them, the twin that BATCHRUN_TEST_MEMORY names: `host`; `fake-cuda`, which
is `CudaMemory` over tests/fake_cuda; or `cuda`, which is `CudaMemory` on a GPU. test_twins.py runs
the other tests of this folder again in processes of the other twins.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from batchrun.allocator.cuda import CudaMemory
from batchrun.allocator.host import HostMemory
from batchrun.allocator.vmm import VirtualMemory

ROOT = Path(__file__).parents[2]
TWIN = os.environ.get("BATCHRUN_TEST_MEMORY", "host")
DEVICE = "cuda" if TWIN == "cuda" else "cpu"
PAGE = 2 << 20 if TWIN == "cuda" else 4096
SCALE = PAGE // 4096
"""What tests multiply the bytes of a token by, so that a page holds as many of them anywhere."""


def open_memory(page_size: int = PAGE, planes: int = 1) -> HostMemory | CudaMemory:
    """A memory of this process's twin, with pages of `page_size` bytes or the least above it."""
    if TWIN in {"host", "unguarded-host"}:
        return HostMemory(page_size, planes=planes, guard=TWIN == "host")
    if TWIN == "cuda":
        _keep_context()
    return CudaMemory(page_size=max(page_size, PAGE), planes=planes)


@cache
def _keep_context() -> CudaMemory:
    """Held for the whole process: a context that nobody holds is made anew, which takes long."""
    return CudaMemory()


@dataclass(frozen=True)
class Twin:
    """A memory and how to touch it: a copy by the device's driver, or the processor itself.

    What is written differs from plane to plane, and is read back from all of them.
    """

    memory: HostMemory | CudaMemory

    def read(self, address: int, size: int) -> bytes:
        parts = [self.read_plane(at, size) for at in self._planes(address)]
        seen = [bytes(byte ^ plane for byte in part) for plane, part in enumerate(parts)]
        assert seen == seen[:1] * len(seen), "planes disagree"
        return seen[0]

    def write(self, address: int, data: bytes) -> None:
        for plane, at in enumerate(self._planes(address)):
            self.write_plane(at, bytes(byte ^ plane for byte in data) if plane else data)

    def _planes(self, address: int) -> range:
        if self.memory.planes == 1:
            return range(address, address + 1)
        size = self.memory.reservation_of(address)[1].size
        return range(address, address + size * self.memory.planes, size)

    def read_plane(self, address: int, size: int) -> bytes:
        if TWIN != "cuda":
            return ctypes.string_at(address, size)
        data = bytearray(size)
        self.memory.driver.call("cuMemcpyDtoH", data, address, size)
        return bytes(data)

    def write_plane(self, address: int, data: bytes) -> None:
        if TWIN != "cuda":
            ctypes.memmove(address, data, len(data))
        else:
            self.memory.driver.call("cuMemcpyHtoD", address, data, len(data))


def open_twin(page_size: int = max(PAGE, 64 << 10), planes: int = 1) -> Twin:
    return Twin(open_memory(page_size, planes))


def examples(count: int) -> int:
    """Examples of a state machine: fewer where each call is a system's."""
    share = {"host": 1, "unguarded-host": 2, "fake-cuda": 2, "cuda": 8}[TWIN]
    return max(1, count // share)


def faulted(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a process ended by touching memory that it has not."""
    if TWIN == "cuda":
        return done.returncode == 1 and "failed with CUDA_ERROR_" in done.stderr.splitlines()[-1]
    return done.returncode == -11


class Wrapped:
    """A memory of which a subclass replaces a method."""

    def __init__(self, memory: VirtualMemory) -> None:
        self.memory = memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)


@contextmanager
def opened(memory: Any) -> Iterator[Any]:
    try:
        yield memory
    finally:
        memory.close()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, where a fault or a resource limit kills no test."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
