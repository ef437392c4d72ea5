"""Files that a tokenizer is read from: those of its folder, whatever its settings name.

Settings often still have the paths that some other machine read the tokenizer from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchrun.errors import ModelError
from batchrun.models.headers import AGAIN, check_head
from batchrun.models.metadata import is_name, read_metadata, shown

# The first one that is there makes the others of no account.
TOKENIZERS = ("tokenizer.json", "tekken.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
_SETTINGS = "tokenizer_config.json"
_VERSIONS = "fast_tokenizer_files"  # in the settings: names, of which the version chooses one
# Read as if they were settings: names of tokens.
_TOKENS = "special_tokens_map.json"
_TOKENIZER = "tokenizer.json"
_MOST_TOKENS = 10_000_000
_LARGE = re.compile(rb":\s*\d{8}")  # some number of that size


def check_tokenizer_files(folder: Path) -> None:
    """Check that a tokenizer's files are whole as far as their heads tell, and read as they stand.

    Raises:
        ModelError: One is something else than its name says, or has another file be read.
        OSError: One can't be read.
    """
    for file in _vocabularies(folder):
        check_head(file)
    for name in (_TOKENIZER, "vocab.json"):
        _check_ids(folder / name)
    settings = read_metadata(folder / _SETTINGS)
    versions = settings.get(_VERSIONS, [])
    if not isinstance(versions, list) or not all(is_name(name, ".json") for name in versions):
        raise _elsewhere(folder / _SETTINGS, _VERSIONS, versions)
    if settings.get("init_inputs"):
        raise _elsewhere(folder / _SETTINGS, "init_inputs", settings["init_inputs"])
    tokens = read_metadata(folder / _TOKENS)
    for key in paths_in(tokens):
        raise _elsewhere(folder / _TOKENS, key, tokens[key])


def _check_ids(file: Path) -> None:
    """Refuse a vocabulary of tokens that no model has: libraries make lists up to the last one."""
    if not file.is_file() or not _LARGE.search(data := file.read_bytes()):
        return
    try:
        found = json.loads(data)
        vocabulary = found["model"]["vocab"] if file.name == _TOKENIZER else found
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # its reader tells
    for token, number in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if isinstance(number, int) and number >= _MOST_TOKENS:
            raise ModelError(
                f"{file} says that the token {shown(token)} is number {number:,}, and a model has "
                "no so many",
                hint=AGAIN,
            )


def paths_in(settings: dict[str, Any]) -> dict[str, None]:
    """The settings of a tokenizer that name files, each with the value that names none."""
    return {
        key: None
        for key, value in settings.items()
        if isinstance(value, str) and (key.endswith("_file") or key in {"vocab", "merges"})
    }


def named_elsewhere(folder: Path) -> dict[str, None]:
    """What to tell transformers, so that it reads no files that a tokenizer's settings name."""
    return paths_in(read_metadata(folder / _SETTINGS))


def _elsewhere(file: Path, key: str, value: object) -> ModelError:
    return ModelError(
        f"{file} has the tokenizer read from elsewhere: {shown(key)} is {shown(value)}",
        hint=f"remove that from it, or {AGAIN}",
    )


def _vocabularies(folder: Path) -> Iterator[Path]:
    for pattern in TOKENIZERS:
        found = [file for file in sorted(folder.glob(pattern)) if file.is_file()]
        yield from found
        if found:
            return
