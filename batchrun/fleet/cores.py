"""Which processors each of several workers gets, and the memory that belongs to them."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_SYS = Path("/sys/devices/system")
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # numbers of the system call
_MPOL_PREFERRED = 1
_LONG_BITS = 8 * ctypes.sizeof(ctypes.c_long)


class Share(NamedTuple):
    """The processors of a worker, and their NUMA node; None if they belong to several."""

    cpus: tuple[int, ...]
    node: int | None


def shares(count: int, allowed: Collection[int], root: Path = _SYS) -> list[Share]:
    """Divide processors among workers, as equally as they can be.

    Each worker gets neighbours: threads of a core before other cores, cores of a node before other
    nodes.

    Args:
        count: Number of workers, at most as many as processors.
        allowed: The processors.
        root: Where Linux describes them.
    """
    nodes = _nodes(root)
    place = {cpu: (nodes.get(cpu, 0), _core(root, cpu), cpu) for cpu in allowed}
    order, found, begin = sorted(allowed, key=place.__getitem__), [], 0
    for left in range(count, 0, -1):
        end = begin + (len(order) - begin) // left
        cpus = tuple(order[begin:end])
        on = {nodes.get(cpu) for cpu in cpus}
        found.append(Share(cpus, on.pop() if len(on) == 1 else None))
        begin = end
    return found


def pin(cpus: Collection[int], node: int | None) -> None:
    """Keep this process on its processors, and its memory where they are.

    Where the system forbids either, the scheduler and the first touch of a page decide as ever.
    """
    if cpus:
        with suppress(OSError):
            os.sched_setaffinity(0, cpus)
    number = _SET_MEMPOLICY.get(platform.machine())
    if node is None or number is None:
        return
    words = node // _LONG_BITS + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // _LONG_BITS] = 1 << node % _LONG_BITS
    # Preferred, not bound: a full node must not end the worker while others have memory.
    ctypes.CDLL(None).syscall(
        ctypes.c_long(number),
        ctypes.c_long(_MPOL_PREFERRED),
        mask,
        ctypes.c_ulong(words * _LONG_BITS + 1),
    )


def _nodes(root: Path) -> dict[int, int]:
    """The node of each processor; empty where Linux does not say."""
    found = {}
    for folder in root.glob("node/node[0-9]*"):
        with suppress(OSError, ValueError):
            for cpu in _listed((folder / "cpulist").read_text()):
                found[cpu] = int(folder.name.removeprefix("node"))
    return found


def _core(root: Path, cpu: int) -> int:
    """The first processor of the same core."""
    with suppress(OSError, ValueError):
        text = (root / f"cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        return min(_listed(text), default=cpu)
    return cpu


def _listed(text: str) -> list[int]:
    """The numbers in a list such as `0-3,8`."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
