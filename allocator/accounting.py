"""What the KV cache reserves, holds and actually uses, now and averaged over time."""

from collections.abc import Mapping
from dataclasses import dataclass

from batchrun.allocator.layout import KVLayout
from batchrun.allocator.pages import Work

PAGED_BLOCK_TOKENS = 16
"""Block size of the paged cache that `Usage.paged` models (vLLM's default)."""


_BYTES = ("reserved", "mapped", "live", "shared", "static", "paged")


@dataclass(frozen=True)
class Usage:
    """One moment of an arena, in bytes.

    Attributes:
        reserved: address space.
        mapped: physical pages held by the pool, mapped or free, each counted once.
        live: bytes that hold tokens of open slots; shared bytes count once.
        shared: bytes that open slots save by sharing pages.
        static: what reserving `max_tokens` for each open slot would use.
        paged: what a cache of 16-token blocks would use for the same sequences.
        work: calls and seconds of `map`, `unmap`, `create` and `destroy` since the arena was made.
    """

    reserved: int
    mapped: int
    live: int
    shared: int
    static: int
    paged: int
    work: Mapping[str, Work]


def paged_blocks(num_tokens: int) -> int:
    """Blocks that a paged cache would need for one sequence."""
    return -(-num_tokens // PAGED_BLOCK_TOKENS)


def paged_bytes(layout: KVLayout, blocks: int) -> int:
    """Bytes of `blocks` blocks of a paged cache with the layers and dtype of `layout`."""
    return blocks * PAGED_BLOCK_TOKENS * layout.bytes_per_token


def static_bytes(layout: KVLayout, num_sequences: int) -> int:
    """Bytes of a cache that reserves `max_tokens` for each sequence."""
    return num_sequences * layout.max_tokens * layout.bytes_per_token


class UsageIntegral:
    """Time-weighted sums and peaks of the `Usage` of one arena."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._sums = dict.fromkeys(_BYTES, 0.0)
        self._peaks = dict.fromkeys(_BYTES, 0)
        self._latest: Usage | None = None

    def add(self, usage: Usage, seconds: float) -> None:
        """Add `usage`, which held for `seconds`."""
        if seconds < 0:
            raise ValueError(f"time went backwards by {-seconds} seconds")
        self.seconds += seconds
        for name in _BYTES:
            value = getattr(usage, name)
            self._sums[name] += value * seconds
            self._peaks[name] = max(self._peaks[name], value)
        self._latest = usage

    def as_dict(self) -> dict[str, float]:
        """Current bytes (`kv_live`), byte-seconds (`kv_live_s`), peaks (`peak_kv_live`), counts."""
        result: dict[str, float] = {"kv_s": self.seconds}
        result |= {f"kv_{name}": getattr(self._latest, name, 0) for name in _BYTES}
        result |= {f"kv_{name}_s": value for name, value in self._sums.items()}
        result |= {f"peak_kv_{name}": peak for name, peak in self._peaks.items()}
        for name in ("map", "unmap", "create", "destroy"):
            work = self._latest.work[name] if self._latest else Work()
            result |= {f"{name}_calls": work.calls, f"{name}_s": work.seconds}
        return result
