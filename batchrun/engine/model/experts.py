"""Experts whose result for a row does not depend on how many rows they get.

An implementation of transformers' experts interface: each expert multiplies its rows by native code
or in tiles, and a row's experts are added in the order of its router.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from batchrun.engine.cpu.linear import NativeLinear, fits
from batchrun.engine.model import rows
from batchrun.engine.model.judge import difference, tolerance
from batchrun.machine import MappedFiles

NAME = "batchrun"
_PACKED = "batchrun_{}"  # on a module of experts: a projection's native layers


def use_experts(model: PreTrainedModel) -> None:
    """Have a model's experts computed here, if they ask transformers' interface."""
    if _modules(model):
        model.set_experts_implementation(NAME)


@torch.inference_mode()
def use_native_experts(model: PreTrainedModel, files: MappedFiles) -> None:
    """Also pack the weights of its experts, one projection after the other.

    Args:
        model: Changed in place.
        files: Forgets the weights that were packed.

    Raises:
        ValueError: Native code computes something else.
    """
    use_experts(model)
    for module in _modules(model):
        call = _made_up(module)
        want = _experts(module, *call)
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            _pack(module, name, files)
        off = difference(_experts(module, *call), want)
        if off > tolerance(want.dtype).layer:
            raise ValueError(f"{type(module).__name__} is off by {off:.2g} of its largest result")


def _modules(model: nn.Module) -> list[Any]:
    """Modules of experts that ask transformers' interface how to compute."""
    return [m for m in model.modules() if hasattr(m, "is_transposed")]


def _pack(module: Any, name: str, files: MappedFiles) -> None:
    """Replace a projection's weights `[experts, ...]` by native layers, if they can be packed."""
    weight = getattr(module, name, None)
    if not isinstance(weight, nn.Parameter):
        return
    bias = getattr(module, f"{name}_bias", None)
    linears = []
    for expert, matrix in enumerate(weight.data.mT if module.is_transposed else weight.data):
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(matrix.contiguous(), requires_grad=False)
        if module.has_bias and bias is not None:
            linear.bias = nn.Parameter(bias.data[expert], requires_grad=False)
        if not fits(linear, linear.weight.dtype):
            return
        linears.append(NativeLinear(linear, linear.weight.dtype))
    setattr(module, _PACKED.format(name), nn.ModuleList(linears))
    files.forget(weight.data_ptr(), weight.nbytes)
    delattr(module, name)


def _experts(
    module: Any, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Apply each row's experts.

    Args:
        module: Experts as `transformers.integrations.moe` describes them.
        hidden_states: `[t, n]`.
        indices: Each row's experts, `[t, experts]`; numbers of no expert are skipped.
        weights: Their weights, likewise.

    Returns:
        `[t, n]`.
    """
    with rows.repairing():
        expert, order = indices.flatten().sort(stable=True)
        counts = expert.bincount(minlength=module.num_experts).tolist()[: module.num_experts]
        order = order[: sum(counts)]
        out = hidden_states.new_zeros(indices.numel(), hidden_states.shape[1])
        parts = zip(hidden_states[order // indices.shape[1]].split(counts), counts, strict=True)
        made = [_expert(module, i, x) for i, (x, count) in enumerate(parts) if count]
        if made:
            out[order] = torch.cat(made)
        terms = (out.view(*indices.shape, -1) * weights[..., None]).unbind(1)
        return rows.in_order(terms).to(hidden_states.dtype)


def _expert(module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """Apply one expert to rows `[t, n]`."""
    x = _projected(module, "gate_up_proj" if module.has_gate else "up_proj", expert, x)
    apply = rows.by_rows(module._apply_gate if module.has_gate else module.act_fn)
    with rows.repairing(False):
        x = apply(x)
    x = _projected(module, "down_proj", expert, x)
    if getattr(module, "has_post_expert_norm", False):
        x = cast("torch.Tensor", module.post_expert_norm(x))
    return x


def _projected(module: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    packed = getattr(module, _PACKED.format(name), None)
    if packed is not None:
        return cast("torch.Tensor", packed[expert](x))
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return rows.linear(x, weight.mT if module.is_transposed else weight, bias)


def _made_up(module: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of `_experts` that ask every expert for a row."""
    weight = getattr(module, "down_proj")  # noqa: B009 - typed as Any
    width = weight.shape[2 if module.is_transposed else 1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(module.num_experts, width, generator=generator).to(weight.dtype)
    first = torch.arange(module.num_experts)
    indices = torch.stack([first, (first + 1) % module.num_experts], 1)
    return x, indices, torch.full(indices.shape, 0.5, dtype=weight.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
