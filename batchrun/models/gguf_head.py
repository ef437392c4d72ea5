"""The head of a GGUF file, read before anybody else does: whether it is a whole model."""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from batchrun.errors import ModelError
from batchrun.models.headers import AGAIN, Stored
from batchrun.models.metadata import shown

_LAST_VERSION = 3
_ALIGNMENT = 32  # bytes, where a file does not say
_MOST_DIMENSIONS = 4
_DEEPEST = 8  # lists of lists
# Bytes of the values of a GGUF's metadata, by type, but for strings and lists of any type.
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_VALUES[12] = "d"
_STRING, _LIST = 8, 9


def is_gguf(file: Path) -> bool:
    """Whether it begins like one, whatever its name."""
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def check_gguf(file: Path, type_sizes: dict[int, tuple[int, int]]) -> dict[str, Stored]:
    """Check that a GGUF file is a whole model.

    Args:
        file: What begins like a GGUF file.
        type_sizes: Of each type of tensor, the elements and the bytes of a block.

    Returns:
        Its tensors by name; the bytes are those of float32, which they are converted to.

    Raises:
        ModelError: It is cut short, malformed, or one of several parts.
        OSError: It can't be read.
    """
    size = file.stat().st_size

    def unreadable(why: object, hint: str = AGAIN) -> ModelError:
        return ModelError(f"cannot read the GGUF file {file}: {why}", hint=hint)

    try:
        with file.open("rb") as opened:
            metadata, stored, wanted = _GGUFHead(opened, size, type_sizes).read()
    except _MalformedError as error:
        raise unreadable(error) from error
    except struct.error as error:
        raise unreadable(f"it ends within its header, after {size:,} bytes") from error
    parts = metadata.get("split.count") or 1
    if isinstance(parts, int) and parts > 1:
        part = metadata.get("split.no", 0)
        which = f"part {part + 1}" if isinstance(part, int) else "a part"
        raise unreadable(
            f"it is {which} of {parts} of a model, and batchrun reads one whole file",
            "merge the parts: llama-gguf-split --merge FIRST-PART.gguf whole.gguf",
        )
    if size < wanted:
        raise unreadable(f"it is incomplete, with {size:,} of {wanted:,} bytes")
    layers = f"{metadata.get('general.architecture')}.block_count"
    count = metadata.get(layers)
    if not isinstance(count, int) or count > len(stored):
        raise unreadable(
            f"it says {shown(layers)} is {shown(count)}, and has {len(stored):,} tensors",
            "use the file of a language model, or " + AGAIN,
        )
    return stored


class _MalformedError(Exception):
    """What can't stand in a GGUF file."""


class _GGUFHead:
    """Reads the head of a GGUF file, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

    def __init__(self, file: BinaryIO, size: int, type_sizes: dict[int, tuple[int, int]]) -> None:
        self._file, self._size = file, size
        self._blocks = type_sizes
        self._order = "<"

    def read(self) -> tuple[dict[str, Any], dict[str, Stored], int]:
        """The metadata that are no lists, the tensors, and the bytes that the file should have."""
        self._take("4s")
        (version,) = self._take("I")
        if version & 0xFFFF == 0:  # of the other byte order
            self._order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if not 2 <= version <= _LAST_VERSION:
            raise _MalformedError(f"its version is {version}, which is not known here")
        tensors, entries = self._take("QQ")
        metadata = {}
        for _ in range(entries):
            key = self._text()
            if key in metadata:
                raise _MalformedError(f"it has {shown(key)} twice")
            metadata[key] = self._value(*self._take("I"))
        stored: dict[str, Stored] = {}
        ends = [self._tensor(stored) for _ in range(tensors)]
        align = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise _MalformedError(f"its alignment is {shown(align)}, which is no power of two")
        start = -(-self._file.tell() // align) * align
        return metadata, stored, start + max(ends, default=0)

    def _take(self, layout: str) -> tuple[Any, ...]:
        layout = self._order + layout
        return struct.unpack(layout, self._file.read(struct.calcsize(layout)))

    def _check_room(self, length: int) -> None:
        if length > self._size - self._file.tell():
            raise struct.error("it ends before that")

    def _text(self) -> str:
        (length,) = self._take("Q")
        self._check_room(length)
        return str(self._file.read(length), "utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _VALUES:
            return self._take(_VALUES[kind])[0]
        if kind != _LIST or depth > _DEEPEST:
            raise _MalformedError(f"a value has the type {kind}, which is not known here")
        inner, count = self._take("IQ")
        if inner in _VALUES:
            length = count * struct.calcsize(self._order + _VALUES[inner])
            self._check_room(length)
            self._file.seek(length, 1)
            return None
        for _ in range(count):
            self._value(inner, depth + 1)
        return None

    def _tensor(self, stored: dict[str, Stored]) -> int:
        """Note a tensor; returns where its data end, behind the begin of all data."""
        name = self._text()
        (dimensions,) = self._take("I")
        if name in stored or dimensions > _MOST_DIMENSIONS:
            raise _MalformedError(f"the tensor {shown(name)} is there twice, or has no shape")
        shape = self._take(f"{dimensions}Q")
        kind, offset = self._take("IQ")
        if kind not in self._blocks:
            raise _MalformedError(
                f"the tensor {shown(name)} has the type {kind}, which is not known here"
            )
        elements = prod(shape)
        block, size = self._blocks[kind]
        stored[name] = Stored(str(kind), shape, elements * 4)
        return int(offset + elements // block * size)
