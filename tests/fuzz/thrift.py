"""Where the values lie in a structure of Thrift's compact protocol, as Parquet has them.

Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from typing import NamedTuple

_BOOLEANS, _INTEGERS, _LISTS = {1, 2}, {4, 5, 6}, {9, 10}
_BYTE, _DOUBLE, _BINARY, _STRUCT = 3, 7, 8, 12


class Span(NamedTuple):
    """Bytes of a structure.

    Args:
        kind: `integer` (a varint), `length` (of a string or a list, a varint), `type` (of a field),
            or `bytes`.
        begin: The first one.
        end: Behind the last one.
    """

    kind: str
    begin: int
    end: int


def spans(data: bytes, begin: int) -> tuple[list[Span], int]:
    """What lies in the structure that begins there, and where it ends.

    Raises:
        ValueError: There is no such structure.
    """
    found: list[Span] = []
    try:
        return found, _struct(data, begin, found)
    except IndexError:
        raise ValueError("the structure is cut short") from None


def varint(number: int) -> bytes:
    """A number of 64 bits, unsigned, as the protocol has it."""
    data = bytearray()
    number %= 1 << 64
    while number >= 128:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        number |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return number, at


def _struct(data: bytes, at: int, found: list[Span]) -> int:
    while data[at]:
        kind = data[at] & 15
        found.append(Span("type", at, at + 1))
        long = not data[at] >> 4
        at += 1
        if long:
            at = _varint(data, at)[1]
        if kind not in _BOOLEANS:  # whose value is the type
            at = _value(data, at, kind, found)
    return at + 1


def _value(data: bytes, at: int, kind: int, found: list[Span]) -> int:
    if kind in _INTEGERS:
        end = _varint(data, at)[1]
        found.append(Span("integer", at, end))
        return end
    if kind == _BINARY:
        size, end = _varint(data, at)
        found.append(Span("length", at, end))
        found.append(Span("bytes", end, end + size))
        return end + size
    if kind in _LISTS:
        size, inner, end = data[at] >> 4, data[at] & 15, at + 1
        if size == 15:
            size, end = _varint(data, end)
            found.append(Span("length", at + 1, end))
        else:
            found.append(Span("type", at, end))
        for _ in range(size):
            end = _value(data, end, inner, found)
        return end
    if kind == _STRUCT:
        return _struct(data, at, found)
    if kind == _DOUBLE:
        return at + 8
    if kind == _BYTE or kind in _BOOLEANS:
        return at + 1
    raise ValueError(f"no type {kind} is known")
