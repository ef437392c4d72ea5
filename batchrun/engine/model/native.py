"""Native code in the places of a model's own modules, each judged before it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from batchrun.engine.cpu import layers as cpu_layers
from batchrun.engine.cpu.layers import NativeLayer
from batchrun.engine.model.fused import FusedNorm
from batchrun.engine.model.judge import check_linear, same_layer
from batchrun.engine.model.trial import decoder_layers, layer_calls

_STATIC = ("default", "linear", "llama3", "yarn")  # frequencies that depend on no sequence


def can_be_native(model: PreTrainedModel, log: Callable[[str], None]) -> bool:
    """Whether native code computes a model of this dtype here; says why not on a CPU."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return False
    reason = cpu_layers.unsupported_reason()
    if reason is not None:
        log(f"layers are computed by torch, not by native code: {reason}")
    return reason is None


def use_native_layers(model: PreTrainedModel) -> None:
    """Replace the decoder layers that native code computes the same, one after the other.

    Their old weights are dropped: there is no way back, and no moment with all weights twice.
    """
    if any(isinstance(module, cpu_layers.NativeStack) for module in model.modules()):
        return
    calls = layer_calls(model)
    if not calls:  # it is built in some way of its own
        return
    layers, attentions = decoder_layers(model)
    for i, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        try:
            native = NativeLayer(layer, i, attentions[i])
        except ValueError:
            continue
        if same_layer(native, *call):
            layers[i] = native
    all_native = [layer for layer in layers if isinstance(layer, NativeLayer)]
    shapes = {(*layer.heads, layer.dim) for layer in all_native}
    if len(all_native) == len(layers) and len(shapes) == 1:
        _join(model, layers, all_native)


def _join(model: PreTrainedModel, layers: nn.ModuleList, native: list[NativeLayer]) -> None:
    """Make one module of a model's native layers, which all get the same positions."""
    del layers[1:]
    layers[0] = cpu_layers.NativeStack(native)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if getattr(child, "rope_type", None) in _STATIC and hasattr(child, "inv_freq"):
                setattr(parent, name, cpu_layers.RotaryTable(child))


def use_native_parts(model: PreTrainedModel) -> None:
    """Replace norms and linear layers: the last ones, and those of layers built otherwise."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FusedNorm):
                child.use_native()
            elif cpu_layers.fits(child):
                native = cpu_layers.NativeLinear(cast("nn.Linear", child))
                check_linear(child, native)
                setattr(parent, name, native)
