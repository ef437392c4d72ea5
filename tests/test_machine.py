"""What the C library does with freed memory, and what becomes of threads without any."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchrun import machine

SCRIPT = """
import resource
from batchrun import machine

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        b"1" * (32 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

machine.return_freed_memory()
returned = faults()
machine.keep_freed_memory()
faults()
kept, held = faults(), resident()
machine.return_freed_memory()
print(returned, kept, held, resident())
"""


def test_freed_memory_goes_back_or_stays_as_told() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    returned, kept, held, after = map(int, done.stdout.split())
    assert kept * 4 < returned  # pages that the kernel made anew
    assert after < held - (16 << 20) // 4096


LIMBO = """
import os, threading
from batchrun import machine
def end(what):
    os.write(1, what.encode())
    os._exit(7)
machine.end_with_lost_threads(end)
machine._BEGIN_S = 1
lost = threading.Thread()
threading._limbo[lost] = lost
threading.Event().wait()
"""


def test_a_thread_that_never_begins_ends_the_run_without_a_hook_too() -> None:
    """As with filelock on Python 3.12, whose audit of each hook needs memory itself."""
    done = subprocess.run(
        [sys.executable, "-c", LIMBO], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (7, "a thread did not start within 1 s")


def test_pages_of_a_file_are_dropped_unless_they_were_written_to(tmp_path: Path) -> None:
    page = resource.getpagesize()
    path = tmp_path / os.fsdecode("weights\r\x1c\u2028 (deleted)\n".encode() + b"\xff")
    path.write_bytes(bytes(range(1, 65)) * page)
    with path.open("rb") as file:
        read, written = (mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) for _ in range(2))
    own = mmap.mmap(-1, 64 * page)
    own.write(bytes(range(1, 65)) * page)
    written[3 * page] = 99
    expected = [memory[:] for memory in (read, written, own)]
    files = machine.MappedFiles()
    for memory, want in zip((read, written, own), expected, strict=True):
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        before = resident()
        files.forget(address + 1, 64 * page - 2)
        assert (before - resident() >= 50 * page) == (memory is read)
        assert memory[:] == want


def resident() -> int:
    found = machine.proc_bytes(Path("/proc/self/status"), "VmRSS")
    assert found is not None
    return found


def cached_pages(path: Path) -> int:
    """Pages of a file that are in memory: mincore(2)."""
    size = path.stat().st_size
    with path.open("rb+") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        begin = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(size), pages
        )
        del begin
        assert not failed, os.strerror(ctypes.get_errno())
        return sum(page & 1 for page in pages)


def test_weights_are_read_ahead(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(path) > 128:
        pytest.skip("this file system keeps files in memory")
    machine.read_ahead(tmp_path)
    until = time.monotonic() + 60
    while cached_pages(path) < 256 and time.monotonic() < until:
        os.sched_yield()
    assert cached_pages(path) == 256


def test_a_model_that_is_not_there_is_not_read_ahead(tmp_path: Path) -> None:
    machine.read_ahead(tmp_path / "nowhere")
