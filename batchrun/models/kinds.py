"""What a model folder holds, by its metadata alone: a causal language model, or what else."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from batchrun.errors import ModelError
from batchrun.models.headers import AGAIN
from batchrun.models.metadata import read_metadata, some
from batchrun.models.tokenizer_files import TOKENIZERS
from batchrun.models.weights import INDEX, SINGLE

Config = dict[str, Any]

_CAUSAL = ("ForCausalLM", "LMHead", "ForConditionalGeneration")  # in names of classes
_OTHERS = {
    "ForSequenceClassification": "a classifier: it gives a text scores, no answer",
    "RewardModel": "a reward model: it gives a text a score, no answer",
    "Reward": "a reward model: it gives a text a score, no answer",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMaskedLM": "an encoder that fills gaps in a text",
    "ForPreTraining": "an encoder as it was pretrained",
    "Model": "a model without the head that predicts tokens, as embedding models are",
}
_LANGUAGE_MODELS = "batchrun runs causal language models, whose architecture ends in ForCausalLM"
# Of each way to quantise: what people call it, and the packages that transformers loads it with.
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
UNQUANTISED = "use the model that it was made from, without quantisation, or a GGUF file of it"


def read_config(folder: Path) -> Config:
    """A folder's `config.json`, as long as it is a model's.

    Raises:
        ModelError: There is none, or it can't be read; what the folder holds instead is told.
        OSError: The file can't be opened.
    """
    file = folder / "config.json"
    _refuse_others(folder, has_config=file.is_file())
    if not file.is_file():
        raise _no_config(folder)
    config = read_metadata(file)
    if not isinstance(config.get("model_type"), str) and "auto_map" not in config:
        raise ModelError(
            f'{file} does not say which architecture the model has: it has no "model_type"',
            hint="use the config.json that came with the weights",
        )
    return config


def _refuse_others(folder: Path, *, has_config: bool) -> None:
    """Refuse a folder that is marked as something else than a model of text.

    Raises:
        ModelError: What it is, and how it could be used.
    """
    if (folder / "adapter_config.json").is_file():
        whole = any((folder / name).exists() for name in (SINGLE, INDEX))
        raise _adapter(folder, beside=has_config and whole)
    if (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is a diffusers pipeline, which makes images or the like",
            hint=_LANGUAGE_MODELS,
        )
    modules = folder / "modules.json"
    if modules.is_file() and "sentence_transformers" in modules.read_text("utf-8", "replace"):
        raise ModelError(
            f"{folder} is a sentence-transformers model: it makes embeddings, no text",
            hint=_LANGUAGE_MODELS,
        )


def _no_config(folder: Path) -> ModelError:
    """The error for a folder without one; what can be used instead, if it is there, is told."""
    if ggufs := sorted(folder.glob("*.gguf")):
        parts = [file for file in ggufs if "-of-" in file.name]
        hint: str | None = f"name the GGUF file itself: --model {ggufs[0]}"
        if len(parts) > 1:
            merge = f"llama-gguf-split --merge {parts[0]} whole.gguf"
            hint = f"merge the parts of its GGUF file: {merge}"
    elif (folder / "params.json").is_file():
        beside = folder.name == "original" and (folder.parent / "config.json").is_file()
        return ModelError(
            f"{folder} holds a model in its maker's own format (params.json), "
            "not in that of transformers",
            hint=f"use the folder above: --model {folder.parent}"
            if beside
            else "download the model in the format of transformers, with its config.json",
        )
    else:
        there = [*folder.glob("snapshots/*/config.json")] or [*folder.glob("*/config.json")]
        hint = f"there is one in it: --model {max(there).parent}" if there else None
    return ModelError(f"{folder} has no config.json, so it is no model folder", hint=hint)


def _adapter(folder: Path, *, beside: bool) -> ModelError:
    """The error for an adapter, which needs its base model."""
    file = folder / "adapter_config.json"
    try:
        base = read_metadata(file).get("base_model_name_or_path")
    except ModelError:
        base = None
    of = f" of {base}" if base else ""
    merge = (
        "merge it into that model with peft: AutoPeftModelForCausalLM.from_pretrained"
        f"({str(folder)!r}).merge_and_unload().save_pretrained(OTHER), and save the tokenizer "
        "there too"
    )
    if beside:
        return ModelError(
            f"{folder} holds both a whole model and an adapter{of} (adapter_config.json), "
            "so it is not clear what should run",
            hint=f"move the adapter_* files away to run the model without the adapter, or {merge}",
        )
    return ModelError(
        f"{folder} is an adapter (LoRA or the like){of}, no model of its own", hint=merge
    )


def check_kind(folder: Path, config: Config, names: Collection[str]) -> None:
    """Refuse what is no causal language model, or quantised so that it can't be loaded here.

    Args:
        folder: The model's.
        config: Its config.
        names: Of all its tensors.

    Raises:
        ModelError: The message names what it is.
    """
    if config.get("is_encoder_decoder"):
        raise not_causal(folder, config.get("model_type"), "an encoder-decoder model")
    _check_architectures(folder, config, names)
    _check_quantisation(folder, config)
    _check_tokenizer(folder)


def not_causal(where: object, model_type: object, what: str) -> ModelError:
    """The error for a model that does not predict a next token."""
    return ModelError(f"{where} is {what} ({model_type})", hint=_LANGUAGE_MODELS)


def _check_architectures(folder: Path, config: Config, names: Collection[str]) -> None:
    """What the weights were saved from says what they are for: a tied head is never missing."""
    classes = config.get("architectures") or []
    of_its_own = config.get("auto_map")
    if isinstance(of_its_own, Mapping) and "AutoModelForCausalLM" in of_its_own:
        return
    classes = [str(name) for name in (classes if isinstance(classes, list) else [classes])]
    if not classes or any(part in name for name in classes for part in _CAUSAL):
        return
    kind = next((_OTHERS[end] for end in _OTHERS if classes[0].endswith(end)), None)
    if kind is None:
        kind = next(
            (kind for part, kind in _OTHERS.items() if part != "Model" and part in classes[0]),
            "no causal language model",
        )
    if kind == _OTHERS["Model"] and any(name.endswith("lm_head.weight") for name in names):
        return  # saved by other tools, with its head
    hint = _LANGUAGE_MODELS
    if kind == _OTHERS["Model"]:
        hint = (
            "if it is a causal language model whose head is its embedding, say so in config.json: "
            '"tie_word_embeddings": true and "architectures": '
            f'["{classes[0].removesuffix("Model")}ForCausalLM"]'
        )
    raise ModelError(f"{folder} is {kind} (its config.json says {classes[0]})", hint=hint)


def _check_quantisation(folder: Path, config: Config) -> None:
    settings = quantisation(config)
    if settings is None:
        return
    if "quant_method" not in settings and not (_BITS & settings.keys()):
        mlx = isinstance(config.get("quantization"), dict) or {"bits", "group_size"} <= set(
            settings
        )
        way = "for MLX, which runs on Apple's machines" if mlx else "in a way that it does not name"
        raise ModelError(f"{folder} is quantised {way}", hint=UNQUANTISED)
    missing = missing_packages(settings)
    if missing:
        raise ModelError(
            f"{folder} is quantised by {title(settings)}, and {' and '.join(missing)}, which "
            f"transformers loads it with, {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"pip install {' '.join(name.replace('_', '-') for name in missing)}, "
            f"or {UNQUANTISED}",
        )


_BITS = {"load_in_8bit", "load_in_4bit"}


def quantisation(config: Config) -> dict[str, Any] | None:
    """A config's settings of quantisation, if its weights are quantised."""
    inner = config.get("text_config")
    found = config.get("quantization_config") or config.get("quantization")
    if not found and isinstance(inner, dict):
        found = inner.get("quantization_config")
    return found if isinstance(found, dict) and found else None


def _method(settings: Mapping[str, Any]) -> str:
    return str(settings.get("quant_method") or ("bitsandbytes" if _BITS & set(settings) else ""))


def title(settings: Mapping[str, Any]) -> str:
    """What people call this way to quantise."""
    method = _method(settings)
    return _QUANTISED.get(method, (method,))[0]


def missing_packages(settings: Mapping[str, Any]) -> list[str]:
    """Packages that such weights need and that are not installed."""
    needed = _QUANTISED.get(_method(settings), ("",))[1:]
    return [name for name in needed if importlib.util.find_spec(name) is None]


def _check_tokenizer(folder: Path) -> None:
    """Any file that some tokenizer is read from will do; code of its own may read others.

    Raises:
        ModelError: There is none.
    """
    if any(next(folder.glob(pattern), None) for pattern in (*TOKENIZERS, "*.py", "merges.txt")):
        return
    if "auto_map" in read_metadata(folder / "tokenizer_config.json"):
        return
    raise ModelError(
        f"{folder} has no tokenizer: there is no tokenizer.json, nor another vocabulary",
        hint="copy tokenizer.json and tokenizer_config.json from the model that it was made from",
    )


def why_no_weights(folder: Path) -> ModelError:
    """The error for a folder where transformers would find no safetensors."""
    found = sorted(folder.glob("*.safetensors"))
    dangling = [str(file) for file in found if not file.exists()]
    if dangling:
        return ModelError(f"{some(dangling)}: a link to a file that is not there", hint=AGAIN)
    there = [file.name for file in found]
    shards = [name for name in there if "-of-" in name]
    if shards:
        return ModelError(
            f"{folder} has {some(shards)} and no model.safetensors.index.json, which says what is "
            "in them",
            hint="get that file from where the weights are from",
        )
    if any(name.startswith("consolidated") for name in there):
        return ModelError(
            f"{folder} has its weights in its maker's own format only ({some(there)})",
            hint="download the model in the format of transformers, as model*.safetensors",
        )
    if there:
        return ModelError(
            f"{folder} has {some(there)}, and transformers loads {SINGLE} only",
            hint=f"if these are the model's weights, rename them: mv {folder / there[0]} "
            f"{folder / SINGLE}",
        )
    others = sorted(
        str(file.relative_to(folder))
        for end in ("onnx", "gguf", "h5", "msgpack", "npz")
        for file in (*folder.glob(f"*.{end}"), *folder.glob(f"*/*.{end}"))
    )
    if others and others[0].endswith(".gguf"):
        return ModelError(
            f"{folder} has no *.safetensors weights",
            hint=f"name the GGUF file itself: --model {folder / others[0]}",
        )
    instead = f" but {some(others)}" if others else ""
    return ModelError(
        f"{folder} has no *.safetensors weights{instead}",
        hint="download the model's safetensors, or give a .gguf file",
    )
