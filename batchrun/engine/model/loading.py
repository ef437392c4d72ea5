"""Loads weights and tokenizer, and refuses those that are not whole.

transformers gives tensors that are missing random numbers, which answer as any others do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
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

from batchrun.engine.model.int8_gpu import unsupported_reason
from batchrun.engine.model.prepare import LoadedModel, prepare
from batchrun.engine.model.quantize import int8_weights
from batchrun.engine.model.reading import TOKENIZER, reading
from batchrun.machine import multiplies_bfloat16
from batchrun.models import kinds
from batchrun.models.bounded import bounded
from batchrun.models.headers import Stored
from batchrun.models.tokenizer_files import named_elsewhere
from batchrun.models.weights import check_files
from batchrun.models.whole import check_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    config, tokenizer = read_config_and_tokenizer(path, name, trust_remote_code=trust_remote_code)
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
    on_gpu = quantize and loaded.device.type == "cuda"
    if on_gpu and (reason := unsupported_reason(loaded.device, wanted)) is not None:
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


def read_config_and_tokenizer(path: str, name: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
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


def choose_dtype(name: str, config: Any, device: str) -> torch.dtype:
    """The dtype that `--dtype` means for a model with this config: see `load`."""
    if name in DTYPES:
        return DTYPES[name]
    if device == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    found = config.get_text_config().dtype
    return found if isinstance(found, torch.dtype) else torch.bfloat16
