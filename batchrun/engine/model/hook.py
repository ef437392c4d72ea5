"""The hook that takes over a model's attention, and how its calls reach the current step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel

from batchrun.engine.attention import QKV, LayerAttention, LayerSpec
from batchrun.engine.model.masks import PROBE, Seen, make_masks, seen_by

HOOK = "batchrun"
# Tensors that models pass to every attention function and that causal attention does not need.
_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "logits_to_keep"}
_INDEX = "batchrun_index"  # on an attention module: its index among those with keys and values
_SEEN = "batchrun_seen"  # on an attention module: which keys its queries see


class Step(Protocol):
    """The attention of the step being computed, which the hook calls."""

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        """Compute one layer's attention, `[T, Hq, Dv]`."""


class UnsupportedError(Exception):
    """The hook met something it would compute wrongly."""


# Not an argument of the forward: not every model passes keywords on to its attention.
_STEP: ContextVar[Step | None] = ContextVar("batchrun_step", default=None)


def current_step() -> Step | None:
    """The step being computed; None outside a step."""
    return _STEP.get()


@contextmanager
def attending(step: Step) -> Iterator[None]:
    """Within this block, hooked models attend through `step`."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


# --- in a compiled layer ---

# The running layer. A graph can't hold its index, or each layer would need its own graph.
LAYER: ContextVar[tuple[int, LayerAttention]] = ContextVar("batchrun_layer")
_LIBRARY = torch.library.Library("batchrun", "FRAGMENT")
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value) -> Tensor",
    tags=[torch.Tag.needs_exact_strides],
)


def _packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> QKV:
    return query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend with tensors `[1, H, T, D]`, as transformers has them, to `[1, T, Hq, Dv]`."""
    step = current_step()
    assert step is not None
    return step.attend(*LAYER.get(), _packed(query, key, value))[None].contiguous()


def _attend_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("batchrun::attend", _attend_shape, lib=_LIBRARY)


# --- in any other layer ---


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Switch a model's attention implementation, even if it does not declare support for that."""
    if type(model)._supports_attention_backend:
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation = name


def hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in every layer; tensors `[1, H, T, D]`."""
    if torch.compiler.is_compiling():
        return torch.ops.batchrun.attend(query, key, value), None
    step = current_step()
    unknown = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and k not in _HARMLESS]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    index = getattr(module, _INDEX, getattr(module, "layer_idx", None))
    reason = None
    if step is None:
        raise UnsupportedError("it attends outside of a step")
    if attention_mask is not None and not (isinstance(step, Probe) and step.makes_masks):
        reason = "it makes an attention mask of its own"
    elif unknown:
        reason = f"its attention takes {', '.join(unknown)}"
    elif not causal:
        reason = "its attention is not causal"
    elif index is None:
        reason = "its attention modules do not know their layer"
    elif key.shape[2] != query.shape[2] or value.shape[2] != query.shape[2]:
        reason = f"it has {key.shape[2]} keys for {query.shape[2]} tokens"
    if reason is not None or index is None:
        raise UnsupportedError(f"{reason}, which contiguous-slot attention does not support")
    if isinstance(step, Probe):
        step.look_at(module, index, attention_mask, sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    seen: Seen = getattr(module, _SEEN, None) or Seen(window=sliding_window or None)
    layer = LayerAttention(scale, seen.window, softcap, s_aux, seen.chunk)
    return step.attend(index, layer, _packed(query, key, value))[None], None


class Probe:
    """A step that records what each layer asks for, and computes nothing.

    Args:
        context: Maximum tokens of a sequence.

    Attributes:
        makes_masks: Whether the forward runs with the attention `PROBE`, whose masks are read.
        hits: The layer index of each call so far.
        layers: What each layer asks for, by index.
    """

    def __init__(self, context: int) -> None:
        make_masks(context)
        self.makes_masks = True
        self.hits: list[int] = []
        self.layers: dict[int, LayerSpec] = {}
        self._modules: dict[int, torch.nn.Module] = {}
        self._context = context

    def look_at(
        self, module: torch.nn.Module, index: int, mask: torch.Tensor | None, window: int | None
    ) -> None:
        """Note which keys a layer's queries see, from its mask if it has one.

        Raises:
            UnsupportedError: The layer and its mask disagree.
        """
        told = Seen(window=window or None).within(self._context)
        found = seen_by(mask)
        seen = told if found is None else found.within(self._context)
        if told.window is not None and seen != told:
            raise UnsupportedError(
                f"layer {index} asks for a window of {told.window} tokens, but its own mask "
                f"for {'all' if seen == Seen() else seen.window or seen.chunk}"
            )
        if mask is not None or not hasattr(module, _SEEN):
            setattr(module, _SEEN, seen)
        self._modules[index] = module

    def renumber(self) -> None:
        """Number from 0 the layers that ran, for models with layers that never run."""
        self.layers = {i: self.layers[old] for i, old in enumerate(sorted(self.layers))}
        for i, old in enumerate(sorted(self._modules)):
            setattr(self._modules[old], _INDEX, i)

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        """See `Step.attend`; the result is zeros."""
        query, key, value = new
        self.hits.append(layer_index)
        shape = query.shape[1], key.shape[1], key.shape[2], value.shape[2]
        self.layers[layer_index] = LayerSpec(
            *shape, layer.scale, layer.window, layer.softcap, layer.sinks is not None, layer.chunk
        )
        return value.new_zeros(*query.shape[:2], value.shape[2])


for _name in (HOOK, PROBE):
    AttentionInterface.register(_name, hook)
