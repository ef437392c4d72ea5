"""Checks that a model is what its files hold: no larger, nothing missing, and all of it finite.

transformers fills what the files lack with random numbers, and such a model answers like any other.
A config with a hundred times the vocabulary would have them made before anything is compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registry
from transformers import PreTrainedModel

from batchrun.errors import ModelError
from batchrun.models import kinds
from batchrun.models.files import Stored, some

# How much larger than its files a model may be built: layers share tensors, and smaller mismatches
# are reported by the names of tensors once it is built.
_TIMES = 4
_MORE_WEIGHTS = 1 << 26
_MORE_BUFFERS = 1 << 30  # bytes
_MODULES = 64  # per tensor
_MORE_MODULES = 2_000

_CHUNK = 1 << 20  # elements checked together: intermediate results stay in a core's cache
# Scales of quantised weights, which are wrong without them.
_SCALES = re.compile(r"(_scale(_inv|_2)?|\.scales|\.biases|\.absmax|_quant_state\.\w+)$")
# Buffers that models used to save, and layers that only propose draft tokens.
_HARMLESS = re.compile(r"inv_freq$|\.masked_bias$|attn\.bias$|attention\.bias$|(^|\.)mtp")


@contextmanager
def bounded(stored: Collection[Stored], *, quantised: bool) -> Iterator[None]:
    """While modules are built, count them, their parameters and their buffers.

    Args:
        stored: All tensors of the files.
        quantised: Whether one number in them may hold several weights.

    Raises:
        ModelError: There are far more than the files can fill.
    """
    nbytes = sum(tensor.nbytes for tensor in stored)
    held = nbytes * 8 if quantised else sum(tensor.elements for tensor in stored)

    def counter(what: str, most: int, size: Callable[[Any], int]) -> Callable[..., None]:
        count = 0

        def add(_: nn.Module, __: str, part: Any) -> None:
            nonlocal count
            count += 0 if part is None else size(part)
            if count > most:
                raise ModelError(
                    f"the config.json is another model's: it asks for {count:,} {what} or more, "
                    f"but the files have {len(stored):,} tensors of {held:,} weights",
                    hint="use the config.json that came with the weights",
                )

        return add

    modules = counter("modules", _MODULES * len(stored) + _MORE_MODULES, lambda _: 1)
    weights = counter("weights", _TIMES * held + _MORE_WEIGHTS, torch.Tensor.numel)
    buffers = counter("bytes of constants", nbytes + _MORE_BUFFERS, lambda buffer: buffer.nbytes)
    with ExitStack() as hooks:
        for handle in (
            registry.register_module_module_registration_hook(modules),
            registry.register_module_parameter_registration_hook(weights),
            registry.register_module_buffer_registration_hook(buffers),
        ):
            hooks.callback(handle.remove)
        yield


def check_whole(model: PreTrainedModel, info: Mapping[str, Any], name: str) -> list[str]:
    """Refuse a model whose files did not fill all its weights.

    Args:
        model: The model, just loaded.
        info: What `from_pretrained` returned with `output_loading_info`. It leaves out tied
            weights, computed buffers, and what the architecture can do without.
        name: What to call it in messages.

    Returns:
        What the user should know, one sentence each.

    Raises:
        ModelError: Tensors are missing or of another shape, or nothing uses their scales.
    """
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    kind, quantised = type(model).__name__, getattr(model, "hf_quantizer", None) is not None
    if wrong := sorted(info["mismatched_keys"]):
        listed = [f"{key} is {_shape(got)}, not {_shape(want)}" for key, got, want in wrong]
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
            f"the weights of the model {name} are quantised, but its config.json does not say how "
            f"in a way that transformers knows: nothing uses {some(scales)}",
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
            f"they are stored as {prefix}{missing[0]} and so on: save the weights again without "
            "that prefix, from the trained model itself and not from its wrapper"
        )
    if missing == ["lm_head.weight"]:
        return (
            "it has no head to predict tokens with: use the model that it was made from; if its "
            'head is its embedding, say so in config.json: "tie_word_embeddings": true'
        )
    return "download or copy it again, or save it again with all its weights"


def check_finite(model: nn.Module) -> None:
    """Refuse weights with a NaN or an infinity in them, which would spoil every answer.

    Takes little memory, and about as long as reading the weights once.

    Raises:
        ModelError: The message names the tensors.
    """
    bad = {key: tensor for key, tensor in model.state_dict().items() if not _finite(tensor)}
    if not bad:
        return
    listed = []
    for key, tensor in bad.items():
        n = sum(int((~piece.isfinite()).sum()) for piece in _pieces(tensor))
        listed.append(f"{key} has {n:,} value{'s that are' if n > 1 else ' that is'} not finite")
    hint = "download or copy the model again; if that is how it was saved, it is broken"
    if all(tensor.dtype == torch.float16 for tensor in bad.values()):
        hint = "float16 holds at most 65,504: try --dtype bfloat16 or --dtype float32"
    raise ModelError(f"the weights are damaged: {some(listed)}", hint=hint)


def _finite(tensor: torch.Tensor) -> bool:
    if type(tensor) not in {torch.Tensor, nn.Parameter} or not tensor.is_floating_point():
        return True
    # Zero times a number that is not finite is NaN; `isfinite` takes 20 times as long.
    sums = [(piece * 0).sum() for piece in _pieces(tensor)]
    return not sums or not bool(torch.stack(sums).isnan().any())


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    for piece in tensor.detach().reshape(-1).split(_CHUNK):
        yield piece.float() if piece.itemsize == 1 else piece
