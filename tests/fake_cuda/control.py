"""What the fake driver of this process was asked, and what it is to do next."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

FAKE = ctypes.CDLL("libcuda.so.1")
for _name in ("calls", "fail", "nanoseconds", "mappings", "reservations"):
    getattr(FAKE, f"fake_{_name}").restype = ctypes.c_long
FAKE.fake_calls.argtypes = [ctypes.c_char_p]
FAKE.fake_committed.restype = ctypes.c_size_t
FAKE.fake_others_take.argtypes = [ctypes.c_size_t]

MAP, SET_ACCESS, UNMAP, CREATE, RELEASE = (
    f"cuMem{name}" for name in ("Map", "SetAccess", "Unmap", "Create", "Release")
)
FREE, CONTEXT = "cuMemGetInfo_v2", "cuCtxGetCurrent"
NAMES = (MAP, SET_ACCESS, UNMAP, CREATE, RELEASE, FREE, CONTEXT)
OUT_OF_MEMORY, INVALID_CONTEXT = 2, 201


def fail(function: str, nth: int, code: int) -> int:
    """Let the n-th next call of a function fail; 0 takes that back.

    Returns:
        Which next call was to fail until now; 0 where none was, or it has.
    """
    return int(FAKE.fake_fail(function.encode(), ctypes.c_long(nth), code))


def calls(function: str | None = None) -> int:
    """Calls of a function so far, or of all functions."""
    return int(FAKE.fake_calls(None if function is None else function.encode()))


def nanoseconds() -> int:
    """What all calls so far would have taken on a GPU, about."""
    return int(FAKE.fake_nanoseconds())


@dataclass
class Asked:
    """Calls by name, without those of none, and what they would have taken."""

    calls: Counter[str] = field(default_factory=Counter)
    nanoseconds: int = 0


@contextmanager
def asked() -> Iterator[Asked]:
    """What the driver is asked in a block, known when that ends."""
    before = {name: calls(name) for name in NAMES}, calls(), nanoseconds()
    made = Asked()
    yield made
    made.calls = Counter({n: calls(n) - b for n, b in before[0].items() if calls(n) > b})
    others = calls() - before[1] - made.calls.total()
    made.calls += Counter(others=others)
    made.nanoseconds = nanoseconds() - before[2]
