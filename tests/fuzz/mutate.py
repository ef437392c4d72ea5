"""Damage to bytes: bits flipped, numbers replaced, pieces cut, doubled, moved, and ends cut off."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

Mutate = Callable[[bytes, Random], bytes]

_NUMBERS = [
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    1 << 15,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 63) - 1,
]
_PIECES = [
    b"",
    b"\0",
    b"\xff",
    b"\n",
    b"\r",
    b'"',
    b"\\",
    b"{",
    b"[",
    b"," * 40,
    b"[" * 5000,
    b'{"a":' * 3000,
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"1e999",
    b"-" * 50,
    b"\x1b[2J",
    b"NaN",
    b"9" * 5000,
]
_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**400,
    -(2**63),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\x1b]0;x\x07",
    "../../etc/passwd",
    "x" * 100_000,
    "\ud800",
    [],
    {},
    [[]],
    {"a": {}},
    [None],
    [1, "a"],
]


def damaged(seed: bytes, rng: Random) -> bytes:
    """The bytes with one to four kinds of damage."""
    data = bytearray(seed)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        rng.choice(_DAMAGES)(data, rng)
    return bytes(data)


def _flip(data: bytearray, rng: Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _put_byte(data: bytearray, rng: Random) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.randrange(256)


def _put_number(data: bytearray, rng: Random) -> None:
    layout = rng.choice(["<i", "<q", ">i", "<h"])
    size = struct.calcsize(layout)
    if len(data) >= size:
        mask = (1 << 8 * size) - 1
        number = (rng.choice(_NUMBERS) & mask).to_bytes(
            size, "big" if layout[0] == ">" else "little"
        )
        at = rng.randrange(len(data) - size + 1)
        data[at : at + size] = number


def _cut_end(data: bytearray, rng: Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _cut(data: bytearray, rng: Random) -> None:
    at, length = _piece(data, rng)
    del data[at : at + length]


def _double(data: bytearray, rng: Random) -> None:
    at, length = _piece(data, rng)
    data[at:at] = data[at : at + length]


def _move(data: bytearray, rng: Random) -> None:
    at, length = _piece(data, rng)
    piece = data[at : at + length]
    del data[at : at + length]
    to = rng.randrange(len(data) + 1)
    data[to:to] = piece


def _zero(data: bytearray, rng: Random) -> None:
    at, length = _piece(data, rng)
    data[at : at + length] = bytes(len(data[at : at + length]))


def _insert(data: bytearray, rng: Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(_PIECES)


def _piece(data: bytearray, rng: Random) -> tuple[int, int]:
    at = rng.randrange(len(data) + 1)
    return at, rng.choice([1, 2, 4, 8, 16, 64, 512, 4096, len(data)])


_DAMAGES = [
    _flip,
    _flip,
    _put_byte,
    _put_number,
    _cut_end,
    _cut,
    _double,
    _move,
    _zero,
    _insert,
]


def json_damaged(seed: bytes, rng: Random) -> bytes:
    """A JSON document with values replaced, dropped, renamed or nested; now and then its bytes.

    One that can't be written, being nested too deep or a number too large, is deeper still.
    """
    if rng.random() < 0.25:
        return damaged(seed, rng)
    try:
        document = json.loads(seed)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            document = _with_other_value(document, rng)
        return json.dumps(document).encode()
    except (RecursionError, OverflowError):
        return seed[:1] + b'"x":' + b"[" * 100_000
    except ValueError:  # it is damaged by now
        return damaged(seed, rng)


def _with_other_value(document: Any, rng: Random) -> Any:
    places: list[tuple[Any, Any]] = []
    _collect(document, places)
    if not places:
        return deepcopy(rng.choice(_VALUES))
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        deep: Any = holder[key]
        for _ in range(rng.choice([1, 3, 900])):
            deep = [deep]
        holder[key] = deep
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(["", "x", key + "s", key.upper(), "\x1b[31m"])] = holder.pop(key)
    elif kind == 3:
        holder[key] = rng.choice(places)[0]
        try:  # it may contain itself now
            return json.loads(json.dumps(document))
        except (ValueError, RecursionError):
            holder[key] = None
    elif kind == 4 and isinstance(holder[key], int | float):
        holder[key] = rng.choice([-1, 2, 1000, 10**6, 0.5]) * holder[key]
    else:
        holder[key] = deepcopy(rng.choice(_VALUES))  # which is changed next, and may be put into
    return document


def _collect(value: Any, places: list[tuple[Any, Any]], most: int = 4000) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        if len(places) < most:
            places.append((value, key))
            if isinstance(inner, dict | list):
                _collect(inner, places, most)
