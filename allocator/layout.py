"""Where each token's keys and values lie, in bytes. Pure arithmetic.

The layers are split into slab groups of `layers_per_slab`. In each group a sequence has one slab,
contiguous in virtual memory and token-major, so that it grows at one end:

    slab of group g:  | token 0                                     | token 1      | ...
                      | layer a: K V | layer a+1: K V | ... layer b  | layer a: K V | ...
                               each K or V: [kv_heads, dim]
    pages:            |<------- page 0 ------->|<------- page 1 ------->|   need not align to tokens

Slabs of the same shape can be planes of one group instead of separate groups. Planes always have
the same pages mapped, each page with a part in every plane, so all of them cost the bookkeeping of
one slab.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, lcm

_BLOCK_TOKENS = 16  # Kernels made for paged caches read a slot as blocks of this many tokens.


@dataclass(frozen=True)
class LayerKV:
    """What one layer stores per token: K is [kv_heads, k_dim] and V is [kv_heads, v_dim]."""

    kv_heads: int
    k_dim: int
    v_dim: int

    def __post_init__(self) -> None:
        if min(self.kv_heads, self.k_dim) < 1 or self.v_dim < 0:
            raise ValueError(f"{self}: heads and dims must be positive (only v_dim may be 0)")

    @property
    def width(self) -> int:
        """Elements of K and V together, for one token."""
        return self.kv_heads * (self.k_dim + self.v_dim)


@dataclass(frozen=True)
class KVLayout:
    """The shape of a KV cache of slots that each hold up to `max_tokens` tokens.

    Attributes:
        layers: one entry per layer that caches keys and values; they may differ.
        dtype_bytes: bytes of one element.
        page_size: bytes of one physical page in each plane.
        max_tokens: tokens that one slot can hold.
        layers_per_slab: layers interleaved in one slab. All of them: least memory lost to partly
            filled pages. One: each layer touches the fewest pages.
        planes: slabs of each group. The layers are split into this many shares of the same shape,
            one per plane; the groups are those of one share.
    """

    layers: tuple[LayerKV, ...]
    dtype_bytes: int
    page_size: int
    max_tokens: int
    layers_per_slab: int
    planes: int = 1

    def __post_init__(self) -> None:
        for name in ("dtype_bytes", "page_size", "max_tokens", "layers_per_slab", "planes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1")
        if not self.layers:
            raise ValueError("a KV layout needs at least one layer")
        if self.page_size % self.dtype_bytes:
            raise ValueError(
                f"page size {self.page_size} is not a multiple of dtype_bytes {self.dtype_bytes}"
            )
        if self.layers != self.layers[: self._share] * self.planes:
            raise ValueError(f"{len(self.layers)} layers do not form {self.planes} equal planes")

    @cached_property
    def groups(self) -> tuple[range, ...]:
        """The layers of each slab group in the first plane."""
        total, step = self._share, self.layers_per_slab
        return tuple(range(a, min(a + step, total)) for a in range(0, total, step))

    @property
    def num_groups(self) -> int:
        """Slabs that one slot has in each plane."""
        return len(self.groups)

    @property
    def page_bytes(self) -> int:
        """Bytes of one physical page in all planes."""
        return self.page_size * self.planes

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V in all layers."""
        return sum(self._token_bytes) * self.planes

    def group_bytes_per_token(self, group: int) -> int:
        """Bytes of one token in a slab of `group`: the stride between tokens."""
        return self._token_bytes[group]

    @cached_property
    def slot_tokens(self) -> int:
        """Tokens of address space per slot: `max_tokens`, rounded up.

        Every slab is then a whole number of pages and blocks, and slot s begins exactly
        `s * slot_tokens` tokens after slot 0, so that all slots form one tensor of tokens.
        """
        page = self.page_size
        step = lcm(_BLOCK_TOKENS, *(page // gcd(page, token) for token in self._token_bytes))
        return -(-self.max_tokens // step) * step

    def slab_size(self, group: int) -> int:
        """Bytes of address space of one slot's slab in one plane; a whole number of pages."""
        return self.slot_tokens * self._token_bytes[group]

    def pages_for(self, num_tokens: int) -> tuple[int, ...]:
        """Pages, per group, that hold the tokens [0, num_tokens)."""
        page = self.page_size
        return tuple(-(-num_tokens * token // page) for token in self._token_bytes)

    def whole_pages(self, num_tokens: int) -> tuple[int, ...]:
        """Pages, per group, that the tokens [0, num_tokens) fill completely."""
        page = self.page_size
        return tuple(num_tokens * token // page for token in self._token_bytes)

    def tokens_on(self, pages: Sequence[int]) -> int:
        """Tokens that have a byte on the first `pages[g]` pages of some group g."""
        size = self.page_size
        return max(-(-n * size // token) for n, token in zip(pages, self._token_bytes, strict=True))

    def total_pages_for(self, num_tokens: int) -> int:
        """Pages, over all groups, that hold the tokens [0, num_tokens)."""
        return sum(self.pages_for(num_tokens))

    def tokens_in(self, pages: Sequence[int]) -> int:
        """Whole tokens that fit if group g has `pages[g]` pages; at most `max_tokens`."""
        size = self.page_size
        backed = (n * size // token for n, token in zip(pages, self._token_bytes, strict=True))
        return min(self.max_tokens, *backed)

    def waste_bytes(self, num_tokens: int) -> int:
        """Bytes left unused on the pages that hold `num_tokens` tokens."""
        mapped = self.total_pages_for(num_tokens) * self.page_bytes
        return mapped - num_tokens * self.bytes_per_token

    def offsets(self, layer: int) -> tuple[int, int]:
        """Bytes from the start of a token in its slab to the K and the V of `layer`."""
        _, group, within = self.place_of(layer)
        shape, before = self.layers[within], self.layers[self.groups[group].start : within]
        begin = sum(other.width for other in before) * self.dtype_bytes
        return begin, begin + shape.kv_heads * shape.k_dim * self.dtype_bytes

    def place_of(self, layer: int) -> tuple[int, int, int]:
        """The plane that holds `layer`, its slab group, and the layer's index within its plane."""
        plane, within = divmod(range(len(self.layers))[layer], self._share)
        return plane, within // self.layers_per_slab, within

    @property
    def _share(self) -> int:
        """Layers per plane."""
        return len(self.layers) // self.planes

    @cached_property
    def _token_bytes(self) -> tuple[int, ...]:
        return tuple(
            sum(self.layers[layer].width for layer in group) * self.dtype_bytes
            for group in self.groups
        )


def planes_of(layers: Sequence[LayerKV], layers_per_slab: int) -> int:
    """How many planes turn these slabs into a single group; 1 if the slabs differ in shape."""
    whole = len(layers) % layers_per_slab == 0
    alike = tuple(layers) == tuple(layers[:layers_per_slab]) * (len(layers) // layers_per_slab)
    return len(layers) // layers_per_slab if whole and alike else 1
