"""Checks a GGUF file and converts it, once, to a folder of safetensors with its own tokenizer."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from batchrun import platforms
from batchrun.errors import PROCESS_ENDS, ModelError, said_by
from batchrun.jobs.files import close_to_others, make_folders, open_private, private_mode
from batchrun.models.files import AGAIN, Stored, shown

_LAST_VERSION = 3
_ALIGNMENT = 32  # bytes, unless the file says otherwise
_MOST_DIMENSIONS = 4
_DEEPEST = 8  # nested lists
# The layout of each type of value, except strings and lists.
_VALUES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _LIST = 8, 9


def is_gguf(file: Path) -> bool:
    """Whether a file begins like a GGUF, whatever its name."""
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def check_gguf(file: Path, type_sizes: dict[int, tuple[int, int]]) -> dict[str, Stored]:
    """Check that a GGUF file is a whole model, before any library reads it.

    Args:
        file: A file that begins like a GGUF.
        type_sizes: For each tensor type, the elements and the bytes of a block.

    Returns:
        Its tensors by name; `nbytes` is their size in float32, which they are converted to.

    Raises:
        ModelError: It is cut short, malformed, or one of several parts.
        OSError: It can't be read.
    """
    size = file.stat().st_size

    def unreadable(why: object, hint: str = AGAIN) -> ModelError:
        return ModelError(f"cannot read the GGUF file {file}: {why}", hint=hint)

    with file.open("rb") as opened:
        head = _Head(opened, size, type_sizes)
        try:
            wanted = head.read()
        except ValueError as error:
            raise unreadable(error) from error
        except struct.error as error:
            raise unreadable(f"it ends within its header, after {size:,} bytes") from error
    metadata, stored = head.metadata, head.stored
    parts = metadata.get("split.count") or 1
    if isinstance(parts, int) and parts > 1:
        part = metadata.get("split.no", 0)
        which = f"part {part + 1}" if isinstance(part, int) else "a part"
        raise unreadable(
            f"it is {which} of {parts} of a model, but batchrun reads one whole file",
            "merge the parts: llama-gguf-split --merge FIRST-PART.gguf whole.gguf",
        )
    if size < wanted:
        raise unreadable(f"it is incomplete, with {size:,} of {wanted:,} bytes")
    layers = f"{metadata.get('general.architecture')}.block_count"
    count = metadata.get(layers)
    if not isinstance(count, int) or count > len(stored):
        raise unreadable(
            f"it says {shown(layers)} is {shown(count)}, but has {len(stored):,} tensors",
            "use the file of a language model, or " + AGAIN,
        )
    return stored


class _Head:
    """Reads the head of a GGUF file, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Its methods raise ValueError for invalid content, and struct.error if the file ends.

    Attributes:
        metadata: Values by key; None for lists.
        stored: The tensors by name.
    """

    def __init__(self, file: BinaryIO, size: int, type_sizes: dict[int, tuple[int, int]]) -> None:
        self.metadata: dict[str, Any] = {}
        self.stored: dict[str, Stored] = {}
        self._file, self._size, self._blocks = file, size, type_sizes
        self._order = "<"

    def read(self) -> int:
        """Read the whole head; returns the size in bytes that the file should have."""
        _, version = self._take("4sI")
        if version & 0xFFFF == 0:  # of the other byte order
            self._order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if not 2 <= version <= _LAST_VERSION:
            raise ValueError(f"its version is {version}, which is not supported")
        tensors, entries = self._take("QQ")
        for _ in range(entries):
            key = self._text()
            if key in self.metadata:
                raise ValueError(f"its key {shown(key)} appears twice")
            self.metadata[key] = self._value(*self._take("I"))
        ends = [self._tensor() for _ in range(tensors)]
        align = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise ValueError(f"its alignment is {shown(align)}, which is not a power of two")
        start = -(-self._file.tell() // align) * align
        return start + max(ends, default=0)

    def _take(self, layout: str) -> tuple[Any, ...]:
        layout = self._order + layout
        return struct.unpack(layout, self._file.read(struct.calcsize(layout)))

    def _room(self, length: int) -> int:
        if length > self._size - self._file.tell():
            raise struct.error("it ends before that")
        return length

    def _text(self) -> str:
        return str(self._file.read(self._room(*self._take("Q"))), "utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        """The next value; None for a list, which is skipped."""
        if kind == _STRING:
            return self._text()
        if kind in _VALUES:
            return self._take(_VALUES[kind])[0]
        if kind != _LIST or depth > _DEEPEST:
            raise ValueError(f"a value has the type {kind}, which is not supported")
        inner, count = self._take("IQ")
        if inner in _VALUES:
            self._file.seek(self._room(count * struct.calcsize("=" + _VALUES[inner])), 1)
            return None
        for _ in range(count):
            self._value(inner, depth + 1)
        return None

    def _tensor(self) -> int:
        """Note a tensor; returns where its data ends, relative to the start of all data."""
        name = self._text()
        (dimensions,) = self._take("I")
        if name in self.stored or dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"the tensor {shown(name)} appears twice, or has too many dimensions")
        shape = self._take(f"{dimensions}Q")
        kind, offset = self._take("IQ")
        if kind not in self._blocks:
            raise ValueError(
                f"the tensor {shown(name)} has the type {kind}, which is not supported"
            )
        block, size = self._blocks[kind]
        self.stored[name] = Stored(str(kind), shape, prod(shape) * 4)
        return int(offset + prod(shape) // block * size)


# --- conversion ---


def convert_once(file: Path, final: Path) -> None:
    """Convert `file` to the folder `final` unless another process has done it meanwhile.

    The folder appears whole or not at all, even if a process is killed.

    Raises:
        ModelError: The file can't be read correctly, or a package to read it is missing.
        OSError: `final` cannot be written.
    """
    make_folders(final.parent)
    with open(final.parent / ".lock", "w", opener=open_private) as lock:
        platforms.flock(lock)
        if final.is_dir():
            return
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process: we hold the lock
        partial.mkdir(private_mode(partial.parent))
        try:
            _convert(file, partial)
            for path in (*partial.rglob("*"), partial):
                _fsync(path)
            partial.rename(final)
            _fsync(final.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _fsync(path: Path) -> None:
    if platforms.WINDOWS:  # it syncs no folder, and no file opened for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_ours(final: Path) -> None:
    """Refuse a converted model that another user may have put there, and make its folder private.

    A folder that its setgid bit shares with a group is trusted as it is.

    Raises:
        ModelError: The message names the folder or file.
    """
    close_to_others(final.parent)
    if platforms.WINDOWS or final.parent.stat().st_mode & stat.S_ISGID:
        return
    for place in (final.parent, final, *final.iterdir()):
        owner = place.stat().st_uid
        if owner not in {0, os.geteuid()}:
            raise ModelError(
                f"{place}, part of a converted model, belongs to user {owner}, who may have put "
                "another model there",
                hint=f"remove it to have it converted again: rm -r '{final}'",
            )


def _convert(file: Path, folder: Path) -> None:
    """Write the dequantised model of a GGUF file and its tokenizer into `folder`.

    The weights become float32, which holds each block's `scale * integer + minimum` exactly;
    float16 and bfloat16 would round 42% and 79% of the embedded model's weights.
    """
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading the GGUF file {file} needs {' and '.join(missing)}, not installed",
            hint="pip install 'batchrun-llm[gguf]'",
        )
    import torch  # noqa: PLC0415
    from gguf import GGML_QUANT_SIZES, GGUFReader  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    from batchrun.models.whole import bounded, check_whole  # noqa: PLC0415

    stored = check_gguf(file, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    # Alone in a folder, or transformers would also read the files beside it.
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
    """Turn whatever its readers raise into an error about the file, except `but` and our own."""
    try:
        yield
    except (ModelError, MemoryError, but, *PROCESS_ENDS):
        raise
    except BaseException as error:
        raise ModelError(
            f"cannot read the GGUF file {file}: {said_by(error)}",
            hint="its size is right, so it is not cut short: use the model's safetensors instead",
        ) from error


def _set_special_tokens(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Set the special tokens that the file names: older transformers confuse them."""
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        token = None if field is None else tokenizer.convert_ids_to_tokens(int(field.contents()))
        if token is not None and getattr(tokenizer, name) != token:
            setattr(tokenizer, name, token)


def _set_pre_tokenizer(tokenizer: Any, fields: Mapping[str, Any], file: Path) -> None:
    """Split text as the model's own tokenizer does, if transformers does not know how.

    A GGUF names its splitting rule (`tokenizer.ggml.pre`). transformers knows most names and
    silently falls back on GPT-2's rule for the rest, which gives other tokens for some texts.
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
            f"the GGUF file {file} names the pre-tokenizer {rule!r}, which batchrun does not know: "
            "its prompts would be tokenised wrongly",
            hint="use the same model in safetensors",
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _set_byte_level(tokenizer: Any) -> None:
    """Restore byte-level BPE, parts of which older transformers read as SentencePiece.

    They turn bytes without a token into the end token; the model's own tokenizer drops them.
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
    with ExitStack() as undo:
        undo.callback(logging.set_verbosity, logging.get_verbosity())
        if logging.is_progress_bar_enabled():
            undo.callback(logging.enable_progress_bar)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        # Its GGUF reader draws a progress bar of its own regardless.
        undo.enter_context(redirect_stderr(io.StringIO()))
        yield
