"""What the header of a safetensors file lists, and whether the file is what it says."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from batchrun.errors import PROCESS_ENDS, ModelError, said_by

AGAIN = "download or copy it again: `hf download` goes on where it broke off"
_LFS = b"version https://git-lfs"
_HEAD = 512  # bytes: an LFS pointer is shorter
_MOST_HEADER = 100 << 20  # bytes: safetensors itself reads no longer one
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as the file calls it, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        """Numbers in it, as the file counts them."""
        return prod(self.shape)


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


def stored_in(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelError: The file is not as long as its header says, or the header is malformed: types
            that are not known, offsets that overlap, leave gaps or do not fit a shape, or a name
            that is there twice (https://huggingface.co/docs/safetensors).
        OSError: It can't be read.
    """
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
        header: dict[str, Any] = json.loads(text, object_pairs_hook=_once)
        stored = {
            name: Stored(entry["dtype"], tuple(entry["shape"]), end - begin)
            for name, entry in header.items()
            if name != "__metadata__"
            for begin, end in [entry["data_offsets"]]
        }
        ends = (header[name]["data_offsets"][1] for name in stored)
        end = max(ends, default=0)
        whole = size == 8 + length + end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{file} is no safetensors file: its header can't be read ({said_by(error)})",
            hint=AGAIN,
        ) from error
    if not whole:
        raise _cut(file, size, 8 + length + end, "")
    _check_layout(file)
    return stored


def unlike(stored: Mapping[str, Stored]) -> list[str]:
    """Tensors of experts that are missing, or have another shape than those of most experts."""
    layers: dict[str, dict[str, dict[str, Stored]]] = {}
    for name, tensor in stored.items():
        if found := _EXPERT.fullmatch(name):
            layer, expert, part = found.groups()
            layers.setdefault(layer, {}).setdefault(part, {})[expert] = tensor
    wrong = []
    for layer, parts in layers.items():
        experts = {expert for part in parts.values() for expert in part}
        for part, tensors in parts.items():
            usual = Counter(tensor.shape for tensor in tensors.values()).most_common(1)[0][0]
            wrong += [
                f"{layer}{expert}{part}"
                for expert in experts
                if expert not in tensors or tensors[expert].shape != usual
            ]
    return sorted(wrong)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _check_layout(file: Path) -> None:
    """Have the library that will read the file look at its header: types, shapes and offsets."""
    try:
        with safe_open(file, framework="np"):
            pass
    except PROCESS_ENDS:
        raise
    except SafetensorError as error:
        raise ModelError(
            f"{file} is damaged: safetensors can't read its header: {said_by(error)}", hint=AGAIN
        ) from error


def _cut(file: Path, size: int, wanted: int, why: str) -> ModelError:
    problem = "incomplete" if size < wanted else "damaged"
    return ModelError(
        f"{file} is {problem}: it has {size:,} bytes and should have {wanted:,}{why}", hint=AGAIN
    )
