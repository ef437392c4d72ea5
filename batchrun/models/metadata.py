"""Small files of JSON in a model folder, and what they say, fit for a message."""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any

from batchrun.errors import ModelError
from batchrun.models.headers import AGAIN, check_head

_MOST_NAME = 255  # bytes
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 100  # characters


def read_metadata(file: Path) -> dict[str, Any]:
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
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} is not valid JSON: {error}", hint=f"mend it, or {AGAIN}"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{file} holds no JSON object but a {type(found).__name__}", hint=f"mend it, or {AGAIN}"
        )
    return found


def is_name(name: object, *ends: str) -> bool:
    """Whether it names a file in the same folder, with one of these ends, and no other place."""
    return (
        isinstance(name, str)
        and name.endswith(ends)
        and "/" not in name
        and name.isprintable()
        and len(os.fsencode(name)) <= _MOST_NAME
    )


def shown(value: object) -> str:
    """What a file says, cut short, in one line."""
    return _REPR.repr(value)


def some(names: list[str], most: int = 3) -> str:
    """The first few of many names."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")
