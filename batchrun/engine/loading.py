"""Loads weights and tokenizer, and refuses those that are not whole.

transformers gives tensors that are missing random numbers, which answer as any others do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from batchrun import kinds
from batchrun.engine.bounded import bounded
from batchrun.engine.int8_gpu import why_not
from batchrun.engine.model import LoadedModel, prepare
from batchrun.engine.quantize import int8_weights
from batchrun.engine.reading import TOKENIZER, reading
from batchrun.errors import ModelError
from batchrun.headers import Stored
from batchrun.machine import multiplies_bfloat16
from batchrun.papers import some
from batchrun.tokenizer_files import named_elsewhere
from batchrun.weights import check_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHUNK = 1 << 20  # elements looked at together: what is made of them stays in a core's cache
# What quantised weights are multiplied by. Without it they are other numbers.
_SCALES = re.compile(r"(_scale(_inv|_2)?|\.scales|\.biases|\.absmax|_quant_state\.\w+)$")
# Buffers that models used to save, and layers that only guess tokens ahead.
_HARMLESS = re.compile(r"inv_freq$|\.masked_bias$|attn\.bias$|attention\.bias$|(^|\.)mtp")


def load(
    path: str,
    *,
    name: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    max_model_len: int | None = None,
) -> LoadedModel:
    """Load model and tokenizer from a local folder or a hub id.

    Args:
        path: A folder with safetensors weights, or a hub id.
        name: What to call it in messages.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: on a GPU the config's; on a CPU bfloat16
            where it has instructions for it, else float32.
        quantize: `int8` for weights of 8 bits, or None.
        device: A torch device.
        trust_remote_code: Whether the model's own Python code may run.
        max_model_len: Context length wanted; the model's own bounds it.

    Raises:
        ModelError: It can't be loaded, lacks weights, or its architecture is refused.
    """
    name = name or path
    stored = stored_in_folder(Path(path))
    config, tokenizer = read_papers(path, name, trust_remote_code=trust_remote_code)
    wanted = choose_dtype(dtype, config, device)
    with reading(name, path), fitting(config, stored):
        read: Any = class_for(config).from_pretrained(
            path,
            config=config,
            dtype=wanted,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    model, info = read
    notes = check_whole(model, info, name)
    notes += _widen(model, config, wanted)
    if quantize:
        int8_weights(model)
    model = model.to(device)
    loaded = prepare(model, tokenizer, max_model_len=max_model_len)
    reason = why_not(loaded.device, wanted) if quantize and loaded.device.type == "cuda" else None
    if reason is not None:
        notes.append(
            f"weights of 8 bits save memory and cost time here: each step widens them, as {reason}"
        )
    return replace(loaded, notes=(*loaded.notes, *notes))


def stored_in_folder(folder: Path) -> Mapping[str, Stored]:
    """The tensors of a folder's weights, which are looked at again: days may have passed.

    Raises:
        ModelError: It has no safetensors, or they would be loaded from elsewhere.
    """
    if not folder.is_dir():
        return {}
    stored = check_files(folder, kinds.read_config(folder))
    if not stored:
        raise kinds.why_no_weights(folder)
    return stored


@contextmanager
def fitting(config: PreTrainedConfig, stored: Mapping[str, Stored]) -> Iterator[None]:
    """A model that is built from a config may be as large as its weights can be.

    Args:
        config: The model's.
        stored: All tensors of its files; none where that isn't known.

    Raises:
        ModelError: It is far larger.
    """
    if not stored:
        yield
        return
    quantised = kinds.quantisation(config.to_dict()) is not None
    with bounded(stored.values(), quantised=quantised):
        yield


def class_for(config: PreTrainedConfig) -> Any:
    """The transformers class that loads a model with this config.

    What transformers has among models that see images alone is run as text.
    """
    only_there = (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return AutoModelForImageTextToText if only_there else AutoModelForCausalLM


def read_papers(path: str, name: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """A model's config and its tokenizer.

    Raises:
        ModelError: They can't be read, or are no causal language model's.
    """
    with reading(name, path, "the config of "):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        _forget_implementations(config)
        if config.is_encoder_decoder:
            raise kinds.not_causal(
                f"the model {name}", config.model_type, "an encoder-decoder model"
            )
    with reading(name, path, TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, **named_elsewhere(Path(path))
        )
    return config, tokenizer


def _forget_implementations(config: PreTrainedConfig) -> None:
    """How a model computes is not for its config to say, which could name code on the hub."""
    if config._attn_implementation != "eager":
        config._attn_implementation = None
    config._experts_implementation = None


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


def _widen(model: PreTrainedModel, config: Any, dtype: torch.dtype) -> list[str]:
    """Have one dtype in a model whose quantised weights transformers could only widen.

    Returns:
        A note that says so, if it is one.
    """
    settings = kinds.quantisation(config.to_dict())
    if settings is None or hasattr(model, "hf_quantizer"):
        return []
    strict, half = model._keep_in_fp32_modules_strict, model._keep_in_fp32_modules
    wide = {*(strict or ()), *((half or ()) if dtype == torch.float16 else ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and wide.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return [
        f"its weights are quantised by {kinds.title(settings)} and computed in "
        f"{str(dtype).removeprefix('torch.')}, which takes more memory: nothing here computes with "
        "them as they are"
    ]


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


def choose_dtype(name: str, config: Any, device: str) -> torch.dtype:
    """The dtype that `--dtype` means for a model with this config: see `load`."""
    if name in DTYPES:
        return DTYPES[name]
    if device == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    found = config.get_text_config().dtype
    return found if isinstance(found, torch.dtype) else torch.bfloat16
