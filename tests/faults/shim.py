"""The library of shim.c: built, loaded into a process of its own, and told what to do."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path


class Kind(IntEnum):
    WRITE = 1
    TRUNCATE = 2
    SYNC = 3
    CREATE = 4
    RENAME = 5
    UNLINK = 6
    MKDIR = 7
    RMDIR = 8
    NOTE = 9
    LINK = 10
    MMAP = 11
    MEMFD = 12
    FALLOCATE = 13
    THREAD = 14  # pthread_create, which clones
    LIBRARY = 15  # dlopen
    OPEN = 16
    MEMORY = 17  # of torch's tensors, and large blocks of others


class Fault(IntEnum):
    FAIL = 1  # with an error number, nothing done
    SHORT = 2  # half of it written, which the call says
    TORN = 3  # half of it written, then SIGKILL
    KILL = 4  # SIGKILL before it


@dataclass(frozen=True)
class Operation:
    """One operation that took place. `file` is the inode's number; a failed sync has an offset."""

    kind: Kind
    file: int
    offset: int
    path: str
    other: str
    data: bytes


def unsupported_reason() -> str | None:
    """Why the library can't be used here, or None."""
    return (
        None if sys.platform == "linux" and shutil.which("cc") else "needs Linux and a C compiler"
    )


def build(folder: Path) -> Path:
    """Compile the library into a folder."""
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", *warnings, "-o", library, source], check=True)
    return library


def run_preloaded(folder: Path, module: str, arguments: Sequence[str]) -> int:
    """Run a module of the tests in a process that has the library; its exit code."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "LD_PRELOAD": str(build(folder)), "OMP_NUM_THREADS": "1"},
        check=False,
    ).returncode


def loaded() -> bool:
    """Whether this process has the library."""
    return hasattr(ctypes.CDLL(None), "faults_watch")


def watch(folder: Path, record: int = -1) -> None:
    """See what happens under a folder, and write it to an open file."""
    ctypes.CDLL(None).faults_watch(str(folder).encode(), record)


def arm(fault: Fault, kinds: set[Kind], at: int, error: int = 0) -> None:
    """Let the `at`-th of these operations go wrong, counted from now over all threads."""
    mask = sum(1 << kind for kind in kinds)
    ctypes.CDLL(None).faults_arm(int(fault), mask, ctypes.c_long(at), error)


def for_good() -> None:
    """Let all of them go wrong from that one on."""
    ctypes.CDLL(None).faults_for_good()


def seen() -> int:
    """How many of these operations there were since then."""
    count = ctypes.CDLL(None).faults_seen
    count.restype = ctypes.c_long
    return int(count())


def was_hit() -> bool:
    return bool(ctypes.CDLL(None).faults_was_hit())


def note(text: str) -> None:
    """Add a line of one's own to the record."""
    ctypes.CDLL(None).faults_note(text.encode())


def read_record(path: Path) -> Iterator[Operation]:
    data = path.read_bytes()
    at = 0
    while at + 48 <= len(data):
        kind, file, offset, *lengths = struct.unpack_from("6Q", data, at)
        at += 48
        fields = []
        for size in lengths:
            fields.append(data[at : at + size])
            at += size
        yield Operation(Kind(kind), file, offset, fields[0].decode(), fields[1].decode(), fields[2])
