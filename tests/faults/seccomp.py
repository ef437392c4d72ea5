"""System calls that the kernel forbids this process, as a container's seccomp profile does."""

from __future__ import annotations

import ctypes
import platform
import struct

import pytest

# <asm/unistd.h>, of x86-64 and of 64-bit Arm.
_NUMBERS = {
    "memfd_create": {"x86_64": 319, "aarch64": 279},
    "fallocate": {"x86_64": 285, "aarch64": 47},
    "flock": {"x86_64": 73, "aarch64": 32},
    "fcntl": {"x86_64": 72, "aarch64": 25},
    "link": {"x86_64": 86, "aarch64": 37},
}
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_AT, _SECOND_ARGUMENT_AT = 0, 24  # in struct seccomp_data

needed = pytest.mark.skipif(
    platform.machine() not in _NUMBERS["fcntl"], reason="the system calls' numbers are not known"
)


def forbid(call: str, error: int, second: int | None = None) -> None:
    """Let a call fail from now on, for good, in this process and its children.

    Args:
        call: Its name.
        error: The error's number.
        second: Only where the second argument is this.
    """
    number = _NUMBERS[call][platform.machine()]
    code = [(_LOAD, 0, 0, _NUMBER_AT), (_EQUAL, 0, 1 if second is None else 3, number)]
    if second is not None:
        code += [(_LOAD, 0, 0, _SECOND_ARGUMENT_AT), (_EQUAL, 0, 1, second)]
    code += [(_RETURN, 0, 0, _ERROR | error), (_RETURN, 0, 0, _ALLOW)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    assert libc.prctl(_SET_SECCOMP, _FILTER, program, 0, 0) == 0, ctypes.get_errno()
