"""Whether a loaded model is whole: all its weights came from its files, and all are finite.

transformers gives tensors that are missing random numbers, which answer as any others do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from batchrun.errors import ModelError
from batchrun.models import kinds
from batchrun.models.metadata import some

_CHUNK = 1 << 20  # elements looked at together: what is made of them stays in a core's cache
# What quantised weights are multiplied by. Without it they are other numbers.
_SCALES = re.compile(r"(_scale(_inv|_2)?|\.scales|\.biases|\.absmax|_quant_state\.\w+)$")
# Buffers that models used to save, and layers that only propose tokens ahead.
_HARMLESS = re.compile(r"inv_freq$|\.masked_bias$|attn\.bias$|attention\.bias$|(^|\.)mtp")


def check_whole(model: PreTrainedModel, info: Mapping[str, Any], name: str) -> list[str]:
    """Refuse a model whose weights its files did not wholly fill.

    Args:
        model: It, just loaded.
        info: What `from_pretrained` said of it with `output_loading_info`. Tied weights,
            buffers that are computed, and what the architecture can do without are not in it.
        name: What to call it in messages.

    Returns:
        What the user should know, a sentence each.

    Raises:
        ModelError: Tensors are missing, of another shape, or lack their scales.
    """
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    kind, quantised = type(model).__name__, getattr(model, "hf_quantizer", None) is not None
    if info["mismatched_keys"]:
        wrong = sorted(info["mismatched_keys"])
        listed = [f"{key} is {_shape(got)} and not {_shape(want)}" for key, got, want in wrong]
        raise ModelError(
            f"the weights of the model {name} do not fit its config.json: {some(listed)}",
            hint=kinds.UNQUANTISED if quantised else _config_hint(model, wrong),
        )
    if missing:
        raise ModelError(
            f"the weights of the model {name} lack {len(missing):,} of the "
            f"{len(model.state_dict()):,} tensors of {kind}: {some(missing)}",
            hint=_missing_hint(missing, extra),
        )
    scales = [key for key in extra if _SCALES.search(key)]
    if scales and not quantised:
        raise ModelError(
            f"the weights of the model {name} are quantised and its config.json does not say how "
            f"in a way that transformers knows: nothing takes {some(scales)}",
            hint=kinds.UNQUANTISED,
        )
    extra = [key for key in extra if not _HARMLESS.search(key)]
    if not extra:
        return []
    return [f"{len(extra):,} tensors of the weights are not used by {kind}: {some(extra)}"]


def _config_hint(model: PreTrainedModel, wrong: list[tuple[str, Any, Any]]) -> str:
    rows = {
        got[0] for _, got, want in wrong if want[0] == model.config.get_text_config().vocab_size
    }
    if len(rows) == 1 and all(got[1:] == want[1:] for _, got, want in wrong):
        return f'its config.json should say "vocab_size": {rows.pop()}, as its weights do'
    return "use the config.json that came with the weights"


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a number"


def _missing_hint(missing: list[str], extra: list[str]) -> str:
    prefix = next((key[: -len(missing[0])] for key in extra if key.endswith(missing[0])), "")
    if prefix.endswith(".") and {prefix + key for key in missing} <= set(extra):
        return (
            f"they are there as {prefix}{missing[0]} and so on: save the weights again without "
            "that prefix, from the model that was trained and not from what was wrapped around it"
        )
    if missing == ["lm_head.weight"]:
        return (
            "it has no head to predict tokens with: use the model that it was made from; if its "
            'head is its embedding, say so in config.json: "tie_word_embeddings": true'
        )
    return "download or copy it again, or save it again with all its weights"


def check_finite(model: nn.Module) -> None:
    """Refuse weights with a NaN or an infinity in them, which every answer would be made of.

    Takes little memory, and about as long as reading the weights once.

    Raises:
        ModelError: The message names the tensors.
    """
    bad = {key: tensor for key, tensor in model.state_dict().items() if not _finite(tensor)}
    if not bad:
        return
    counts = {key: sum(int((~p.isfinite()).sum()) for p in _pieces(t)) for key, t in bad.items()}
    listed = [
        f"{key} has {n:,} value{'s that are' if n > 1 else ' that is'} not finite"
        for key, n in counts.items()
    ]
    narrow = all(t.dtype == torch.float16 for t in bad.values())
    raise ModelError(
        f"the weights are damaged: {some(listed)}",
        hint="float16 ends at 65,504: --dtype bfloat16 or --dtype float32 may hold them"
        if narrow
        else "download or copy the model again; if that is how it was saved, it is broken",
    )


def _finite(tensor: torch.Tensor) -> bool:
    if type(tensor) not in {torch.Tensor, nn.Parameter} or not tensor.is_floating_point():
        return True
    # A zero times what is not finite is NaN; `isfinite` takes 20 times as long.
    sums = [(piece * 0).sum() for piece in _pieces(tensor)]
    return not bool(torch.stack(sums).isnan().any()) if sums else True


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    for piece in tensor.detach().reshape(-1).split(_CHUNK):
        yield piece.float() if piece.itemsize == 1 else piece
