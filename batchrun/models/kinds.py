"""What a model folder holds, by its metadata alone: a causal language model or something else."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from batchrun.errors import ModelError
from batchrun.models.files import read_json
from batchrun.models.folder import INDEX, SINGLE, TOKENIZERS

Config = dict[str, Any]

_CAUSAL = ("ForCausalLM", "LMHead", "ForConditionalGeneration")  # in class names
_OTHERS = {
    "ForSequenceClassification": "a classifier: it scores text and generates none",
    "Reward": "a reward model: it scores text and generates none",
    "ForTokenClassification": "a token classifier",
    "ForQuestionAnswering": "an extractive question-answering model",
    "ForMaskedLM": "a masked language model, which fills gaps in text",
    "ForPreTraining": "a pretrained encoder",
}
_LANGUAGE_MODELS = "batchrun runs causal language models, whose architecture ends in ForCausalLM"
# By quantisation method: its usual name, and the packages that transformers needs to load it.
_QUANTISED = {
    "gptq": ("GPTQ", "optimum", "gptqmodel"),
    "awq": ("AWQ", "accelerate", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "accelerate", "bitsandbytes"),
    "fp8": ("FP8", "accelerate"),
    "mxfp4": ("MXFP4", "accelerate"),
    "compressed-tensors": ("compressed-tensors", "compressed_tensors"),
    "torchao": ("torchao", "torchao"),
    "auto-round": ("AutoRound", "auto_round"),
    "aqlm": ("AQLM", "accelerate", "aqlm"),
    "hqq": ("HQQ", "accelerate", "hqq"),
    "quanto": ("Quanto", "accelerate", "optimum"),
    "eetq": ("EETQ", "accelerate", "kernels"),
    "vptq": ("VPTQ", "accelerate", "vptq"),
    "spqr": ("SpQR", "accelerate", "spqr_quant"),
    "quark": ("Quark", "quark"),
    "bitnet": ("BitNet", "accelerate"),
}
_BITS = {"load_in_8bit", "load_in_4bit"}
UNQUANTISED = "use the model that it was made from, without quantisation, or a GGUF file of it"


def read_config(folder: Path) -> Config:
    """A folder's `config.json`, if it is a model's.

    Raises:
        ModelError: There is none, or it can't be read; says what the folder holds instead.
        OSError: The file can't be opened.
    """
    file = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise _adapter(folder)
    if (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is a diffusers pipeline: it makes images or the like, not text",
            hint=_LANGUAGE_MODELS,
        )
    modules = folder / "modules.json"
    if modules.is_file() and "sentence_transformers" in modules.read_text("utf-8", "replace"):
        raise ModelError(
            f"{folder} is a sentence-transformers model: it makes embeddings, not text",
            hint=_LANGUAGE_MODELS,
        )
    if not file.is_file():
        raise _no_config(folder)
    config = read_json(file)
    if not isinstance(config.get("model_type"), str) and "auto_map" not in config:
        raise ModelError(
            f'{file} does not say which architecture the model has: it has no "model_type"',
            hint="use the config.json that came with the weights",
        )
    return config


def _adapter(folder: Path) -> ModelError:
    """The error for an adapter, which needs its base model or lies beside it."""
    try:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    except ModelError:
        base = None
    of = f" of {base}" if base else ""
    merge = (
        "merge it into that model with peft: AutoPeftModelForCausalLM.from_pretrained"
        f"({str(folder)!r}).merge_and_unload().save_pretrained(OTHER), and save the tokenizer "
        "there too"
    )
    whole = any((folder / name).exists() for name in (SINGLE, INDEX))
    if whole and (folder / "config.json").is_file():
        return ModelError(
            f"{folder} holds both a whole model and an adapter{of} (adapter_config.json), "
            "so it is not clear which to run",
            hint=f"move the adapter_* files away to run the model without the adapter, or {merge}",
        )
    return ModelError(
        f"{folder} is an adapter (LoRA or similar){of}, not a model by itself", hint=merge
    )


def _no_config(folder: Path) -> ModelError:
    """The error for a folder without config.json; its hint names what to use instead, if any."""
    what, hint = f"{folder} has no config.json, so it is not a model folder", None
    ggufs = sorted(folder.glob("*.gguf"))
    parts = [file for file in ggufs if "-of-" in file.name]
    if len(parts) > 1:
        merge = f"llama-gguf-split --merge {parts[0]} whole.gguf"
        hint = f"merge the parts of its GGUF file: {merge}"
    elif ggufs:
        hint = f"give the GGUF file itself: --model {ggufs[0]}"
    elif (folder / "params.json").is_file():
        what = (
            f"{folder} holds a model in its maker's own format (params.json), not in that of "
            "transformers"
        )
        hint = "download the model in the format of transformers, with its config.json"
        if folder.name == "original" and (folder.parent / "config.json").is_file():
            hint = f"use the folder above: --model {folder.parent}"
    elif there := [*folder.glob("snapshots/*/config.json")] or [*folder.glob("*/config.json")]:
        hint = f"there is one inside it: --model {max(there).parent}"
    return ModelError(what, hint=hint)


def check_kind(folder: Path, config: Config, names: Collection[str]) -> None:
    """Refuse a model that is not a causal language model, or is quantised and can't load here.

    Args:
        folder: The model's folder.
        config: Its config.
        names: The names of all its tensors.

    Raises:
        ModelError: It is refused; the message says what it is.
    """
    if config.get("is_encoder_decoder"):
        raise not_causal(folder, config.get("model_type"), "an encoder-decoder model")
    _check_architectures(folder, config, names)
    _check_quantisation(folder, config)
    # Any file that some tokenizer is read from will do; a model's own code may read others.
    readable = (*TOKENIZERS, "*.py", "merges.txt")
    if not any(next(folder.glob(pattern), None) for pattern in readable) and (
        "auto_map" not in read_json(folder / "tokenizer_config.json")
    ):
        raise ModelError(
            f"{folder} has no tokenizer: neither tokenizer.json nor another vocabulary",
            hint="copy tokenizer.json and tokenizer_config.json from the model that it was made "
            "from",
        )


def not_causal(where: object, model_type: object, what: str) -> ModelError:
    """The error for a model that does not predict a next token."""
    return ModelError(f"{where} is {what} ({model_type})", hint=_LANGUAGE_MODELS)


def _check_architectures(folder: Path, config: Config, names: Collection[str]) -> None:
    """Judge by the class that saved the weights: a missing head may be a tied one."""
    classes = config.get("architectures") or []
    of_its_own = config.get("auto_map")
    if isinstance(of_its_own, Mapping) and "AutoModelForCausalLM" in of_its_own:
        return
    classes = [str(name) for name in (classes if isinstance(classes, list) else [classes])]
    if not classes or any(part in name for name in classes for part in _CAUSAL):
        return
    name, hint = classes[0], _LANGUAGE_MODELS
    kind = next((kind for part, kind in _OTHERS.items() if part in name), None)
    if kind is None and name.endswith("Model"):
        if any(tensor.endswith("lm_head.weight") for tensor in names):
            return  # saved with its head by another tool
        kind = "a model without the head that predicts tokens, such as an embedding model"
        hint = (
            "if it is a causal language model whose head is its embedding, say so in config.json: "
            '"tie_word_embeddings": true and "architectures": '
            f'["{name.removesuffix("Model")}ForCausalLM"]'
        )
    what = kind or "not a causal language model"
    raise ModelError(f"{folder} is {what} (its config.json says {name})", hint=hint)


def _settings(config: Config) -> dict[str, Any]:
    """A config's quantisation settings; empty if the weights are not quantised."""
    inner = config.get("text_config")
    found = config.get("quantization_config") or config.get("quantization")
    if not found and isinstance(inner, dict):
        found = inner.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _method(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The method's usual name, and the packages that it needs."""
    default = "bitsandbytes" if _BITS & settings.keys() else ""
    method = str(settings.get("quant_method") or default)
    return _QUANTISED.get(method, (method,))


def quantised_by(config: Config) -> str | None:
    """The usual name of the method that quantised a model's weights; None if they are not."""
    settings = _settings(config)
    return _method(settings)[0] if settings else None


def _check_quantisation(folder: Path, config: Config) -> None:
    settings = _settings(config)
    if not settings:
        return
    if "quant_method" not in settings and not _BITS & settings.keys():
        way = "by a method that it does not name"
        if isinstance(config.get("quantization"), dict) or {"bits", "group_size"} <= set(settings):
            way = "for MLX, which runs on Apple's machines"
        raise ModelError(f"{folder} is quantised {way}", hint=UNQUANTISED)
    title, *packages = _method(settings)
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{folder} is quantised by {title}, and {' and '.join(missing)}, which transformers "
            f"loads it with, {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"pip install {' '.join(missing).replace('_', '-')}, or {UNQUANTISED}",
        )
