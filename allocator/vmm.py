"""What a machine must offer so that tensors can grow in place: reserve, commit, map, alias.

The names follow CUDA's virtual memory management API, whose meaning `VirtualMemory` fixes:
address space and physical pages are obtained separately, one page may be mapped at several
addresses, and touching an address with no page behind it is a fault, not a zero.
"""

from collections.abc import Sequence
from typing import NewType, Protocol

Handle = NewType("Handle", int)
"""One physical page: `VirtualMemory.granularity` bytes in each of its planes."""


class AllocatorError(Exception):
    """A rule of the allocator was broken, or the operating system refused a request."""


class Refused(AllocatorError):  # noqa: N818 - says what has happened
    """The operating system refused a request, for a reason that the message names."""


class OutOfPages(Refused):
    """No physical memory, no budget, or no room for another mapping. Nothing was changed."""


class OutOfBudget(OutOfPages):
    """The machine may have more: the KV budget has not."""


class VirtualMemory(Protocol):
    """Address space and physical pages, obtained separately and joined by `map`.

    Addresses and sizes are in bytes and multiples of `granularity`. Every method is all or
    nothing: when it raises, the state is as before the call. A broken rule (overlapping map, unmap
    of an unmapped page, destroying a mapped page, ...) raises `AllocatorError`. Instances are used
    by one thread at a time.

    A page may have a part in each of several planes, as an array of structures is turned into a
    structure of arrays. What is said of an address then holds in all planes of its reservation,
    which lie one behind the other; calls name the address in the first.
    """

    @property
    def granularity(self) -> int:
        """Bytes of one physical page in each plane."""

    @property
    def planes(self) -> int:
        """Parts of a page."""

    def reserve(self, size: int) -> int:
        """Reserve `size` bytes of address space a plane, without memory; touching it is a fault.

        Returns:
            The address, a multiple of the system's page size. Plane k begins `k * size` on.
        """

    def free(self, address: int, size: int) -> None:
        """Give back a whole reservation of `size` bytes a plane, in which nothing is mapped."""

    def create(self, count: int) -> list[Handle]:
        """Make `count` physical pages, consecutive handles where possible.

        A new page's contents are undefined. It has memory from now on, or from when it is first
        mapped.

        Raises:
            OutOfPages: the machine has no memory for all of them.
        """

    def destroy(self, handles: Sequence[Handle]) -> None:
        """Give pages back to the machine. None may be mapped anywhere."""

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        """Put `handles` behind the range that begins at `address`, readable and writable.

        The range must lie in one reservation and be unmapped. A page may be mapped elsewhere too.

        Raises:
            OutOfPages: the system has no room for another mapping, or no memory.
        """

    def unmap(self, address: int, count: int) -> None:
        """Take the pages from behind `count` mapped pages of addresses, which then fault again."""

    def close(self) -> None:
        """Release everything: mappings, pages and reservations. Idempotent."""
