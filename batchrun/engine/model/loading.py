"""Loads weights and tokenizer, refuses incomplete ones, and explains what their readers raise.

transformers fills missing tensors with random numbers, and such a model answers like any other.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as SEEING
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from batchrun.engine.core import EngineError
from batchrun.engine.model.int8 import int8_weights, unsupported_reason
from batchrun.engine.model.prepare import LoadedModel, prepare
from batchrun.engine.shortage import device_errors
from batchrun.errors import PROCESS_ENDS, ModelError
from batchrun.machine import multiplies_bfloat16
from batchrun.models import kinds
from batchrun.models.files import AGAIN, Stored, some
from batchrun.models.folder import check_files, named_elsewhere
from batchrun.models.whole import bounded, check_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER = "the tokenizer of "
_READERS = ("sentencepiece", "tiktoken")  # packages that read older tokenizers
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


def load(
    path: str,
    *,
    name: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    max_model_len: int | None = None,
    weights: bool = True,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> LoadedModel:
    """Load model and tokenizer from a local folder.

    Args:
        path: A folder with safetensors weights.
        name: What to call it in messages.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: on a GPU the config's; on a CPU bfloat16
            if it has instructions for it, else float32.
        quantize: `int8` for 8-bit weights, or None.
        device: A torch device.
        trust_remote_code: Whether the model's own Python code may run.
        max_model_len: Context length wanted, at most the model's own.
        weights: Whether to load them; if not, the model is on torch's meta device, as it would be
            on `device` but without data.
        told: Called as weights are loaded, with about how many bytes of how many.

    Raises:
        ModelError: It can't be loaded, lacks weights, or its architecture is refused.
    """
    name, folder, notes = name or path, Path(path), list[str]()
    stored = check_files(folder, kinds.read_config(folder))  # again: days may have passed
    config, tokenizer = _read_config_and_tokenizer(path, name, trust_remote_code)
    wanted = _choose_dtype(dtype, config, device)
    # Architectures that transformers lists only among image-text models are run on text.
    auto: Any = AutoModelForCausalLM
    if type(config) in SEEING and type(config) not in CAUSAL:
        auto = AutoModelForImageTextToText
    quantised = kinds.quantised_by(config.to_dict()) is not None
    with reading(name, path), bounded(stored.values(), quantised=quantised):
        if weights:
            with _counting(sum(tensor.nbytes for tensor in stored.values()), told):
                model, info = auto.from_pretrained(
                    path,
                    config=config,
                    dtype=wanted,
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are refused below, by name
                )
        else:
            with torch.device("meta"):
                model = auto.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    if weights:
        notes += check_whole(model, info, name)
        notes += _widen(model, config, wanted)
    elif (folder / "generation_config.json").exists():
        with reading(name, path, "the generation config of "):
            model.generation_config = GenerationConfig.from_pretrained(path)
    if quantize:
        int8_weights(model)
    loaded = prepare(model.to(device) if weights else model, tokenizer, max_model_len=max_model_len)
    on_gpu = quantize and loaded.device.type == "cuda"
    if on_gpu and (reason := unsupported_reason(loaded.device, wanted)) is not None:
        notes.append(
            f"8-bit weights save memory but are slow here: each step widens them, because {reason}"
        )
    return replace(loaded, notes=(*loaded.notes, *notes))


def _read_config_and_tokenizer(path: str, name: str, trust_remote_code: bool) -> tuple[Any, Any]:
    with reading(name, path, "the config of "):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        # A config must not choose how the model computes: it could name code on the hub.
        if config._attn_implementation != "eager":
            config._attn_implementation = None
        config._experts_implementation = None
        if config.is_encoder_decoder:
            raise kinds.not_causal(
                f"the model {name}", config.model_type, "an encoder-decoder model"
            )
    with reading(name, path, _TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, **named_elsewhere(Path(path))
        )
    return config, tokenizer


@contextmanager
def _counting(size: int, told: Callable[[int, int], None]) -> Iterator[None]:
    """Count the tensors that transformers loads: it knows them by the progress bar that it wants.

    Args:
        size: Bytes of all tensors.
        told: Called with about how many of these are loaded.
    """

    def counted(factory: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        tensors = list(args[0]) if args else []
        if not tensors:
            return factory(*args, **options)

        def each() -> Iterator[Any]:
            for number, tensor in enumerate(tensors):
                told(size * number // len(tensors), size)
                yield tensor
            told(size, size)

        return each()

    before = transformers_logging.set_tqdm_hook(counted)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


def _widen(model: PreTrainedModel, config: Any, dtype: torch.dtype) -> list[str]:
    """Convert a model to `dtype` if transformers could only dequantise its weights.

    Returns:
        A note for the user if it did so, else nothing.
    """
    way = kinds.quantised_by(config.to_dict())
    if way is None or hasattr(model, "hf_quantizer"):
        return []
    strict, half = model._keep_in_fp32_modules_strict, model._keep_in_fp32_modules
    wide = {*(strict or ()), *((half or ()) if dtype == torch.float16 else ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and wide.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return [
        f"its weights are quantised by {way} but computed in {str(dtype).removeprefix('torch.')}, "
        "which takes more memory: no kernel here computes with this quantisation"
    ]


def _choose_dtype(name: str, config: Any, device: str) -> torch.dtype:
    """The dtype that `--dtype` means for a model with this config: see `load`."""
    if name in DTYPES:
        return DTYPES[name]
    if device == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    found = config.get_text_config().dtype
    return found if isinstance(found, torch.dtype) else torch.bfloat16


# --- what readers raise ---


@contextmanager
def reading(name: str, path: str, what: str = "") -> Iterator[None]:
    """Turn whatever a reader of the user's files raises into an error about these files.

    Raises:
        ModelError: They can't be read.
        EngineError: There is not enough device memory for them.
    """
    try:
        with device_errors("the weights", None):
            yield
    except (ModelError, EngineError, MemoryError, *PROCESS_ENDS):
        raise
    except BaseException as error:  # a panic in a reader written in Rust is no Exception
        if os.strerror(errno.ENOMEM) in str(error):  # torch has no error class for it
            raise MemoryError(_first_line(error)) from error
        raise _cannot_load(name, Path(path), what, error) from error


def _cannot_load(name: str, folder: Path, what: str, error: BaseException) -> ModelError:
    """The error to raise: its cause, judged by the folder's metadata and the error's type."""
    failed = f"{what}the model {name} can't be loaded: {_first_line(error)}"
    config: kinds.Config = {}
    try:
        config = kinds.read_config(folder)
        if wrong := _unlike(check_files(folder, config)):
            failed += f" (tensors that experts lack or have in a different shape: {some(wrong)})"
    except ModelError as reason:
        return reason
    except OSError:
        pass  # `failed` says so already
    if config and "auto_map" not in config:
        model_type = str(config["model_type"])
        if model_type not in CONFIG_MAPPING:
            saved = config.get("transformers_version")
            by = f"; version {saved} wrote its config.json" if saved else ""
            return ModelError(
                f"the model {name} can't be loaded: transformers {transformers.__version__} does "
                f"not know the architecture {model_type!r}{by}",
                hint="if it is a new one: pip install --upgrade transformers",
            )
        known = CONFIG_MAPPING[model_type]
        if not what and known not in CAUSAL and known not in SEEING:
            return kinds.not_causal(f"the model {name}", model_type, "not a causal language model")
    if what == _TOKENIZER:
        hint = _tokenizer_hint(folder, error)
    elif what:
        hint = "use the one that came with the weights"
    elif (way := kinds.quantised_by(config)) is not None:
        failed += f" (its weights are quantised by {way})"
        hint = kinds.UNQUANTISED
    elif isinstance(error, ImportError):
        hint = "install what is missing"
    else:
        hint = (
            "it must be a causal language model of a released transformers architecture, "
            "with safetensors weights and a tokenizer; see `batchrun doctor`"
        )
    return ModelError(failed, hint=hint)


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, and the second if the first ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    tells = isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and said
    return said if tells else f"{type(error).__name__}: {said}"


def _unlike(stored: Mapping[str, Stored]) -> list[str]:
    """Tensors of experts that are missing, or have a different shape from most experts'."""
    shapes: dict[tuple[str, str], dict[str, tuple[int, ...]]] = defaultdict(dict)
    experts: dict[str, set[str]] = defaultdict(set)
    for name, tensor in stored.items():
        if found := _EXPERT.fullmatch(name):
            layer, expert, part = found.groups()
            shapes[layer, part][expert] = tensor.shape
            experts[layer].add(expert)
    wrong = []
    for (layer, part), by_expert in shapes.items():
        [(usual, _)] = Counter(by_expert.values()).most_common(1)
        unusual = (expert for expert in experts[layer] if by_expert.get(expert) != usual)
        wrong += [f"{layer}{expert}{part}" for expert in unusual]
    return sorted(wrong)


def _tokenizer_hint(folder: Path, error: BaseException) -> str:
    if not (folder / "tokenizer.json").exists():
        lacking = [name for name in _READERS if find_spec(name) is None]
        lacks = f"pip install {' '.join(lacking)}, or " if lacking else ""
        return f"{lacks}copy the tokenizer.json of the model that it was made from"
    if isinstance(error, ImportError):
        return "install what is missing, or copy the tokenizer of the model that it was made from"
    if isinstance(error, json.JSONDecodeError):
        return f"its tokenizer.json or tokenizer_config.json is not valid JSON: {AGAIN}"
    return (
        f"its tokenizer.json may be newer than tokenizers {tokenizers.__version__}: "
        "pip install --upgrade tokenizers transformers, or copy it again"
    )
