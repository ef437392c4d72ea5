"""What `HostMemory` asks of Linux, and why Linux may refuse."""

import ctypes
import errno
import os
from pathlib import Path

from batchrun import platforms
from batchrun.allocator.vmm import Refused

if platforms.LINUX:
    import resource

SHARED_MEMORY = "/dev/shm"  # a tmpfs, used if memfd_create is forbidden
_MAX_MAP_COUNT = 65530  # Linux's default, used if /proc is unreadable


def max_map_count() -> int:
    """How many mappings Linux allows a process."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:
        return _MAX_MAP_COUNT


def memory_file() -> int:
    """Open a file that exists only in memory and has no name.

    Raises:
        Refused: Neither memfd_create nor a file in /dev/shm is available.
        OSError: This process has no file descriptor left.
    """
    try:
        return os.memfd_create("batchrun-kv")
    except OSError as error:  # an old kernel, a seccomp profile, vm.memfd_noexec
        forbidden = error
    try:
        return os.open(SHARED_MEMORY, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if forbidden.errno in {errno.EMFILE, errno.ENFILE}:
            raise forbidden from None
        raise Refused(
            f"cannot create an in-memory file: memfd_create failed ({forbidden.strerror}), "
            f"and so did a file in {SHARED_MEMORY} ({error.strerror}); allow "
            f"memfd_create in the container's seccomp profile, or mount a tmpfs at {SHARED_MEMORY}"
        ) from error


def is_memfd(handle: int) -> bool:
    """Whether a file comes from memfd_create, so that only memory limits its size."""
    try:
        return os.readlink(f"/proc/self/fd/{handle}").startswith("/memfd:")
    except OSError:
        return True


def why_no_addresses() -> str:
    """The limit on a process's address space and how to lift it; empty if none is known."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return f"address space is limited to {limit} bytes; run `ulimit -v unlimited`"
    return ""


def refused(call: str, what: str, cure: str = "") -> Refused:
    """The error for the last call through `load_libc`."""
    return refusal(call, what, ctypes.get_errno(), cure)


def refusal(call: str, what: str, number: int, cure: str = "") -> Refused:
    """The error for a failed call; if the call itself is forbidden, it says what may forbid it."""
    if not cure and number in {errno.EPERM, errno.EACCES, errno.ENOSYS}:
        cure = f"the system forbids {call}; allow it in the container's seccomp profile"
    return Refused(f"{call} failed for {what}: {os.strerror(number)}" + (cure and f"; {cure}"))


def load_libc() -> ctypes.CDLL:
    """The C library, with the calls that Python lacks declared."""
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, offset, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
    libc.mmap.argtypes = [pointer, size, number, number, number, offset]
    libc.mmap.restype = pointer
    libc.munmap.argtypes = [pointer, size]
    libc.mprotect.argtypes = [pointer, size, number]
    libc.fallocate.argtypes = [number, number, offset, offset]
    return libc
