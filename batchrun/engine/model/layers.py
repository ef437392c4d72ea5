"""Finds a model's decoder layers in a forward over a made-up sequence, and checks replacements.

A replacement must compute what the original did: a linear layer on random numbers, a decoder layer
on the input that it got, and all of them together the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from batchrun.engine.attention import QKV, LayerAttention
from batchrun.engine.model.hook import Step, attending
from batchrun.engine.model.judge import difference, tolerance

FEW_TOKENS = 17
LayerCall = tuple[torch.Tensor, dict[str, Any], torch.Tensor]  # input, keywords, output


@dataclass(frozen=True)
class Layers:
    """A model's decoder layers.

    Args:
        modules: The list of layers; empty if the model has no such list, or several.
        attention: What each layer asks of attention, by index.
        calls: How a forward calls each layer; empty if some call does not have this form.
    """

    modules: nn.ModuleList
    attention: dict[int, LayerAttention]
    calls: list[LayerCall]


class _Causal:
    """A step of one sequence; its attention need not be the model's, only the same each time."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerAttention] = {}

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        self.layers[layer_index] = layer
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in new)
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=layer.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)


@torch.inference_mode()
def logits_of(
    model: PreTrainedModel, tokens: int = FEW_TOKENS, step: Step | None = None
) -> torch.Tensor:
    """The logits after a made-up sequence of so many tokens, float32 `[V]`."""
    vocab = model.config.get_text_config().vocab_size
    positions = torch.arange(tokens, device=model.device)[None]
    with attending(step or _Causal()):
        output = model(
            input_ids=(positions + 3) * 7919 % vocab,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=torch.tensor([tokens - 1], device=model.device),
        )
    logits: torch.Tensor = output.logits[0, 0].float()
    return logits


def decoder_layers(model: PreTrainedModel) -> Layers:
    """Find a model's layers by their `layer_idx`, and run them once."""
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList)
        and [_layer_numbers(layer) for layer in m] == [{i} for i in range(len(m))]
    ]
    step, called = _Causal(), dict[nn.Module, tuple[Any, ...]]()
    hooks = [
        layer.register_forward_hook(lambda m, *call: called.update({m: call}), with_kwargs=True)
        for layers in lists
        for layer in layers
    ]
    try:
        logits_of(model, step=step)
    finally:
        for hook in hooks:
            hook.remove()
    lists = [layers for layers in lists if len(layers) == len(step.layers)]
    if len(lists) != 1:
        return Layers(nn.ModuleList(), {}, [])
    found = [called.get(layer, ((), {}, None)) for layer in lists[0]]
    calls = [(args[0], kwargs, out) for args, kwargs, out in found if args]
    whole = len(calls) == len(found) and all(isinstance(out, torch.Tensor) for _, _, out in calls)
    return Layers(lists[0], step.layers, calls if whole else [])


def _layer_numbers(layer: nn.Module) -> set[int]:
    found = (getattr(module, "layer_idx", None) for module in layer.modules())
    return {number for number in found if isinstance(number, int)}


@torch.inference_mode()
def same_layer(
    layer: nn.Module, x: torch.Tensor, kwargs: dict[str, Any], want: torch.Tensor
) -> bool:
    """Whether a decoder layer computes what another one did, to its dtype's precision.

    The error of each token is judged against how much the layer changes that token.
    """
    try:
        with attending(_Causal()):
            got = layer(x, **kwargs).float()
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments
        return False
    part = tolerance(x.dtype).layer
    off, change = (torch.linalg.vector_norm(t, dim=-1) for t in (got - want, want.float() - x))
    norm = torch.linalg.vector_norm(x.float(), dim=-1)
    return bool((off <= part * change + part / 5 * norm).all())


@torch.inference_mode()
def check_linear(linear: nn.Module, native: nn.Module, dtype: torch.dtype) -> None:
    """Raise ValueError unless both compute the same of random numbers of a dtype."""
    width = int(getattr(linear, "nx" if isinstance(linear, Conv1D) else "in_features"))
    x = torch.randn(17, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    off = difference(native(x), linear(x))
    if off > tolerance(x.dtype).linear:
        raise ValueError(f"a linear layer is off by {off:.2g} of its largest result")


def check_modules(model: PreTrainedModel, want: torch.Tensor, layers: Layers | None = None) -> None:
    """Raise ValueError unless layers and logits are still what they were.

    Args:
        model: The model, possibly changed.
        want: Its `logits_of` before.
        layers: Its layers before, to be checked one by one if their calls are known.
    """
    calls = layers.calls if layers else []
    for i, call in enumerate(calls):
        if layers and not same_layer(layers.modules[i], *call):
            raise ValueError(f"layer {i} computes something else")
    off, allowed = difference(logits_of(model), want), tolerance(model.dtype)
    most = allowed.layers if calls else allowed.modules
    if off > most:
        raise ValueError(f"logits differ by {off:.2g} of the largest, more than {most:.2g}")
