"""Linear layers and norms by our own native code: layers_bf16.cpp, or else layers.cpp.

Weights are packed once, in the order in which the code reads them. Instructions that multiply
bfloat16 are used where the CPU has them; everything else is computed in float32.

Each row's result depends on that row alone, not on the batch or the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from batchrun.engine.cpu import Level
from batchrun.engine.cpu.library import Linear, Matrix, Norm, arithmetic
from batchrun.engine.model.int8 import Int8Linear

_COLUMNS = 32  # per panel
_UNIT = 32  # numbers of a row that are packed together


class PackedWeight:
    """A weight `[n, k]` packed into panels, with its bias.

    Args:
        weight: `[n, k]` in the dtype of activations, or int8.
        scales: Scales of int8 weights, float32 `[n]`; None for others.
        bias: `[n]`, or None.
        level: The level of the arithmetic, which says in which order it reads weights.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        bias: torch.Tensor | None,
        level: Level,
    ) -> None:
        self.n, self.k = weight.shape
        self._level = level
        missing, width = -self.n % _COLUMNS, self.k + -self.k % _UNIT
        padded = weight
        if missing or width > self.k:
            padded = functional.pad(weight, (0, width - self.k, 0, missing))
        if level:  # panel, half, column, step, pair to panel, step, half, pair, column
            panels = padded.view(-1, 2, 16, width // 32, 16, 2).permute(0, 3, 1, 4, 2, 5)
        else:  # panel, half, column, step to panel, half, step, column
            panels = padded.view(-1, 2, 16, width).permute(0, 1, 3, 2)
        self._panels = panels.contiguous()
        self._back = (0, 2, 4, 1, 3, 5) if level else (0, 1, 3, 2)
        vectors = [
            v if v is None else functional.pad(v.float(), (0, missing)) for v in (scales, bias)
        ]
        self._held = [self._panels, *(v for v in vectors if v is not None)]
        self.nbytes = sum(tensor.nbytes for tensor in self._held)
        addresses = [None if v is None else v.data_ptr() for v in vectors]
        self.matrix = Matrix(self._panels.data_ptr(), *addresses, self.n, width)
        self._scales = vectors[0]

    def unpack(self) -> torch.Tensor:
        """The weight `[n, k]` again; in float32 if it was int8."""
        rows = self._panels.permute(self._back).reshape(-1, self.matrix.k)
        if self._scales is not None:
            rows = rows * self._scales[:, None]
        return rows[: self.n, : self.k]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a weight that is not int8: `[...]` int64 to `[..., k]`."""
        panel, half, column = ids // _COLUMNS, ids % _COLUMNS // 16, ids % 16
        if self._level:
            found = self._panels[panel, :, half, :, column].flatten(-3)
        else:
            found = self._panels[panel, half, :, column]
        return found[..., : self.k]


def fits(linear: object, dtype: torch.dtype) -> bool:
    """Whether a module is a linear layer that can be packed."""
    if type(linear) is nn.Linear:
        return linear.weight.dtype == dtype
    return isinstance(linear, Int8Linear)


class NativeLinear(nn.Module):
    """A linear layer in native code.

    Args:
        linear: A layer that `fits`.
        dtype: Of activations.
    """

    def __init__(self, linear: nn.Linear | Int8Linear, dtype: torch.dtype) -> None:
        super().__init__()
        found = arithmetic(dtype)
        self.packed = pack([linear], found.level)
        self.nbytes = self.packed.nbytes
        self._dtype = dtype
        self._missing = self.packed.matrix.k - self.packed.k
        self._call = Linear(weight=self.packed.matrix, level=found.level)
        self._compute = found.function("linear")

    @property
    def weight(self) -> torch.Tensor:
        """`[out, in]`, unpacked at each access."""
        return self.packed.unpack().to(self._dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        if x.dtype != self._dtype:
            raise ValueError(f"a linear layer of {self._dtype} got {x.dtype}")
        x = functional.pad(x, (0, self._missing)) if self._missing else x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.packed.n)
        call = self._call
        call.x, call.out = x.data_ptr(), out.data_ptr()
        call.rows, call.threads = x.numel() // x.shape[-1], torch.get_num_threads()
        if call.rows:
            self._compute(ctypes.byref(call))
        return out


class NativeEmbedding(nn.Module):
    """An embedding whose weight is a native linear layer's, which holds it for both.

    Args:
        head: A linear layer that is not of 8 bits.
    """

    def __init__(self, head: NativeLinear) -> None:
        super().__init__()
        self._packed = head.packed
        self.num_embeddings = self._packed.n

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[...]` int64 to `[..., n]`."""
        return self._packed.rows(ids)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm of `[..., n]`, n a multiple of 32, times float32 `[n]`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    n = len(weight)
    addresses = x.data_ptr(), out.data_ptr()
    call = Norm(weight.data_ptr(), eps, *addresses, n, x.numel() // n, torch.get_num_threads())
    arithmetic(x.dtype).function("rms_norm")(ctypes.byref(call))
    return out


def pack(
    linears: Sequence[nn.Linear | Int8Linear], level: Level, *, interleave: bool = False
) -> PackedWeight:
    """Pack linear layers with the same input into one weight: rows in order, or 16 in turn."""

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if interleave:
            return torch.stack([t.unflatten(0, (-1, 16)) for t in tensors], 1).flatten(0, 2)
        return torch.cat(list(tensors))

    weight = joined([linear.weight.data for linear in linears])
    scales = [linear.scales for linear in linears if isinstance(linear, Int8Linear)]
    bias = [linear.bias.data for linear in linears if linear.bias is not None]
    vectors = [joined(each) if each else None for each in (scales, bias)]
    return PackedWeight(weight, vectors[0], vectors[1], level)
