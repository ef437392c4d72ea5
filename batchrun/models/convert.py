"""A GGUF file, made into a folder of safetensors once: exact weights, its own tokenizer."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from batchrun.errors import PROCESS_ENDS, ModelError, said_by
from batchrun.jobs.files import close_to_others, make_folders, open_private, private_mode
from batchrun.models.gguf_head import check_gguf


def convert_once(file: Path, final: Path) -> None:
    """Converts `file` into the folder `final` unless another process has done it meanwhile.

    The folder appears whole or not at all, whatever is killed when.

    Raises:
        ModelError: The file is no GGUF that can be read right, or a package to read it is missing.
        OSError: `final` cannot be written.
    """
    make_folders(final.parent)
    with open(final.parent / ".lock", "w", opener=open_private) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.is_dir():
            _convert_atomically(file, final)


def check_ours(final: Path) -> None:
    """Refuse a converted model that somebody else may have put there, and shut out others.

    Where the folder of such models is shared with a group by its setgid bit, it is the group's.

    Raises:
        ModelError: The message names the folder or file.
    """
    close_to_others(final.parent)
    if final.parent.stat().st_mode & stat.S_ISGID:
        return
    for place in (final.parent, final, *final.iterdir()):
        owner = place.stat().st_uid
        if owner not in {0, os.geteuid()}:
            raise ModelError(
                f"{place}, part of a converted model, belongs to user {owner}, who may have put "
                "another model there",
                hint=f"remove it, and it is converted again: rm -r '{final}'",
            )


def _convert_atomically(file: Path, final: Path) -> None:
    """Converts beside `final` and renames, so that `final` is whole or absent. Call it locked."""
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(
        partial, ignore_errors=True
    )  # what a killed process left; the lock says it is dead
    partial.mkdir(private_mode(partial.parent))
    try:
        _convert(file, partial)
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        partial.rename(final)
        _fsync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _convert(file: Path, folder: Path) -> None:
    """Writes the dequantised model of a GGUF file and its tokenizer into `folder`.

    The weights become float32: a block's `scale * integer + minimum` is rounded by float16 and
    bfloat16 (in the embedded model in 42% and 79% of all weights), by float32 in none.
    """
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading the GGUF file {file} needs {' and '.join(missing)}, not installed here",
            hint="pip install 'batchrun-llm[gguf]'",
        )
    import torch  # noqa: PLC0415
    from gguf import GGML_QUANT_SIZES, GGUFReader  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    from batchrun.models.bounded import bounded  # noqa: PLC0415
    from batchrun.models.whole import check_whole  # noqa: PLC0415

    blocks = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    stored = check_gguf(file, blocks)
    # Alone in a folder, or what lies beside it would be read, too.
    alone = folder / "source"
    alone.mkdir()
    (alone / file.name).symlink_to(file.absolute())
    with _quiet_transformers():
        with _readers_of(file):
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=file.name)
            with bounded(stored.values(), quantised=False):
                read: Any = AutoModelForCausalLM.from_pretrained(
                    alone,
                    gguf_file=file.name,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
            model, info = read
            check_whole(model, info, str(file))
            fields = GGUFReader(file).fields
            _set_special_tokens(tokenizer, fields)
            _set_pre_tokenizer(tokenizer, fields, file)
        shutil.rmtree(alone)
        # Its weights are plain float32 now, but the model remembers that it came from a quantised
        # file and would refuse to be saved.
        model.hf_quantizer = None
        model.is_quantized = False
        vars(model).pop("quantization_method", None)
        vars(model.config).pop("quantization_config", None)
        with _readers_of(file, OSError):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


@contextmanager
def _readers_of(file: Path, but: type[Exception] = ModelError) -> Iterator[None]:
    """Whatever they raise is about the file, but for what is told: they raise anything at all."""
    try:
        yield
    except (ModelError, MemoryError, but, *PROCESS_ENDS):
        raise
    except BaseException as error:
        raise ModelError(
            f"cannot read the GGUF file {file}: {said_by(error)}",
            hint="it has all its bytes: use the model's safetensors instead",
        ) from error


def _set_special_tokens(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Names the special tokens as the file does: older transformers take one for the other."""
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        token = None if field is None else tokenizer.convert_ids_to_tokens(int(field.contents()))
        if token is not None and getattr(tokenizer, name) != token:
            setattr(tokenizer, name, token)


def _set_pre_tokenizer(tokenizer: Any, fields: Mapping[str, Any], file: Path) -> None:
    """Splits text as the model's own tokenizer does, where transformers does not know how.

    A GGUF names its splitting rule (`tokenizer.ggml.pre`). transformers knows most names and falls
    back on GPT-2's rule for the rest, which gives other tokens for some texts, silently.
    """
    from tokenizers import pre_tokenizers  # noqa: PLC0415
    from transformers.integrations.gguf import gguf_tokenizer_mapping  # noqa: PLC0415

    family, rule = (
        field.contents() if (field := fields.get(key)) else None
        for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    known = getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", None)
    if family == "gpt2" and known is None:  # a release without that table
        _set_byte_level(tokenizer)
    if family != "gpt2" or rule in (known or {}) or rule in {"gpt-2", "gpt2"}:
        return
    if rule not in {"smollm", "starcoder", "refact", "command-r"}:
        raise ModelError(
            f"the GGUF file {file} splits text by the rule {rule!r}, which is not known here, "
            "so its prompts would be tokenised wrongly",
            hint="use the same model in safetensors",
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _set_byte_level(tokenizer: Any) -> None:
    """Makes byte-level BPE of what older transformers read as SentencePiece's, in part.

    They make the end token of bytes that have no token; in the model's own tokenizer these vanish.
    """
    from tokenizers import decoders  # noqa: PLC0415

    backend = tokenizer.backend_tokenizer
    backend.model.unk_token = None
    backend.model.fuse_unk = backend.model.byte_fallback = False
    backend.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as untyped  # noqa: PLC0415

    logging: Any = untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Its GGUF reader draws a bar of its own, whatever is set.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
