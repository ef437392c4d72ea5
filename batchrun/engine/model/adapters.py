"""Adapts models whose own code bypasses transformers' attention interface, to call our hook.

Adapters change only the method that attends, or its arguments; weights, projections and rotary
embeddings stay the model's. Outside a step the model computes as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from batchrun.engine.model.hook import UnsupportedError, current_step, hook

_ADAPTED = "batchrun_adapted"


def adapt(model: PreTrainedModel) -> None:
    """Adapt the modules of a model that need it, once."""
    if is_adapted(model):
        return
    for name, adapter in _ADAPTERS.items():
        found = [module for module in model.modules() if type(module).__name__ == name]
        for index, module in enumerate(found):
            adapter(module, index, model.config)
            setattr(model, _ADAPTED, True)


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters: its layers then use outside state and can't be graphs."""
    return hasattr(model, _ADAPTED)


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Call our hook on `[1, H, T, D]`; returns the same shape."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    return hook(module, query, key, value, None, **options)[0].transpose(1, 2)


def _replace_attn(module: Any, index: int, config: Any) -> None:
    """GPT-J and models like it: `_attn` gets finished queries, keys and values."""
    own: Callable[..., Any] = module._attn
    options: dict[str, Any] = {"scaling": 1 / float(getattr(module, "scale_attn", 1.0))}
    if getattr(module, "attention_type", None) == "local":  # GPT-Neo, every other layer
        options["sliding_window"] = config.window_size

    def attn(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None
    ) -> Any:
        if current_step() is None:
            return own(query, key, value, attention_mask)
        return _attend(module, query, key, value, **options), None

    module.layer_idx, module._attn = index, attn


def _replace_falcon(module: Any, *_: Any) -> None:
    """Falcon: keep one key per group of heads; its own code repeats them."""
    own: Callable[..., Any] = module.forward
    rotate: Callable[..., Any] = sys.modules[type(module).__module__].apply_rotary_pos_emb

    def forward(
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None = None,
        *args: Any,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        if current_step() is None:
            kwargs["position_embeddings"] = position_embeddings
            return own(hidden_states, alibi, *args, **kwargs)
        if alibi is not None:
            raise UnsupportedError("it adds ALiBi to its scores")
        split = module._split_heads(module.query_key_value(hidden_states))
        query, key, value = (tensor.transpose(1, 2) for tensor in split)
        if module.new_decoder_architecture:
            each = module.num_heads // module.num_kv_heads
            key, value = key[:, ::each], value[:, ::each]
        query, key = rotate(query, key, *position_embeddings)
        out = _attend(module, query, key, value).transpose(1, 2)
        return module.dense(out.flatten(2)), None

    module.forward = forward


class _Before:
    """Stands in for a cache, to tell each token of a step how many tokens precede it."""

    def __init__(self, positions: torch.Tensor) -> None:
        self._before = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, _: int = 0) -> torch.Tensor:
        """`[T]`: each token's position less its index in the step, which the caller adds."""
        return self._before

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
        """Store nothing."""
        return key, value


def _tune_by_position(layer: Any, *_: Any) -> None:
    """Llama 4: layers without rotary embeddings scale queries by the tokens in the cache."""

    def tell(_: object, args: Any, kwargs: dict[str, Any]) -> Any:
        if current_step() is None:
            return args, kwargs
        return args, {**kwargs, "past_key_values": _Before(kwargs["position_ids"][0])}

    if layer.self_attn.attn_temperature_tuning and not layer.self_attn.use_rope:
        layer.register_forward_pre_hook(tell, with_kwargs=True)


_ADAPTERS: dict[str, Callable[[Any, int, Any], None]] = {
    "CodeGenAttention": _replace_attn,
    "FalconAttention": _replace_falcon,
    "GPTJAttention": _replace_attn,
    "GPTNeoSelfAttention": _replace_attn,
    "Llama4TextDecoderLayer": _tune_by_position,
}
