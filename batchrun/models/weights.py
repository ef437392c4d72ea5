"""The files of a model folder that transformers loads, looked at without loading: whole or not.

Only heads are read, so that a download that broke off is told when a job is submitted. Weights are
loaded from `.safetensors` files in the folder itself and from nothing else: what is loaded is what
was looked at here, and what a fingerprint is made of. These files may be links, as in the cache of
the hub: what they lead to counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchrun.errors import ModelError
from batchrun.models.headers import AGAIN, Stored, stored_in
from batchrun.models.metadata import is_name, read_metadata, shown, some
from batchrun.models.tokenizer_files import check_tokenizer_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_METADATA = ("config.json", "generation_config.json", "tokenizer_config.json")
# Of distributed training. transformers prefers them to all else, whatever an index says.
_CHECKPOINT = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_NAMED = "transformers_weights"  # in a config: the file to load, or the index
# Keys of a config that say how often something is built, and as often as any model may have it.
_COUNTS = re.compile(
    r"((num|n)_(\w+_)?)?(layers?|blocks?|stages?|labels)|\w+_layers|depths?|first_k_dense_replace"
    r"|attention_types"
)
_ANY_COUNT = 4096


def weight_files(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The safetensors files that transformers loads from a folder, none where it finds none.

    Raises:
        ModelError: The index of the shards can't be read, or names what is no file of the folder.
        OSError: The index can't be read.
    """
    first = folder / _first(folder, config)
    if not first.name.endswith(".index.json"):
        return [first] if first.is_file() or config.get(_NAMED) is not None else []
    if not first.is_file():
        return []
    return sorted({folder / name for name in _weight_map(first).values()})


def _first(folder: Path, config: Mapping[str, Any]) -> str:
    """The name of the file that loading begins with."""
    named = config.get(_NAMED)
    if named is None:
        return SINGLE if (folder / SINGLE).is_file() else INDEX
    if not is_name(named, ".safetensors", ".safetensors.index.json"):
        raise ModelError(
            f"{folder / 'config.json'} has its weights loaded from {shown(named)}, which is not "
            "the name of a safetensors file in that folder",
            hint=f'remove "{_NAMED}" from it; weights are loaded from {SINGLE} or {INDEX} then',
        )
    return str(named)


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor that an index names.

    Raises:
        ModelError: It is no index, or names something else than safetensors files beside it.
    """
    found = read_metadata(index)
    files = found.get("weight_map")
    if not isinstance(files, dict) or not isinstance(found.get("metadata"), dict):
        raise ModelError(
            f'{index} is no index of weight files: it has no "weight_map" or no "metadata"',
            hint=AGAIN,
        )
    for tensor, name in files.items():
        if not is_name(name, ".safetensors"):
            raise ModelError(
                f"{index} says that {shown(tensor)} is in {shown(name)}, which is not the name "
                "of a safetensors file in that folder",
                hint="weights are loaded from safetensors files beside the index, and from nothing "
                "else: save the model again with save_pretrained",
            )
    return files


def check_files(folder: Path, config: Mapping[str, Any]) -> dict[str, Stored]:
    """Check that weights, tokenizer and metadata are whole, as far as their heads and sizes tell.

    Returns:
        All tensors of the weights, by name.

    Raises:
        ModelError: One is missing, cut short, or something else than its name says.
        OSError: One can't be read.
    """
    files = weight_files(folder, config)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(files)} weight files that "
            f"{_first(folder, config)} names: {some(missing)}",
            hint="download or copy the folder again: `hf download` gets only what is missing",
        )
    others = sorted(file.name for file in folder.iterdir() if _CHECKPOINT.match(file.name))
    if others:
        raise ModelError(
            f"{folder} has a checkpoint of distributed training beside its weights "
            f"({some(others)}), so it is not clear what should run",
            hint="move the shard-* files away, or save the model again with save_pretrained",
        )
    for name in _METADATA:
        read_metadata(folder / name)
    check_tokenizer_files(folder)
    stored = {file.name: stored_in(file) for file in files}
    index = folder / _first(folder, config)
    if index.name.endswith(".index.json") and files:
        _check_index(index, _weight_map(index), stored)
    tensors = {name: tensor for file in files for name, tensor in stored[file.name].items()}
    _check_counts(folder / "config.json", config, len(tensors))
    return tensors


def _check_index(
    index: Path, said: Mapping[str, str], stored: Mapping[str, Mapping[str, Stored]]
) -> None:
    """Refuse an index whose tensors are nowhere, or not in the file whose tensor would be loaded.

    Files are loaded in the order of their names, and of a tensor that is in several the last one
    counts.
    """
    last = {tensor: name for name in sorted(stored) for tensor in stored[name]}
    nowhere = sorted(tensor for tensor in said if tensor not in last)
    if nowhere:
        raise ModelError(
            f"{index.parent} lacks {len(nowhere):,} of the {len(said):,} tensors that "
            f"{index.name} names: {some(list(map(shown, nowhere)))}",
            hint=AGAIN,
        )
    for tensor, name in said.items():
        if tensor in stored[name] and last[tensor] != name:
            raise ModelError(
                f"{index} says that {shown(tensor)} is in {name}, and {last[tensor]} has another "
                "tensor of that name",
                hint="save the model again with save_pretrained, so that each is there once",
            )


def _check_counts(file: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a config of more layers than there are tensors: lists are made of such numbers."""
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
                f"{file} says {shown(key)} is {shown(value)}, and the weights have "
                f"{tensors:,} tensors",
                hint="use the config.json that came with the weights",
            )
