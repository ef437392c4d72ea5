"""The function that takes a model's attention over, and how a step's calls reach it."""

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
# Tensors that models hand to every attention function and that causal attention does not need.
_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "logits_to_keep"}
_BESIDE = "batchrun_beside"  # on a model: its step does not go through its calls
_INDEX = "batchrun_index"  # on an attention module: its number among those with keys and values
_SEEN = "batchrun_seen"  # on an attention module: which keys its queries see


class Step(Protocol):
    """What the hook calls: attention of the step that is being computed."""

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        """Attend one layer, to `[T, Hq, Dv]`."""


class UnsupportedError(Exception):
    """The hook met something it would compute wrongly."""


# Beside a forward: not every model passes keyword arguments on to its attention.
_STEP: ContextVar[Step | None] = ContextVar("batchrun_step", default=None)


def current_step() -> Step | None:
    """The step that is computed now."""
    return _STEP.get()


@contextmanager
def attending(step: Step) -> Iterator[None]:
    """In this block, hooked models attend by a step."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


# --- in a compiled layer ---

# The layer that runs: a graph can't hold its number, or each layer would need a graph of its own.
LAYER: ContextVar[tuple[int, LayerAttention]] = ContextVar("batchrun_layer")
_LIBRARY = torch.library.Library("batchrun", "FRAGMENT")
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value) -> Tensor",
    tags=[torch.Tag.needs_exact_strides],
)


def _packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> QKV:
    return query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Tensors `[1, H, T, D]` as transformers has them, to `[1, T, Hq, Dv]`."""
    step = current_step()
    assert step is not None
    return step.attend(*LAYER.get(), _packed(query, key, value))[None].contiguous()


def _attend_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("batchrun::attend", _attend_shape, lib=_LIBRARY)


# --- in any other one ---


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Have a model attend by another implementation, also one that does not declare it can."""
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
    """The attention function that transformers calls in every layer, tensors `[1, H, T, D]`."""
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
        raise UnsupportedError(f"{reason}, which contiguous-slot attention does not know")
    if isinstance(step, Probe):
        step.look_at(module, index, attention_mask, sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    seen: Seen = getattr(module, _SEEN, None) or Seen(window=sliding_window or None)
    layer = LayerAttention(scale, seen.window, softcap, s_aux, seen.chunk)
    return step.attend(index, layer, _packed(query, key, value))[None], None


class Probe:
    """A step that records what each layer asks for, and computes nothing.

    Args:
        context: Tokens of a sequence at most.

    Attributes:
        makes_masks: Whether the forward is under the attention `PROBE`, whose masks are read.
        hits: The number of each layer that has attended, as often as it did.
        layers: What each asks for.
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
        """Note which keys a layer's queries see, by its mask where there is one.

        Raises:
            UnsupportedError: The layer says one thing, and its mask another.
        """
        told = Seen(window=window or None).within(self._context)
        found = seen_by(mask)
        seen = told if found is None else found.within(self._context)
        if told.window is not None and seen != told:
            raise UnsupportedError(
                f"layer {index} asks for a window of {told.window} tokens, and its own mask "
                f"for {'all' if seen == Seen() else seen.window or seen.chunk}"
            )
        if mask is not None or not hasattr(module, _SEEN):
            setattr(module, _SEEN, seen)
        self._modules[index] = module

    def renumber(self) -> None:
        """Number the layers that ran from 0 on, where a model has others that never do."""
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
