"""8-bit weights: half the memory and half the bytes to read, at little loss.

On a GPU a linear layer is one operator, so that a compiled layer or a CUDA graph can hold it. For
few tokens it uses `linear_triton`, where each weight crosses the memory bus as one byte; for many,
where arithmetic takes longer than reading weights, it widens the weights first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

# --- on a GPU ---

WIDEN_ABOVE = 1024  # tokens: above this, widening costs less than torch's matmul gains
_LEAST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of the kernel computes: `n` rows of weights, `t` tokens, `k` at a time."""

    n: int
    t: int
    k: int
    warps: int = 4
    stages: int = 4

    @property
    def shared(self) -> int:
        """Bytes of shared memory: one per weight and two per activation, for each stage."""
        return self.stages * self.k * (self.n + 2 * self.t)


# By maximum number of tokens, the largest tile first: the fastest on an H100 (docs/kernels.md).
_TILES = {
    16: (Tile(32, 16, 256), Tile(16, 16, 256)),
    32: (Tile(32, 32, 128), Tile(16, 32, 128)),
    64: (Tile(64, 64, 128), Tile(32, 64, 128), Tile(16, 64, 128)),
    128: (Tile(64, 128, 64), Tile(64, 64, 128)),
    256: (Tile(128, 256, 64, warps=8, stages=3), Tile(64, 128, 64), Tile(64, 64, 128)),
    WIDEN_ABOVE: (Tile(128, 256, 64, warps=8), Tile(128, 128, 64, warps=8, stages=3)),
}
_FULL = 0.8  # share of multiprocessors in use: more would not make up for smaller tiles


def tile_for(tokens: int, rows: int, processors: int, shared: int) -> Tile:
    """The tile for a product of so many tokens and rows of weights.

    Args:
        tokens: At most `WIDEN_ABOVE`.
        rows: Rows of weights.
        processors: Multiprocessors of the GPU.
        shared: Bytes of shared memory that a program can have.
    """
    tiles = next(tiles for most, tiles in _TILES.items() if tokens <= most)
    fitting = [tile for tile in tiles if tile.shared <= shared]
    for tile in fitting:
        if -(-rows // tile.n) * -(-tokens // tile.t) >= _FULL * processors:
            return tile
    return fitting[-1]


@cache
def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why each step must widen the weights in memory; None if it need not."""
    if dtype not in {torch.bfloat16, torch.float16}:
        return f"the kernel computes in bfloat16 and float16, not in {str(dtype)[6:]}"
    if find_spec("triton") is None:
        return "triton is not installed"
    found = torch.cuda.get_device_capability(device)
    if found < _LEAST_CAPABILITY:
        return f"it needs compute capability 8.0, and this device has {found[0]}.{found[1]}"
    return None


@cache
def _resources(device: torch.device) -> tuple[int, int]:
    """The number of multiprocessors, and the bytes of shared memory that a program can have."""
    found: Any = torch.cuda.get_device_properties(device)  # its type lacks the second
    return found.multi_processor_count, found.shared_memory_per_block_optin


def linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply a linear layer with int8 weights.

    Args:
        x: `[..., k]` on a GPU.
        weight: int8 `[n, k]`, contiguous.
        scales: float32 `[n]`.
        bias: `[n]`, or None.

    Returns:
        `[..., n]` in the dtype of `x`.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > WIDEN_ABOVE or unsupported_reason(x.device, x.dtype) is not None:
        return widened(x, weight, scales, bias)
    tile = tile_for(len(rows), len(weight), *_resources(x.device))
    with torch.cuda.device(x.device):
        out = launch(rows, weight, scales, bias, tile)
    return out.view(*x.shape[:-1], len(weight))  # even of no rows


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    tile: Tile,
) -> torch.Tensor:
    """Apply it by the Triton kernel: x `[t, k]` to `[t, n]`. Without scales, weights are floats."""
    from batchrun.engine.model.linear_triton import kernel  # noqa: PLC0415  (there may be no Triton)

    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, n = len(x), len(weight)
    out = x.new_empty(tokens, n)
    grid = (-(-tokens // tile.t), -(-n // tile.n))
    operands = x, weight, *(weight if each is None else each for each in (scales, bias)), out
    sizes = tokens, n, x.stride(0), weight.shape[1], tile.n, tile.t, tile.k
    program: Any = kernel[grid]
    has = scales is not None, bias is not None
    program(*operands, *sizes, *has, num_warps=tile.warps, num_stages=tile.stages)
    return out


def widened(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply it by torch's matmul, with weights temporarily widened to the dtype of `x`."""
    whole = torch.empty_like(weight, dtype=x.dtype)
    torch.mul(weight, scales[:, None], out=whole)  # one pass: a GPU converts on the way
    return functional.linear(x, whole, bias)


_LIBRARY = torch.library.Library("batchrun", "FRAGMENT")


def register(schema: str, function: Callable[..., torch.Tensor]) -> None:
    """Make a linear layer on a GPU an operator, which compiled code takes as a whole."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CUDA")
    torch.library.register_fake(
        f"batchrun::{name}",
        lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
        lib=_LIBRARY,
    )


register("int8_linear(Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor", linear)

# --- modules ---


class Int8Linear(nn.Module):
    """A linear layer whose weights are integers from -127 to 127, times one scale per row.

    Quantisation is weight-only and symmetric, with one scale per output feature, as in LLM.int8()
    (arXiv 2208.07339). Activations are not quantised, so its handling of outliers is not needed.

    Args:
        linear: The layer to quantise.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data.float()
        scales = weight.abs().amax(1).clamp_min(1e-20) / 127
        self.weight = nn.Buffer((weight / scales[:, None]).round().to(torch.int8))
        self.scales = nn.Buffer(scales)
        self.bias = linear.bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        if x.is_cuda:
            weights = self.weight, self.scales, self.bias
            return cast("torch.Tensor", torch.ops.batchrun.int8_linear(x, *weights))
        # Dividing by a power of two is exact and keeps sums of integer weights within float16. The
        # order matters: inductor has a pattern for `linear * scales`, which fails on a GPU.
        product = functional.linear(x / 128, self.weight.to(x.dtype))
        product = (self.scales * 128).to(x.dtype) * product
        return product if self.bias is None else product + self.bias


def int8_weights(model: nn.Module) -> None:
    """Quantise each linear layer's weights to 8 bits. Peak memory is the model plus one layer."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))
