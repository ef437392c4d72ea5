"""What `HostMemory` asks of Linux, and what Linux may refuse."""

import ctypes
import errno
import os
import resource
from pathlib import Path

from batchrun.allocator.vmm import Refused

SHARED_MEMORY = "/dev/shm"  # a tmpfs, where memfd_create is forbidden
_MAX_MAP_COUNT = 65530  # Linux's own, where /proc does not tell


def max_map_count() -> int:
    """Mappings that Linux lets a process have."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:
        return _MAX_MAP_COUNT


def memory_file() -> int:
    """A file of nothing but memory, without a name.

    Raises:
        Refused: Neither memfd_create nor a file in /dev/shm may be had.
        OSError: This process has no descriptor left.
    """
    try:
        return os.memfd_create("batchrun-kv")
    except OSError as error:  # an old kernel, a profile of seccomp, vm.memfd_noexec
        forbidden = error
    try:
        return os.open(SHARED_MEMORY, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if forbidden.errno in {errno.EMFILE, errno.ENFILE}:
            raise forbidden from None
        raise Refused(
            f"no memory can be shared by mapping it twice: memfd_create is refused "
            f"({forbidden.strerror}), and {SHARED_MEMORY} too ({error.strerror}); allow "
            f"memfd_create in the container's seccomp profile, or mount a tmpfs at {SHARED_MEMORY}"
        ) from error


def is_memfd(handle: int) -> bool:
    """Whether a file is of memfd_create, whose size nothing but memory bounds."""
    try:
        return os.readlink(f"/proc/self/fd/{handle}").startswith("/memfd:")
    except OSError:
        return True


def why_no_addresses() -> str:
    """What bounds a process's address space here, and how to lift it; empty if nothing known."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return f"a process may have {limit} bytes of addresses: `ulimit -v unlimited`"
    return ""


def refused(call: str, what: str, cure: str = "") -> Refused:
    """What the system said to the last call of `load_libc`'s."""
    return refusal(call, what, ctypes.get_errno(), cure)


def refusal(call: str, what: str, number: int, cure: str = "") -> Refused:
    """What the system said to a call; where it forbids the call itself, who may be doing so."""
    if not cure and number in {errno.EPERM, errno.EACCES, errno.ENOSYS}:
        cure = f"the system forbids {call}: allow it in the container's seccomp profile"
    return Refused(f"{call} failed for {what}: {os.strerror(number)}" + (cure and f"; {cure}"))


def load_libc() -> ctypes.CDLL:
    """The C library's calls that Python lacks."""
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, offset, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
    libc.mmap.argtypes = [pointer, size, number, number, number, offset]
    libc.mmap.restype = pointer
    libc.munmap.argtypes = [pointer, size]
    libc.mprotect.argtypes = [pointer, size, number]
    libc.fallocate.argtypes = [number, number, offset, offset]
    return libc
