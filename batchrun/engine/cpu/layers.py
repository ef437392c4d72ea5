"""Decoder layers by our own native code: layers_bf16.cpp, or else layers.cpp.

Two calls with attention between them replace some thirty operators: norm, projections and rotary
embedding; then output projection, norm, gated MLP and both residual sums.

Each row's result depends on that row alone, not on the batch or the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from batchrun.engine.cpu.library import Finish, Project, arithmetic
from batchrun.engine.cpu.linear import fits, pack
from batchrun.engine.model.hook import Step, current_step

if TYPE_CHECKING:
    from batchrun.engine.attention import QKV, LayerAttention
    from batchrun.engine.model.int8 import Int8Linear


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
        found = arithmetic(parts.dtype)
        self.layer_idx = index
        self.attention = attention
        dim = self.dim = parts.dim
        self.heads = [linear.out_features // dim for linear in (parts.q, parts.k, parts.v)]
        norms: list[Any] = [parts.norm, parts.mlp_norm, *parts.head_norms]
        self._norms = [norm.weight.data.float() for norm in norms]
        self._weights = [
            pack([parts.q, parts.k, parts.v], found.level),
            pack([parts.o], found.level),
            pack([parts.gate, parts.up], found.level, interleave=True),
            pack([parts.down], found.level),
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
            level=found.level,
        )
        self._finish = Finish(
            *matrices[1:], norm=self._norms[1].data_ptr(), eps=parts.eps, level=found.level
        )
        self._first, self._second = found.function("project"), found.function("finish")

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
        self._first(ctypes.byref(call))
        if step is None:
            attended = _causal(self.attention, frame.parts)
        else:
            attended = step.attend(self.layer_idx, self.attention, frame.parts)
        attended = attended.contiguous()
        last.attended = attended.data_ptr()
        self._second(ctypes.byref(last))


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
        self.dtype = getattr(getattr(self.norm, "weight", None), "dtype", torch.float32)
        shared = ((self.q, self.k, self.v), (self.gate, self.up))
        eps = {
            getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            for norm in (self.norm, self.mlp_norm, *self.head_norms)
        }
        if (
            not all(fits(linear, self.dtype) for linear in linears)
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


def _causal(layer: LayerAttention, parts: QKV) -> torch.Tensor:
    """Attention within one sequence, like transformers' eager attention."""
    q, k, v = (t.transpose(0, 1).float() for t in parts)
    rows, group = q.shape[1], len(q) // len(k)
    scores = q @ k.repeat_interleave(group, 0).mT * layer.scale
    distance = torch.arange(rows)[:, None] - torch.arange(rows)
    hidden = (distance < 0) | (distance >= (layer.window or rows))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1).to(parts[0].dtype)
