"""The function that takes a model's attention over, and how a step's calls reach it."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel

from batchrun.engine.attention import QKV, LayerAttention, LayerSpec
from batchrun.engine.model.masks import PROBE, Masks, Seen

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


class StepLostError(UnsupportedError):
    """The hook was called without the step."""


_STEP: ContextVar[Step | None] = ContextVar("batchrun_step", default=None)

# --- in a compiled layer ---

# The call that the attention operator of the running layer stands for: a graph can hold neither
# the step nor the layer's number, or each layer would need a graph of its own.
CALL: ContextVar[tuple[Step, int, LayerAttention]] = ContextVar("batchrun_attention_call")
_LIBRARY = torch.library.Library("batchrun", "FRAGMENT")
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value) -> Tensor",
    tags=[torch.Tag.needs_exact_strides],
)


def _packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> QKV:
    return query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Tensors `[1, H, T, D]` as transformers has them, to `[1, T, Hq, Dv]`."""
    step, index, layer = CALL.get()
    return step.attend(index, layer, _packed(query, key, value))[None].contiguous()


def _attend_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("batchrun::attend", _attend_shape, lib=_LIBRARY)


class Traced:
    """Stands for the step while a layer is compiled: one object, so that all layers look alike."""


TRACED = Traced()

# --- in any other one ---


def current_step() -> Step | None:
    """The step that is computed now, of a model that does not pass it on: see `tell_beside`."""
    return _STEP.get()


def tell_beside(model: PreTrainedModel) -> None:
    """Keep a forward's `batchrun_step` beside it, for a model that does not pass it on."""
    if hasattr(model, _BESIDE):
        return
    setattr(model, _BESIDE, True)
    tokens: list[Token[Step | None]] = []

    def enter(_: object, args: Any, kwargs: dict[str, Any]) -> Any:
        tokens.append(_STEP.set(kwargs.pop("batchrun_step", None)))
        return args, kwargs

    def leave(*_: object) -> None:
        _STEP.reset(tokens.pop())

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave, always_call=True)


def is_told_beside(model: PreTrainedModel) -> bool:
    """Whether its layers are not told of the step: they can't be compiled."""
    return hasattr(model, _BESIDE)


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
    batchrun_step: Step | Traced | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in every layer, tensors `[1, H, T, D]`."""
    if isinstance(batchrun_step, Traced):
        return torch.ops.batchrun.attend(query, key, value), None
    step = batchrun_step or current_step()
    unknown = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and k not in _HARMLESS]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    index = getattr(module, _INDEX, getattr(module, "layer_idx", None))
    reason = None
    if step is None:
        raise StepLostError("it does not pass keyword arguments on to its attention")
    if attention_mask is not None and not (isinstance(step, Probe) and step.masks.wanted):
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
    """

    def __init__(self, context: int) -> None:
        self.masks = Masks(context)
        self.hits: list[int] = []
        self.layers: dict[int, LayerSpec] = {}
        self._modules: dict[int, torch.nn.Module] = {}
        self._context = context

    def look_at(
        self,
        module: torch.nn.Module,
        index: int,
        mask: torch.Tensor | None,
        window: int | None,
    ) -> None:
        """Note which keys a layer's queries see, by its mask where there is one.

        Raises:
            UnsupportedError: The layer says one thing, and its mask another.
        """
        told = Seen(window=window or None).within(self._context)
        found = self.masks.seen(mask)
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
        self.layers[layer_index] = LayerSpec(
            q_heads=query.shape[1],
            kv_heads=key.shape[1],
            k_dim=key.shape[2],
            v_dim=value.shape[2],
            scale=layer.scale,
            window=layer.window,
            softcap=layer.softcap,
            sinks=layer.sinks is not None,
            chunk=layer.chunk,
        )
        return value.new_zeros(*query.shape[:2], value.shape[2])


for _name in (HOOK, PROBE):
    AttentionInterface.register(_name, hook)
