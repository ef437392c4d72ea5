"""Checksums of long-lived data on disk: a flipped bit is found before it is used."""

from __future__ import annotations

import json
import marshal
from collections.abc import Mapping
from typing import Any
from zlib import crc32

_FIELD = "checksum"  # in a JSON object, over all its other fields
_MARSHAL = 2  # typed integers, floats, text and bytes; the same format since Python 2.5


def checksum(values: tuple[Any, ...]) -> int:
    """CRC-32 of a record's values, their types and their order.

    Args:
        values: Integers, floats, text, bytes and None, as SQLite returns them: a column of reals
            has no integers and no NaN.
    """
    return crc32(marshal.dumps(values, _MARSHAL))


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of its content, independent of its layout in a file."""
    return {**value, _FIELD: _of_json(json.loads(json.dumps(value)))}


def unsealed(data: bytes | str) -> dict[str, Any]:
    """The JSON object that `sealed` made, without its checksum.

    Raises:
        ValueError: It is not a JSON object, or its content has changed.
    """
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        if _FIELD not in value:
            raise ValueError("it has no checksum")
        if value.pop(_FIELD) != _of_json(value):
            raise ValueError("its checksum does not match its content")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _of_json(value: Mapping[str, Any]) -> str:
    return f"{crc32(json.dumps(value, sort_keys=True).encode()):08x}"
