"""Decoder layers and linear layers in bfloat16 by our own native code, layers.cpp.

Two calls with attention between them replace some thirty operators: norm, projections and rotary
embedding; then output projection, norm, gated MLP and both residual sums. Weights are packed once,
in the order in which AMX tiles read them; AVX512-BF16 reads the same order.

Each row's result depends on that row alone, not on the batch or the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional

from batchrun.engine import cpu
from batchrun.engine.cpu import compile as compiled
from batchrun.engine.cpu.compile import CompileError
from batchrun.engine.model.hook import Step, current_step
from batchrun.engine.model.int8 import Int8Linear

if TYPE_CHECKING:
    from batchrun.engine.attention import QKV, LayerAttention

_SOURCE = Path(__file__).with_name("layers.cpp")
_COLUMNS = 32  # per panel


@cache
def unsupported_reason() -> str | None:
    """Why this machine can't run the library; None if it can. Compiles it on the first call."""
    if not cpu.level():
        return "the CPU has no AVX512-BF16"
    try:
        library()
    except CompileError as error:
        return f"it can't be compiled: {error}"
    return None


@cache
def library() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        CompileError: It can't be compiled.
    """
    return compiled.load(_SOURCE, structs=(Linear, Project, Finish))


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("n", "k")),
    )


_SIZES = tuple((name, ctypes.c_int64) for name in ("rows", "threads", "level"))


class Linear(ctypes.Structure):
    """The struct of that name in layers.cpp."""

    _fields_ = (
        ("weight", _Matrix),
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *_SIZES,
    )


class Project(ctypes.Structure):
    """The struct of that name in layers.cpp."""

    _fields_ = (
        ("weight", _Matrix),
        ("norm", ctypes.c_void_p),
        ("heads_norm", ctypes.c_void_p * 2),
        ("heads", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("dim", "rotary")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "out")),
        *_SIZES,
    )


class Finish(ctypes.Structure):
    """The struct of that name in layers.cpp."""

    _fields_ = (
        *((name, _Matrix) for name in ("output", "gate_up", "down")),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("attended", "x", "out")),
        *_SIZES,
    )


class PackedWeight:
    """A weight `[n, k]` packed into panels, with its bias.

    Args:
        weight: `[n, k]` in bfloat16 or int8, k a multiple of 32.
        scales: Scales of int8 weights, float32 `[n]`; None for bfloat16.
        bias: `[n]`, or None.
    """

    def __init__(
        self, weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None
    ) -> None:
        self.n, self.k = weight.shape
        missing = -self.n % _COLUMNS
        tiles = functional.pad(weight, (0, 0, 0, missing)).view(-1, 2, 16, self.k // 32, 16, 2)
        # From panel, half, column, step, pair to panel, step, half, pair, column.
        self._panels = tiles.permute(0, 3, 1, 4, 2, 5).contiguous()
        vectors = [
            v if v is None else functional.pad(v.float(), (0, missing)) for v in (scales, bias)
        ]
        self._held = [self._panels, *(v for v in vectors if v is not None)]
        self.nbytes = sum(tensor.nbytes for tensor in self._held)
        addresses = [None if v is None else v.data_ptr() for v in vectors]
        self.matrix = _Matrix(self._panels.data_ptr(), *addresses, self.n, self.k)
        self._scales = vectors[0]

    def unpack(self) -> torch.Tensor:
        """The weight `[n, k]` again, in bfloat16."""
        rows = self._panels.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.k)
        if self._scales is not None:
            rows = (rows * self._scales[:, None]).bfloat16()
        return rows[: self.n]


def fits(linear: object) -> bool:
    """Whether a module is a linear layer that can be packed."""
    if type(linear) is nn.Linear:
        return linear.weight.dtype == torch.bfloat16 and linear.in_features % 32 == 0
    return isinstance(linear, Int8Linear) and linear.in_features % 32 == 0


class NativeLinear(nn.Module):
    """A linear layer in native code.

    Args:
        linear: A layer that `fits`.
    """

    def __init__(self, linear: nn.Linear | Int8Linear) -> None:
        super().__init__()
        self.packed = _packed([linear])
        self.nbytes = self.packed.nbytes
        self._call = Linear(weight=self.packed.matrix, level=cpu.level())
        self._compute = library().batchrun_linear

    @property
    def weight(self) -> torch.Tensor:
        """`[out, in]`, unpacked at each access."""
        return self.packed.unpack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.packed.n)
        call = self._call
        call.x, call.out = x.data_ptr(), out.data_ptr()
        call.rows, call.threads = x.numel() // self.packed.k, torch.get_num_threads()
        if call.rows:
            self._compute(ctypes.byref(call))
        return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm of bfloat16 `[..., n]`, n a multiple of 32, times float32 `[n]`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    library().batchrun_rms_norm(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, weight, out)),
        ctypes.c_double(eps),
        *(ctypes.c_int64(n) for n in (x.numel() // len(weight), len(weight))),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return out


class NativeLayer(nn.Module):
    """A pre-norm decoder layer: grouped-query attention with rotary embeddings, SiLU-gated MLP.

    Args:
        layer: A layer with Llama's modules; Qwen's biases and per-head norms are allowed.
        index: The layer's index.
        attention: What the layer asks of attention.

    Raises:
        ValueError: Its modules are not those of such a layer. Whether both compute the same is
            for the caller to check.
    """

    def __init__(self, layer: nn.Module, index: int, attention: LayerAttention) -> None:
        super().__init__()
        parts = _Parts(layer)
        self.layer_idx = index
        self.attention = attention
        dim = self.dim = parts.dim
        self.heads = [linear.out_features // dim for linear in (parts.q, parts.k, parts.v)]
        norms: list[Any] = [parts.norm, parts.mlp_norm, *parts.head_norms]
        self._norms = [norm.weight.data.float() for norm in norms]
        self._weights = [
            _packed([parts.q, parts.k, parts.v]),
            _packed([parts.o]),
            _packed([parts.gate, parts.up], interleave=True),
            _packed([parts.down]),
        ]
        self.nbytes = sum(w.nbytes for w in self._weights) + sum(n.nbytes for n in self._norms)
        matrices = [w.matrix for w in self._weights]
        self._project = Project(
            weight=matrices[0],
            norm=self._norms[0].data_ptr(),
            heads_norm=tuple(norm.data_ptr() for norm in self._norms[2:]),
            heads=tuple(self.heads[:2]),
            dim=dim,
            eps=parts.eps,
            level=cpu.level(),
        )
        self._finish = Finish(
            *matrices[1:], norm=self._norms[1].data_ptr(), eps=parts.eps, level=cpu.level()
        )
        self._library = library()

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `_through`."""
        return _through([self], hidden_states, **kwargs)

    def compute(
        self, x: torch.Tensor, frame: _Frame, step: Step | None, result: torch.Tensor
    ) -> None:
        """Compute the layer of `x` into `result`, a separate tensor of the same shape."""
        call, last = self._project, self._finish
        call.x, last.x, last.out = x.data_ptr(), x.data_ptr(), result.data_ptr()
        call.out, call.cos, call.sin, call.rotary = frame.addresses
        call.rows = last.rows = frame.rows
        call.threads = last.threads = frame.threads
        self._library.batchrun_project(ctypes.byref(call))
        if step is None:
            attended = _causal(self.attention, frame.parts)
        else:
            attended = step.attend(self.layer_idx, self.attention, frame.parts)
        attended = attended.contiguous()
        last.attended = attended.data_ptr()
        self._library.batchrun_finish(ctypes.byref(last))


class _Frame:
    """What a step's layers share: cosines and sines, and memory for one layer's projections."""

    def __init__(
        self, x: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor], layer: NativeLayer
    ) -> None:
        self.rows, self.threads = x.shape[1], torch.get_num_threads()
        projected = x.new_empty(self.rows, sum(layer.heads), layer.dim)
        self._held = [projected, *(tensor.contiguous() for tensor in positions)]
        self.addresses = (*(tensor.data_ptr() for tensor in self._held), positions[0].shape[-1])
        query, key, value = projected.split(layer.heads, dim=1)
        self.parts: QKV = query, key, value


class NativeStack(nn.Module):
    """All decoder layers of a model as one module.

    Args:
        layers: The layers, whose heads have the same shape.
    """

    def __init__(self, layers: Sequence[NativeLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `_through`."""
        return _through(cast("list[NativeLayer]", list(self.layers)), hidden_states, **kwargs)


def _through(
    layers: Sequence[NativeLayer],
    hidden_states: torch.Tensor,
    *,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    past_key_values: object = None,
    **_: Any,
) -> torch.Tensor:
    """Run the layers in order on `[1, T, n]`; cosines and sines are `[1, T, rotary]`.

    Outside a step, the tokens are one sequence from its start.
    """
    if past_key_values is not None:
        raise ValueError("native layers take no cache other than the step's slots")
    x = hidden_states.contiguous()
    step, frame = current_step(), _Frame(x, position_embeddings, layers[0])
    result, other = x.new_empty(2, *x.shape)
    for layer in layers:
        layer.compute(x, frame, step, result)
        x, result, other = result, other, result
    return x


class RotaryTable(nn.Module):
    """Cosines and sines of all positions so far, so that no step computes them again.

    Args:
        rotary: A rotary embedding with fixed frequencies.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self._tables: list[torch.Tensor] = []

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for positions `[1, T]`: each `[1, T, rotary]` in the dtype of `x`."""
        needed = int(position_ids.max()) + 1
        if not self._tables or len(self._tables[0]) < needed or self._tables[0].dtype != x.dtype:
            positions = torch.arange(max(1024, 1 << (needed - 1).bit_length()))[None]
            self._tables = [table[0] for table in self.rotary(x, position_ids=positions)]
        cos, sin = (table[position_ids] for table in self._tables)
        return cos, sin


class _Parts:
    """The modules of a layer that is built like Llama's."""

    def __init__(self, layer: nn.Module) -> None:
        from transformers.activations import ACT2FN  # noqa: PLC0415 - torch is enough elsewhere

        silus = nn.SiLU, type(ACT2FN["silu"])
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        linears = [getattr(attention, name, None) for name in names]
        linears += [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        self.norm = getattr(layer, "input_layernorm", None)
        self.mlp_norm = getattr(layer, "post_attention_layernorm", None)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.head_norms = [norm for norm in norms if norm is not None]
        used = {*linears, self.norm, self.mlp_norm, *self.head_norms}
        holders = {id(p) for module in used if module for p in module.parameters()}
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (
            cast("nn.Linear | Int8Linear", linear) for linear in linears
        )
        self.dim = getattr(attention, "head_dim", 0)
        shared = ((self.q, self.k, self.v), (self.gate, self.up))
        eps = {
            getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            for norm in (self.norm, self.mlp_norm, *self.head_norms)
        }
        if (
            not all(fits(linear) for linear in linears)
            or {id(p) for p in layer.parameters()} != holders
            or not isinstance(self.dim, int)
            or not self.dim
            or self.dim % 32
            or any(linear.out_features % 32 for linear in (self.q, self.k, self.v, self.o))
            or self.gate.out_features % 32
            or any(len({(type(x), x.bias is None) for x in xs}) > 1 for xs in shared)
            or not isinstance(getattr(mlp, "act_fn", None), silus)
            or len(eps) != 1
            or len(self.head_norms) == 1
        ):
            raise ValueError("it is not built like Llama's layers")
        self.eps = eps.pop()


def _packed(linears: Sequence[nn.Linear | Int8Linear], *, interleave: bool = False) -> PackedWeight:
    """Pack linear layers with the same input into one weight: rows in order, or 16 in turn."""

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if interleave:
            return torch.stack([t.unflatten(0, (-1, 16)) for t in tensors], 1).flatten(0, 2)
        return torch.cat(list(tensors))

    weight = joined([linear.weight.data for linear in linears])
    scales = [linear.scales for linear in linears if isinstance(linear, Int8Linear)]
    bias = [linear.bias.data for linear in linears if linear.bias is not None]
    return PackedWeight(weight, *(joined(each) if each else None for each in (scales, bias)))


def _causal(layer: LayerAttention, parts: QKV) -> torch.Tensor:
    """Attention within one sequence, like transformers' eager attention."""
    q, k, v = (t.transpose(0, 1).float() for t in parts)
    rows, group = q.shape[1], len(q) // len(k)
    scores = q @ k.repeat_interleave(group, 0).mT * layer.scale
    distance = torch.arange(rows)[:, None] - torch.arange(rows)
    hidden = (distance < 0) | (distance >= (layer.window or rows))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1).to(parts[0].dtype)
