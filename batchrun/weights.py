"""The files of a model folder that transformers loads, looked at without loading: whole or not.

Only heads are read, so that a download that broke off is told when a job is submitted.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchrun.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Of a tokenizer; the first one that is there makes the others of no account.
TOKENIZERS = ("tokenizer.json", "tekken.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
_PAPERS = ("config.json", "generation_config.json", "tokenizer_config.json")
_LFS = b"version https://git-lfs"
_HEAD = 512  # bytes: an LFS pointer is shorter
_MOST_HEADER = 100 << 20  # bytes: safetensors itself reads no longer one
AGAIN = "download or copy it again: `hf download` goes on where it broke off"


def weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The safetensors files that transformers loads from a folder, none where it finds none.

    Raises:
        ModelError: The index of the shards can't be read.
    """
    named = config.get("transformers_weights")
    first = folder / (named if isinstance(named, str) else SINGLE)
    index = first if first.name.endswith(".index.json") else folder / INDEX
    if first != index and first.is_file():
        return [first]
    if not index.is_file():
        return []
    check_head(index)
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        return sorted(index.parent / shard for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weight files: {error!r}", hint=AGAIN) from error


def check_files(folder: Path, files: list[Path]) -> set[str]:
    """Check that weights, tokenizer and papers are whole, as far as their heads and sizes tell.

    Returns:
        The names of all tensors.

    Raises:
        ModelError: One is missing, cut short, or something else than its name says.
        OSError: One can't be read.
    """
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(files)} weight files that {INDEX} names: "
            f"{some(missing)}",
            hint="download or copy the folder again: `hf download` gets only what is missing",
        )
    for name in _PAPERS:
        read_paper(folder / name)
    for file in _vocabularies(folder):
        check_head(file)
    return {name for file in files for name in _tensor_names(file)}


def read_paper(file: Path) -> dict[str, Any]:
    """A small file of JSON, empty if there is none.

    Raises:
        ModelError: It holds something else.
        OSError: It can't be read.
    """
    if not file.is_file():
        return {}
    check_head(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{file} is not valid JSON: {error}", hint=f"mend it, or {AGAIN}"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{file} holds no JSON object but a {type(found).__name__}", hint=f"mend it, or {AGAIN}"
        )
    return found


def _vocabularies(folder: Path) -> Iterator[Path]:
    for pattern in TOKENIZERS:
        found = [file for file in sorted(folder.glob(pattern)) if file.is_file()]
        yield from found
        if found:
            return


def check_head(file: Path) -> None:
    """Refuse what a failed download leaves in a file's place.

    Raises:
        ModelError: It is empty, a pointer of Git LFS, a web page, or nothing but zeros.
        OSError: It can't be read.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    if head.startswith(_LFS):
        wanted = head.rpartition(b"size ")[2].split(b"\n")[0].decode("ascii", "replace")
        of = f" in place of {int(wanted):,}" if wanted.isdecimal() else ""
        raise ModelError(
            f"{file} is not the file itself but Git LFS's pointer to it: {size} bytes{of}",
            hint=f"get the file: git lfs pull in {file.parent}, or hf download",
        )
    if not head.strip(b"\0"):
        what = "is empty" if not size else f"begins with {len(head)} bytes of zeros"
        raise ModelError(f"{file} {what}: its download broke off", hint=AGAIN)
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ModelError(f"{file} is a web page, saved under that name", hint=AGAIN)


def _tensor_names(file: Path) -> list[str]:
    """Those in a safetensors file, which must be as long as its header says."""
    check_head(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _MOST_HEADER or size < 8:
            raise ModelError(f"{file} ({size:,} bytes) is no safetensors file", hint=AGAIN)
        text = opened.read(length)
    if len(text) < length:
        raise _cut(file, size, 8 + length, " by its header alone")
    try:
        header: dict[str, Any] = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file} is no safetensors file: its header can't be read", hint=AGAIN
        ) from error
    if size != 8 + length + end:
        raise _cut(file, size, 8 + length + end, "")
    return list(tensors)


def _cut(file: Path, size: int, wanted: int, why: str) -> ModelError:
    problem = "incomplete" if size < wanted else "damaged"
    return ModelError(
        f"{file} is {problem}: it has {size:,} bytes and should have {wanted:,}{why}", hint=AGAIN
    )


def some(names: list[str], most: int = 3) -> str:
    """The first few of many names."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


# --- GGUF ----------------------------------------------------------------------------------------

# Bytes of the values of a GGUF's metadata, by type; 8 is a string and 9 a list of one of these.
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_VALUES[12] = "d"


def is_gguf(file: Path) -> bool:
    """Whether it begins like one, whatever its name."""
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def check_gguf(file: Path, type_sizes: dict[int, tuple[int, int]]) -> None:
    """Check that a GGUF file is a whole model.

    Args:
        file: What begins like a GGUF file.
        type_sizes: Of each type of tensor, the elements and the bytes of a block.

    Raises:
        ModelError: It is cut short, or one of several parts.
        OSError: It can't be read.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            metadata, wanted = _GGUFHead(opened, size, type_sizes).read()
    except (struct.error, KeyError, OverflowError) as error:
        raise ModelError(
            f"cannot read the GGUF file {file}: it ends within its header, after {size:,} bytes",
            hint=AGAIN,
        ) from error
    parts = metadata.get("split.count") or 1
    if parts > 1:
        part = metadata.get("split.no", 0) + 1
        raise ModelError(
            f"cannot read the GGUF file {file}: it is part {part} of {parts} of a model, and "
            "batchrun reads one whole file",
            hint="merge the parts: llama-gguf-split --merge FIRST-PART.gguf whole.gguf",
        )
    if size < wanted:
        raise ModelError(
            f"cannot read the GGUF file {file}: it is incomplete, with {size:,} of {wanted:,} "
            "bytes",
            hint=AGAIN,
        )


class _GGUFHead:
    """Reads the head of a GGUF file, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

    def __init__(self, file: Any, size: int, type_sizes: dict[int, tuple[int, int]]) -> None:
        self._file, self._size = file, size
        self._blocks = type_sizes

    def read(self) -> tuple[dict[str, Any], int]:
        """The metadata that are no lists, and the bytes that the file should have."""
        _, version, tensors, entries = self._take("<4sIQQ")
        if version > 1 << 16:  # a big-endian file
            return {}, 0
        metadata = {}
        for _ in range(entries):
            key = self._text()
            metadata[key] = self._value(*self._take("<I"))
        ends = [self._tensor_end() for _ in range(tensors)]
        align = metadata.get("general.alignment") or 32
        start = -(-self._file.tell() // align) * align
        return metadata, start + max(ends, default=0)

    def _take(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self._file.read(min(struct.calcsize(layout), self._size)))

    def _text(self) -> str:
        (length,) = self._take("<Q")
        (text,) = self._take(f"<{length}s")
        return str(text, "utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._text()
        if kind != 9:
            return self._take("<" + _VALUES[kind])[0]
        inner, count = self._take("<IQ")
        if inner in _VALUES:
            self._file.seek(count * struct.calcsize("<" + _VALUES[inner]), 1)
        else:
            for _ in range(count):
                self._value(inner)
        return None

    def _tensor_end(self) -> int:
        """Where its data end, behind the begin of all data; 0 where its type is not known."""
        self._text()
        (dimensions,) = self._take("<I")
        elements = 1
        for length in self._take(f"<{dimensions}Q"):
            elements *= length
        kind, offset = self._take("<IQ")
        block, size = self._blocks.get(kind, (1, 0))
        return int(offset + elements // block * size)
