"""Checks one file of a model folder, safetensors or JSON, before anything loads it."""

from __future__ import annotations

import json
import os
import reprlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from batchrun.errors import ModelError, said_by

AGAIN = "download or copy it again: `hf download` resumes where it stopped"
_LFS = b"version https://git-lfs"
_HEAD = 512  # bytes: an LFS pointer is shorter
_MOST_HEADER = 100 << 20  # bytes: the limit of safetensors itself
_MOST_NAME = 255  # bytes
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 100  # characters


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype as the file names it, its shape, and its size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        """The number of elements, as the file counts them."""
        return prod(self.shape)


def check_head(file: Path) -> None:
    """Refuse what a failed download leaves in a file's place.

    Raises:
        ModelError: It is empty, a Git LFS pointer, a web page, or begins with zeros only.
        OSError: It can't be read.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    if head.startswith(_LFS):
        wanted = head.rpartition(b"size ")[2].split(b"\n")[0].decode("ascii", "replace")
        of = f" in place of {int(wanted):,}" if wanted.isdecimal() else ""
        raise ModelError(
            f"{file} is not the file itself but a Git LFS pointer to it: {size} bytes{of}",
            hint=f"get the file: git lfs pull in {file.parent}, or hf download",
        )
    if not head.strip(b"\0"):
        what = "is empty" if not size else f"begins with {len(head)} bytes of zeros"
        raise ModelError(f"{file} {what}: its download was interrupted", hint=AGAIN)
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ModelError(f"{file} is a web page saved under that name", hint=AGAIN)


def stored_in(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelError: The file is not as long as its header says, or the header is malformed: unknown
            types, offsets that overlap, leave gaps or do not fit a shape, or a duplicate name
            (https://huggingface.co/docs/safetensors).
        OSError: It can't be read.
    """
    check_head(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _MOST_HEADER or size < 8:
            raise ModelError(f"{file} ({size:,} bytes) is not a safetensors file", hint=AGAIN)
        text = opened.read(length)
    stored: dict[str, Stored] = {}
    wanted, by = 8 + length, " by its header alone"
    if len(text) == length:
        try:
            header: dict[str, Any] = json.loads(text, object_pairs_hook=_once)
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                stored[name] = Stored(entry["dtype"], tuple(entry["shape"]), end - begin)
            ends = (entry["data_offsets"][1] for entry in header.values())
            wanted, by = wanted + max(ends, default=0), ""
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"{file} is not a safetensors file: its header can't be read ({said_by(error)})",
                hint=AGAIN,
            ) from error
    if size != wanted:
        problem = "incomplete" if size < wanted else "damaged"
        raise ModelError(
            f"{file} is {problem}: it has {size:,} bytes, but should have {wanted:,}{by}",
            hint=AGAIN,
        )
    try:
        with safe_open(file, framework="np"):  # checks types, shapes and offsets
            return stored
    except SafetensorError as error:
        raise ModelError(
            f"{file} is damaged: safetensors can't read its header: {said_by(error)}", hint=AGAIN
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object in a small JSON file; empty if there is no such file.

    Raises:
        ModelError: The file holds something else.
        OSError: It can't be read.
    """
    if not file.is_file():
        return {}
    check_head(file)
    hint = f"fix it, or {AGAIN}"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}", hint=hint) from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds a {type(found).__name__}, not a JSON object", hint=hint)
    return found


def is_name(name: object, *ends: str) -> bool:
    """Whether it is the bare name of a file in the same folder, with one of these endings."""
    return (
        isinstance(name, str)
        and name.endswith(ends)
        and "/" not in name
        and name.isprintable()
        and len(os.fsencode(name)) <= _MOST_NAME
    )


def shown(value: object) -> str:
    """A value from a file, shortened to one line."""
    return _REPR.repr(value)


def some(names: list[str], most: int = 3) -> str:
    """The first few of many names."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")
