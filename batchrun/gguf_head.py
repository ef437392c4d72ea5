"""The head of a GGUF file, read before anybody else does: whether it is a whole model."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from batchrun.errors import ModelError
from batchrun.headers import AGAIN

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
