"""What limits this process, and how to lift it: for `batchrun doctor`."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from batchrun import cgroups, machine
from batchrun.allocator.host import HostMemory
from batchrun.allocator.system import SHARED_MEMORY, max_map_count
from batchrun.allocator.vmm import AllocatorError
from batchrun.report.text import size

_ADDRESSES = 48 << 30  # bytes that the KV memory of the default model reserves on a CPU, about
_PAGE = 256 << 10
_FILES = 64  # descriptors that a run has open at once, about
_MAP_COUNT = 65530  # Linux's default, for which memory's pages are laid out

# Name of the limit, what it bounds, and what to type where that is in bytes.
_LIMITS = (
    ("RLIMIT_AS", "addresses", "ulimit -v unlimited"),
    ("RLIMIT_DATA", "private memory", "ulimit -d unlimited"),
    ("RLIMIT_FSIZE", "size of a file, and of KV memory", "ulimit -f unlimited"),
    ("RLIMIT_NOFILE", "open files", None),
    ("RLIMIT_NPROC", "processes and threads", None),
)


def limits(root: Path = cgroups.ROOT) -> dict[str, str]:
    """What bounds this process beside the machine itself, and what would lift it."""
    found = {}
    group = cgroups.memory_limit(root)
    if group is not None:
        found["memory"] = (
            f"{size(group.limit)}, of which {size(max(0, group.free))} are free: "
            f"{group.folder / group.file}"
        )
    quota = cgroups.cpu_quota(root)
    if quota is not None:
        found["processors"] = f"{quota:g}, by a control group's quota"
    for name, what, cure in _LIMITS:
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY:
            found[what] = f"{limit:,}" if cure is None else f"{size(limit)} ({cure})"
    found["mappings"] = f"{max_map_count():,} (vm.max_map_count)"
    if cgroups.text_of(root / "proc/sys/vm/overcommit_memory").strip() == "2":
        found["overcommit"] = "none (sysctl -w vm.overcommit_memory=0)"
    return found


def lacking() -> Iterator[str]:
    """What would keep a job from running, each with what to do: each is tried for real."""
    threads = machine.cores() + machine.OWN_THREADS
    if (found := machine.startable_threads(threads)) < threads:
        yield f"only {found} of {threads} threads can be started; {machine.THREADS_HINT}"
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < _FILES:
        yield f"only {files} files can be open at once; ulimit -n 4096"
    if max_map_count() < _MAP_COUNT:
        yield (
            f"a process may have {max_map_count():,} memory mappings only; "
            f"sysctl -w vm.max_map_count={_MAP_COUNT}"
        )
    if (free := machine.available_memory()) < _ADDRESSES >> 6:
        yield f"{size(max(0, free))} of memory are free; free some, or lift the group's limit"
    try:
        with closing(HostMemory(_PAGE, guard=False)) as memory:
            address = memory.reserve(_ADDRESSES)
            memory.map(address, memory.create(1))
    except (AllocatorError, OSError) as error:
        yield f"KV memory on a CPU: {error}"


def fallbacks() -> dict[str, str]:
    """What works in another way than usual, because of what is forbidden here."""
    try:
        os.close(os.memfd_create("batchrun-doctor"))
    except OSError as error:
        free = os.statvfs(SHARED_MEMORY) if os.path.exists(SHARED_MEMORY) else None
        room = f", {size(free.f_bavail * free.f_frsize)} of it free" if free else ""
        return {
            "memfd_create": f"{error.strerror}: KV memory is a file in {SHARED_MEMORY}{room} "
            "(docker run --shm-size, or allow memfd_create in the seccomp profile)"
        }
    return {}
