"""Foreign readers of a model's files: what they raise is told as something about these files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import tokenizers
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from batchrun.engine.core import EngineError
from batchrun.engine.shortage import device_errors
from batchrun.errors import PROCESS_ENDS, ModelError
from batchrun.models import kinds
from batchrun.models.headers import AGAIN, unlike
from batchrun.models.metadata import some
from batchrun.models.weights import check_files

TOKENIZER = "the tokenizer of "
_READERS = ("sentencepiece", "tiktoken")  # of older tokenizers


@contextmanager
def reading(name: str, path: str, what: str = "") -> Iterator[None]:
    """Whatever a reader of the user's files raises says something about these files.

    Raises:
        ModelError: They can't be read.
        EngineError: There is no memory for what is in them.
    """
    try:
        with device_errors("the weights", None):
            yield
    except (ModelError, EngineError, MemoryError, *PROCESS_ENDS):
        raise
    except BaseException as error:  # readers written in Rust panic with something else
        if os.strerror(errno.ENOMEM) in str(error):  # torch has no class of its own for it
            raise MemoryError(_first_line(error)) from error
        raise _cannot_load(name, Path(path), what, error) from error


def _cannot_load(name: str, folder: Path, what: str, error: BaseException) -> ModelError:
    """What is to blame, by the folder's metadata and the type of the error."""
    failed = f"{what}the model {name} can't be loaded: {_first_line(error)}"
    config: kinds.Config = {}
    try:
        if folder.is_dir():
            config = kinds.read_config(folder)
            if wrong := unlike(check_files(folder, config)):
                failed += f" (experts lack, or have in another shape: {some(wrong)})"
    except ModelError as reason:
        return reason
    except OSError:
        pass  # it is what has been told
    if config and "auto_map" not in config:
        unknown = _unknown_type(name, config, weights=not what)
        if unknown is not None:
            return unknown
    settings = kinds.quantisation(config)
    if what == TOKENIZER:
        hint = _tokenizer_hint(folder, error)
    elif what:
        hint = "use the one that came with the weights"
    elif settings is not None:
        failed += f" (its weights are quantised by {kinds.title(settings)})"
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
    """The first line of what an error says, and the second where the first announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    tells = isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and said
    return said if tells else f"{type(error).__name__}: {said}"


def _unknown_type(name: str, config: kinds.Config, *, weights: bool) -> ModelError | None:
    """The error for an architecture that transformers knows not, or not as a language model."""
    model_type = str(config["model_type"])
    if model_type not in CONFIG_MAPPING:
        saved = config.get("transformers_version")
        by = f"; version {saved} wrote its config.json" if saved else ""
        return ModelError(
            f"the model {name} can't be loaded: transformers {transformers.__version__} does not "
            f"know the architecture {model_type!r}{by}",
            hint="if it is a new one: pip install --upgrade transformers",
        )
    known = CONFIG_MAPPING[model_type]
    if weights and not (
        known in MODEL_FOR_CAUSAL_LM_MAPPING or known in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    ):
        return kinds.not_causal(f"the model {name}", model_type, "no causal language model")
    return None


def _tokenizer_hint(folder: Path, error: BaseException) -> str:
    if not (folder / "tokenizer.json").exists():
        lacking = [name for name in _READERS if find_spec(name) is None]
        lacks = f"pip install {' '.join(lacking)}, or " if lacking else ""
        return f"{lacks}copy the tokenizer.json of the model that it was made from"
    if isinstance(error, ImportError):
        return "install what is missing, or copy the tokenizer of the model that it was made from"
    if isinstance(error, json.JSONDecodeError):
        return f"its tokenizer.json or tokenizer_config.json is no JSON: {AGAIN}"
    return (
        f"its tokenizer.json may be newer than tokenizers {tokenizers.__version__}: "
        "pip install --upgrade tokenizers transformers, or copy it again"
    )
