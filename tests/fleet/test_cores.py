"""Processors are divided along cores and NUMA nodes, and workers stay on theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import MachineError
from batchrun.fleet import cores
from batchrun.fleet.cores import Share, shares
from batchrun.fleet.devices import devices_of


def machine(root: Path, nodes: dict[int, str], siblings: dict[int, str]) -> Path:
    """What Linux says of a machine: the processors of each node, those of each one's core."""
    for node, cpus in nodes.items():
        folder = root / f"node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    for cpu, cpus in siblings.items():
        folder = root / f"cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpus}\n")
    return root


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    """Two nodes of two cores of two threads, numbered as Linux does: second threads last."""
    siblings = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    return machine(tmp_path, {0: "0-1,4-5", 1: "2-3,6-7"}, siblings)


def test_workers_share_no_core_and_no_node_where_that_is_possible(two_nodes: Path) -> None:
    assert shares(1, range(8), two_nodes) == [Share((0, 4, 1, 5, 2, 6, 3, 7), None)]
    assert shares(2, range(8), two_nodes) == [Share((0, 4, 1, 5), 0), Share((2, 6, 3, 7), 1)]
    four = [Share((0, 4), 0), Share((1, 5), 0), Share((2, 6), 1), Share((3, 7), 1)]
    assert shares(4, range(8), two_nodes) == four
    assert shares(3, range(8), two_nodes)[2] == Share((6, 3, 7), 1)
    assert shares(2, {1, 3, 7}, two_nodes) == [Share((1,), 0), Share((3, 7), 1)]


def test_where_linux_says_nothing_they_are_neighbours(tmp_path: Path) -> None:
    assert shares(2, range(4), tmp_path) == [Share((0, 1), None), Share((2, 3), None)]


@given(allowed=st.sets(st.integers(0, 200), min_size=1), data=st.data())
def test_each_processor_has_one_worker(allowed: set[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(allowed)))
    found = shares(count, allowed)
    assert sorted(cpu for share in found for cpu in share.cpus) == sorted(allowed)
    sizes = {len(share.cpus) for share in found}
    assert max(sizes) - min(sizes) <= 1


def test_a_worker_stays_where_it_is_put() -> None:
    cpu = min(os.sched_getaffinity(0))
    code = (
        "import os, mmap\n"
        "from batchrun.fleet.cores import pin\n"
        f"pin([{cpu}], 0)\n"
        "memory = mmap.mmap(-1, 1 << 20)\n"
        "memory.write(bytes(1 << 20))\n"
        "print(sorted(os.sched_getaffinity(0)))\n"
        "print('prefer' in open('/proc/self/numa_maps').read())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    where, preferred = done.stdout.splitlines()
    assert where == f"[{cpu}]"
    assert preferred == "True" or not _may_set_policies()


def _may_set_policies() -> bool:
    """Whether this system lets a process choose its memory's node; containers may forbid it."""
    code = (
        "import ctypes; mask = ctypes.c_ulong(1); libc = ctypes.CDLL(None)\n"
        f"number = {cores._SET_MEMPOLICY}[__import__('platform').machine()]\n"
        "raise SystemExit(libc.syscall(number, 1, ctypes.byref(mask), 65) != 0)"
    )
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_where_it_is_forbidden_nothing_happens() -> None:
    code = "from batchrun.fleet.cores import pin; pin([100_000], 5000); print('on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "on\n"


def test_more_workers_than_cores_are_refused() -> None:
    many = len(os.sched_getaffinity(0)) + 1
    with pytest.raises(MachineError, match=f"--devices cpu:{many}: this machine has"):
        devices_of(f"cpu:{many}")
    assert devices_of("cpu:1") == ["cpu"]
