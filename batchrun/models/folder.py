"""Checks that the files transformers loads from a model folder are whole, without loading them.

Only their heads are read, so that a broken download is reported when a job is submitted. Weights
are loaded only from `.safetensors` files in the folder itself: what is loaded is what was checked
here and what the fingerprint covers. These files may be links, as in the hub's cache: their targets
count. A tokenizer, too, is read only from its folder, whatever its settings name: they often still
hold paths of the machine that saved it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from batchrun.errors import ModelError
from batchrun.models.files import (
    AGAIN,
    Stored,
    check_head,
    is_name,
    read_json,
    shown,
    some,
    stored_in,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NO_NAME = "which is not the name of a safetensors file in that folder"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_METADATA = ("config.json", "generation_config.json", "tokenizer_config.json")
# Files of distributed training. transformers prefers them to all others, whatever an index says.
_CHECKPOINT = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_NAMED = "transformers_weights"  # in a config: the file to load, or the index
# Config keys that say how many of something to build, and a number that any model may have.
_COUNTS = re.compile(
    r"((num|n)_(\w+_)?)?(layers?|blocks?|stages?|labels)|\w+_layers|depths?|first_k_dense_replace"
    r"|attention_types"
)
_ANY_COUNT = 4096
# transformers reads a tokenizer from the first of these that exists.
TOKENIZERS = ("tokenizer.json", "tekken.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
_SETTINGS = "tokenizer_config.json"
_TOKENS = "special_tokens_map.json"  # read like settings
_MOST_TOKENS = 10_000_000
_LARGE = re.compile(rb":\s*\d{8}")  # a number of eight digits or more


def check_files(folder: Path, config: Mapping[str, Any]) -> dict[str, Stored]:
    """Check that weights, tokenizer and metadata are whole, as far as their heads and sizes tell.

    Returns:
        All tensors of the weights, by name.

    Raises:
        ModelError: One is missing, cut short, or not what its name says; or there are no
            safetensors weights.
        OSError: One can't be read.
    """
    first, index, files = _weights(folder, config)
    if not files:
        raise _why_no_weights(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(files)} weight files that {first.name} "
            f"names: {some(missing)}",
            hint="download or copy the folder again: `hf download` gets only what is missing",
        )
    others = sorted(file.name for file in folder.iterdir() if _CHECKPOINT.match(file.name))
    if others:
        raise ModelError(
            f"{folder} has a checkpoint of distributed training beside its weights "
            f"({some(others)}), so it is not clear which to run",
            hint="move the shard-* files away, or save the model again with save_pretrained",
        )
    for name in _METADATA:
        read_json(folder / name)
    _check_tokenizer(folder)
    stored = {file.name: stored_in(file) for file in files}
    # Files are loaded in this order; for a tensor in several of them the last one counts.
    last = {tensor: name for name, tensors in stored.items() for tensor in tensors}
    nowhere = sorted(index.keys() - last.keys())
    if nowhere:
        raise ModelError(
            f"{folder} lacks {len(nowhere):,} of the {len(index):,} tensors that {first.name} "
            f"names: {some(list(map(shown, nowhere)))}",
            hint=AGAIN,
        )
    for tensor, name in index.items():
        if tensor in stored[name] and last[tensor] != name:
            raise ModelError(
                f"{first} says that {shown(tensor)} is in {name}, but {last[tensor]} has another "
                "tensor of that name",
                hint="save the model again with save_pretrained, so that each is stored once",
            )
    _check_counts(folder / "config.json", config, len(last))
    return {tensor: stored[name][tensor] for tensor, name in last.items()}


def weight_files(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The safetensors files that transformers loads from a folder; empty if it finds none.

    Raises:
        ModelError: The index of the shards can't be read, or names a file outside the folder.
        OSError: The index can't be read.
    """
    return _weights(folder, config)[2]


def _weights(folder: Path, config: Mapping[str, Any]) -> tuple[Path, Mapping[str, str], list[Path]]:
    """The file that loading begins with, the file of each tensor it lists, and all files."""
    named = config.get(_NAMED)
    if named is None:
        named = SINGLE if (folder / SINGLE).is_file() else INDEX
    elif not is_name(named, ".safetensors", ".safetensors.index.json"):
        raise ModelError(
            f"{folder / 'config.json'} says to load weights from {shown(named)}, {_NO_NAME}",
            hint=f'remove "{_NAMED}" from it; weights are then loaded from {SINGLE} or {INDEX}',
        )
    first = folder / named
    if not first.name.endswith(".index.json"):
        return first, {}, [first]
    if not first.is_file():
        return first, {}, []
    found = read_json(first)
    index = found.get("weight_map")
    if not isinstance(index, dict) or not isinstance(found.get("metadata"), dict):
        raise ModelError(
            f'{first} is not an index of weight files: it has no "weight_map" or no "metadata"',
            hint=AGAIN,
        )
    for tensor, name in index.items():
        if not is_name(name, ".safetensors"):
            raise ModelError(
                f"{first} says that {shown(tensor)} is in {shown(name)}, {_NO_NAME}",
                hint="weights are loaded only from safetensors files beside the index: save the "
                "model again with save_pretrained",
            )
    return first, index, sorted({folder / name for name in index.values()})


def _check_counts(file: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a config with more layers than tensors, before lists of that length are built."""
    todo: list[tuple[str, Any]] = list(config.items())
    most = max(_ANY_COUNT, tensors)
    while todo:
        key, value = todo.pop()
        if isinstance(value, Mapping):
            todo += value.items()
        elif isinstance(value, list):
            todo += [(key, item) for item in value]
        elif _COUNTS.fullmatch(key) and isinstance(value, int | float) and value > most:
            raise ModelError(
                f"{file} says {shown(key)} is {shown(value)}, but the weights have only "
                f"{tensors:,} tensors",
                hint="use the config.json that came with the weights",
            )


def no_safetensors(where: object, names: Iterable[str]) -> ModelError:
    """The error for a model without safetensors, given the names of its files."""
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if not pickles:
        return ModelError(
            f"{where} has no *.safetensors weights",
            hint="use a model that has them, or a .gguf file of it",
        )
    return ModelError(
        f"{where} has only pickled weights ({some(pickles)}); loading a pickle can run any code, "
        "so batchrun reads safetensors and GGUF only",
        hint="load it once where you trust it and save it again: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)",
    )


def _why_no_weights(folder: Path) -> ModelError:
    """The error for a folder where transformers would find no safetensors."""
    found = sorted(folder.glob("*.safetensors"))
    dangling = [str(file) for file in found if not file.exists()]
    if dangling:
        return ModelError(f"{some(dangling)}: a link to a file that does not exist", hint=AGAIN)
    there = [file.name for file in found]
    names = sorted(file.name for file in folder.iterdir())
    if not there and any(name.endswith(_PICKLES) for name in names):
        return no_safetensors(folder, names)
    shards = [name for name in there if "-of-" in name]
    if shards:
        what = f"has {some(shards)} but no {INDEX}, which says what is in them"
        hint = "download it from where the weights came from"
    elif any(name.startswith("consolidated") for name in there):
        what = f"has its weights only in its maker's own format ({some(there)})"
        hint = "download the model in the format of transformers, as model*.safetensors"
    elif there:
        what = f"has {some(there)}, but transformers loads only {SINGLE}"
        rename = f"mv {folder / there[0]} {folder / SINGLE}"
        hint = f"if these are the model's weights, rename them: {rename}"
    else:
        what = "has no *.safetensors weights"
        hint = "download the model's safetensors, or give a .gguf file"
        others = sorted(
            str(file.relative_to(folder))
            for end in ("onnx", "gguf", "h5", "msgpack", "npz")
            for file in (*folder.glob(f"*.{end}"), *folder.glob(f"*/*.{end}"))
        )
        if others and others[0].endswith(".gguf"):
            hint = f"give the GGUF file itself: --model {folder / others[0]}"
        elif others:
            what += f" but {some(others)}"
    return ModelError(f"{folder} {what}", hint=hint)


# --- the tokenizer ---


def _check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer whose files are not what their names say, or name other files."""
    found = ([f for f in sorted(folder.glob(each)) if f.is_file()] for each in TOKENIZERS)
    for file in next(filter(None, found), []):
        check_head(file)
    for name in ("tokenizer.json", "vocab.json"):
        _check_ids(folder / name)
    settings, tokens = folder / _SETTINGS, folder / _TOKENS
    said = read_json(settings)
    versions = said.get("fast_tokenizer_files", [])  # transformers picks one by its version
    elsewhere: list[tuple[Path, str, object]] = []
    if not isinstance(versions, list) or not all(is_name(name, ".json") for name in versions):
        elsewhere.append((settings, "fast_tokenizer_files", versions))
    if said.get("init_inputs"):
        elsewhere.append((settings, "init_inputs", said["init_inputs"]))
    said = read_json(tokens)
    elsewhere += [(tokens, key, said[key]) for key in _paths_in(said)]
    for file, key, value in elsewhere:
        raise ModelError(
            f"{file} says to read the tokenizer from elsewhere: {shown(key)} is {shown(value)}",
            hint=f"remove that from it, or {AGAIN}",
        )


def _check_ids(file: Path) -> None:
    """Refuse token ids that no model has: libraries build lists up to the largest one."""
    if not file.is_file() or not _LARGE.search(data := file.read_bytes()):
        return
    try:
        found = json.loads(data)
        vocabulary = found["model"]["vocab"] if file.name == "tokenizer.json" else found
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # its reader will report it
    for token, number in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if isinstance(number, int) and number >= _MOST_TOKENS:
            raise ModelError(
                f"{file} gives the token {shown(token)} the id {number:,}, but no vocabulary is "
                "that large",
                hint=AGAIN,
            )


def _paths_in(settings: Mapping[str, Any]) -> list[str]:
    """The tokenizer settings that name files."""
    return [
        key
        for key, value in settings.items()
        if isinstance(value, str) and (key.endswith("_file") or key in {"vocab", "merges"})
    ]


def named_elsewhere(folder: Path) -> dict[str, None]:
    """Arguments that keep transformers from reading files that a tokenizer's settings name."""
    return dict.fromkeys(_paths_in(read_json(folder / _SETTINGS)))
