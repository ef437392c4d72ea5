"""What the KV cache reserves, holds and really uses, now and averaged over time."""

from dataclasses import dataclass

from batchrun.allocator.layout import KVLayout

PAGED_BLOCK_TOKENS = 16
"""Block size of the paged cache that `Usage.paged` compares with (vLLM's default)."""


_BYTES = ("reserved", "mapped", "live", "shared", "static", "paged")


@dataclass(frozen=True)
class Usage:
    """One moment of an arena, in bytes; counters and seconds run from its creation.

    Attributes:
        reserved: address space.
        mapped: physical pages held by the pool, mapped or free, each once.
        live: bytes that hold tokens of open slots, shared ones once.
        shared: bytes of pages that sharing saves open slots.
        static: what reserving `max_tokens` for each open slot would use.
        paged: what a cache of 16-token blocks would use for the same sequences.
    """

    reserved: int
    mapped: int
    live: int
    shared: int
    static: int
    paged: int
    map_calls: int
    unmap_calls: int
    create_calls: int
    destroy_calls: int
    map_seconds: float
    unmap_seconds: float
    create_seconds: float
    destroy_seconds: float

    @property
    def utilisation(self) -> float:
        """Live over mapped; 1 when nothing is mapped."""
        return self.live / self.mapped if self.mapped else 1.0


def paged_blocks(num_tokens: int) -> int:
    """Blocks that a paged cache would use for one sequence."""
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
        """Count `usage` as having held for `seconds`."""
        if seconds < 0:
            raise ValueError(f"time went backwards by {-seconds} seconds")
        self.seconds += seconds
        for name in _BYTES:
            value = getattr(usage, name)
            self._sums[name] += value * seconds
            self._peaks[name] = max(self._peaks[name], value)
        self._latest = usage

    @property
    def utilisation(self) -> float:
        """Time-averaged live over time-averaged mapped; 1 when nothing was mapped."""
        live, mapped = self._sums["live"], self._sums["mapped"]
        return live / mapped if mapped else 1.0

    def as_dict(self) -> dict[str, float]:
        """Bytes now (`kv_live`), byte-seconds (`kv_live_s`), peaks (`peak_kv_live`), counters."""
        result: dict[str, float] = {"kv_s": self.seconds}
        result |= {f"kv_{name}": getattr(self._latest, name, 0) for name in _BYTES}
        result |= {f"kv_{name}_s": value for name, value in self._sums.items()}
        result |= {f"peak_kv_{name}": peak for name, peak in self._peaks.items()}
        for work in ("map", "unmap", "create", "destroy"):
            result[f"{work}_calls"] = getattr(self._latest, f"{work}_calls", 0)
            result[f"{work}_s"] = getattr(self._latest, f"{work}_seconds", 0.0)
        return result
