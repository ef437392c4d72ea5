"""Replacements for a model's modules that compute the same in fewer operations."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from inspect import signature
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from batchrun.engine.cpu.linear import NativeLinear, rms_norm

Undo = list[tuple[nn.Module, str, nn.Module]]  # parent, name, the module that was replaced


class MergedProjections(nn.Module):
    """The stacked weights of several linear layers, `[sum(out), in]`, and their last outputs."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        biased, inputs = parts[0].bias is not None, parts[0].in_features
        joined = nn.Linear(inputs, sum(self.sizes), biased, device="meta")
        for name in ("weight", "bias") if biased else ("weight",):
            whole = torch.cat([getattr(part, name).data for part in parts])
            setattr(joined, name, nn.Parameter(whole, requires_grad=False))
            # The old parameters become views, so that no layer's weights exist twice.
            for part, view in zip(parts, whole.split(self.sizes), strict=True):
                getattr(part, name).data = view
        self.joined: nn.Linear | NativeLinear = joined
        self.input: torch.Tensor | None = None
        self.products: tuple[torch.Tensor, ...] = ()

    def forward(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Part `index` of the output: computed for the first part, kept until the last."""
        if index == 0 or x is not self.input:
            products = self.joined(x).split(self.sizes, dim=-1)
            self.input, self.products = x, products
        product: torch.Tensor = self.products[index]
        if index == len(self.sizes) - 1:
            self.input, self.products = None, ()
        return product


class Projection(nn.Module):
    """Stands in for one of the merged linear layers."""

    def __init__(self, merged: MergedProjections, index: int) -> None:
        super().__init__()
        self.merged = merged
        self.index = index

    @property
    def weight(self) -> torch.Tensor:
        """This layer's rows, `[out, in]`, for models that read their dtype."""
        parts: tuple[torch.Tensor, ...] = self.merged.joined.weight.split(self.merged.sizes)
        return parts[self.index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`, a view of the merged output."""
        return cast("torch.Tensor", self.merged(self.index, x))


def merge_projections(model: nn.Module, forward: Callable[[], object], undo: Undo) -> None:
    """Merge a module's linear layers that get the very same tensor in a forward pass.

    Peak memory is the model plus the largest merged weight.

    Args:
        model: Changed in place.
        forward: Runs the model once.
        undo: Replaced modules are appended here.
    """
    for parent, names in _shared_inputs(model, forward):
        parts = [getattr(parent, name) for name in names]
        merged = MergedProjections(parts)
        for index, name in enumerate(names):
            undo.append((parent, name, parts[index]))
            setattr(parent, name, Projection(merged, index))


def _shared_inputs(
    model: nn.Module, forward: Callable[[], object]
) -> Iterator[tuple[nn.Module, list[str]]]:
    """Modules and the names of their linear layers that share an input, in call order."""
    places = defaultdict(list)
    for parent in model.modules():
        for name, child in parent.named_children():
            places[child].append((parent, name))
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    inputs: dict[nn.Module, list[torch.Tensor]] = defaultdict(list)
    with ExitStack() as hooks:
        for module in places:
            if _is_plain_linear(module) and owners[id(module.weight)] == 1:
                note = module.register_forward_pre_hook(lambda m, args: inputs[m].append(args[0]))
                hooks.callback(note.remove)
        forward()
    groups: dict[tuple[Any, ...], list[tuple[nn.Module, str]]] = defaultdict(list)
    for linear, (x, *more) in inputs.items():
        if not more and len(places[linear]) == 1:
            parent, name = places[linear][0]
            weight: Any = linear.weight
            key = (parent, id(x), weight.dtype, weight.device, linear.bias is None)
            groups[key].append((parent, name))
    for group in groups.values():
        if len(group) > 1:
            yield group[0][0], [name for _, name in group]


def _is_plain_linear(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


class FusedNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) by torch's own kernel.

    Args:
        weight: `[n]`, the model's own parameter.
        eps: Added to the mean square.
        offset: Added to the weight: 1 in Gemma.
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: int) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.offset = offset
        self._native: torch.Tensor | None = None

    def use_native(self) -> None:
        """Use native code, on a CPU, if the width is a multiple of 32."""
        if len(self.weight) % 32 == 0:
            self._native = self.weight.data.float() + self.offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., n]` to the same."""
        weight = self.weight
        if self._native is not None:
            return rms_norm(x, self._native, self.eps)
        if not self.offset and weight.dtype == x.dtype:
            return functional.rms_norm(x, weight.shape, weight, self.eps)
        # As Gemma does, in float32: 1 + weight would lose bits of a half-precision weight.
        normed = functional.rms_norm(
            x.float(), weight.shape, weight.float() + self.offset, self.eps
        )
        return normed.to(x.dtype)


def fuse_norms(model: nn.Module, undo: Undo) -> None:
    """Replace modules that prove to be RMS norms, scaled by their weight or by 1 + weight.

    Args:
        model: Changed in place.
        undo: Replaced modules are appended here.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            norm = _as_norm(child)
            if norm is not None:
                undo.append((parent, name, child))
                setattr(parent, name, norm)


def _as_norm(module: nn.Module) -> FusedNorm | None:
    """The module as a fused norm; None unless both agree on random weights and rows."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if (
        isinstance(module, (FusedNorm, nn.LayerNorm, nn.RMSNorm))
        or not isinstance(eps, float)
        or not isinstance(weight, nn.Parameter)
        or weight.ndim != 1
        or len(list(module.parameters())) != 1
        or list(module.buffers())
        or len(signature(module.forward).parameters) != 1
    ):
        return None
    draw = torch.Generator().manual_seed(0)
    probe = deepcopy(module).to("cpu", torch.float32)
    drawn = nn.Parameter(torch.randn(weight.shape, generator=draw), requires_grad=False)
    probe.weight = drawn
    rows = torch.randn(6, len(weight), generator=draw) + 0.3
    rows *= torch.tensor([1e-3, 3e-3, 0.1, 1, 10, 300])[:, None]
    with torch.inference_mode():
        want = probe(rows)
        for offset in (0, 1):
            if torch.allclose(FusedNorm(drawn, eps, offset)(rows), want, rtol=1e-4, atol=1e-5):
                return FusedNorm(weight, eps, offset)
    return None
