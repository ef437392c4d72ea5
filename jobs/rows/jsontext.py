"""JSON as found in practice: read without changing a digit, written for every reader.

A value that is only carried along keeps its text. For what some JSON readers would refuse there is
one rule each:

* NaN, infinities, and numbers beyond float64's range (1e400) become null;
* if an object has a name twice, the last value counts;
* a lone surrogate in a string becomes U+FFFD.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from batchrun.jobs.rows.row import valid_text

_LEAST = sys.float_info.min  # below it a float64 has fewer and fewer digits
_MAX_DEPTH = 64  # levels, well below where Python's own JSON gives up
_FAR = re.compile(r"[eE]\+?[0-9]{3}|[0-9]{309}")
_LONE = re.compile(
    r"\\\\u"  # an escaped backslash, after which there is no surrogate
    r"|\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]"
)
_LINE_ENDS = re.compile(r"[\r\n]+")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STRING = json.JSONEncoder(ensure_ascii=False).encode
# A fast `encode` for values that need none of the rules.
encode_plain = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


class Number(float):
    """A JSON number with its text, which may say more than a float64 holds."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Number:
        """The number that a text stands for."""
        self = super().__new__(cls, text)
        self.text = text
        return self

    def __str__(self) -> str:
        return self.text

    @property
    def exact(self) -> bool:
        """Whether a float64 holds the same value; up to 17 digits, it is taken to."""
        if not math.isfinite(self):
            return False
        digits = self.text.partition("e")[0].partition("E")[0].lstrip("-0.")
        if len(digits) <= 18 and (abs(self) >= _LEAST or not digits):  # 17 and a point
            return True
        from decimal import Decimal, InvalidOperation  # noqa: PLC0415 - seldom

        try:
            return Decimal(self.text) == Decimal(repr(float(self)))
        except InvalidOperation:  # of 1e-9999999999999999999: that is not 0
            return False


class _MinusZero(int):
    """-0, which is an integer in JSON."""

    def __str__(self) -> str:
        return "-0"


class _Repeated(Exception):  # noqa: N818 - caught below
    """An object has a name twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Repeated
    return found


def _number(text: str) -> Number | None:
    number = Number(text)
    return number if math.isfinite(number) else None


def _integer(text: str) -> int:
    return _MinusZero() if text == "-0" else int(text)


def _no_number(name: str) -> None:
    """NaN, Infinity or -Infinity."""


_READ = json.JSONDecoder(parse_float=_number, parse_constant=_no_number)
_CHECK = json.JSONDecoder(object_pairs_hook=_once)
_EXACT = json.JSONDecoder(parse_float=Number, parse_constant=Number)
_READ_MINUS_ZERO = json.JSONDecoder(
    parse_float=_number, parse_int=_integer, parse_constant=_no_number
)


def parse_object(text: str) -> dict[str, Any]:
    """The object in a JSON text. Its numbers, as `str`, are as they were written.

    Strings are valid Unicode; NaN, infinities and numbers beyond float64 are None.

    Raises:
        ValueError: It is not an object, or can't be read; the message says why.
    """
    fields = _decode(_READ_MINUS_ZERO if "-0" in text else _READ, text)
    if not isinstance(fields, dict):
        raise ValueError(f"is not a JSON object but {_NAMES.get(type(fields), 'a number')}")
    if _deep(text, fields):
        raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep")
    return dict(_valid(fields)) if _SURROGATE.search(text) else fields


def parse_value(text: str) -> Any:
    """The value of a JSON text: `Number` for numbers that are no integers, strings valid Unicode.

    Of NaN, infinities and numbers beyond float64, the `Number` is not finite.

    Raises:
        ValueError: It can't be read; the message says why.
    """
    value = _decode(_EXACT, text)
    if _deep(text, value):
        raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep")
    return _valid(value) if _SURROGATE.search(text) else value


def _deep(text: str, value: Any) -> bool:
    return text.count("[") + text.count("{") > _MAX_DEPTH and _too_deep(value)


def _decode(decoder: json.JSONDecoder, text: str) -> Any:
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise ValueError(f"is not valid JSON: {what} at character {error.pos + 1}") from error
    except RecursionError:
        raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep") from None
    except ValueError as error:  # Python's limit on digits, against quadratic time
        raise ValueError("is not valid JSON: a number has over 4300 digits") from error


_NAMES = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _valid(value: Any) -> Any:
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, list):
        return [_valid(item) for item in value]
    if isinstance(value, dict):
        return {valid_text(key): _valid(item) for key, item in value.items()}
    return value


def carried(text: str, taken: Iterable[str] = ()) -> str | None:
    """The text of a JSON object on one line; None if some reader might refuse it as it is.

    Args:
        text: What should be an object.
        taken: Names that it must not have.
    """
    if _suspect(text):
        return None
    try:
        fields = _CHECK.decode(text)
    except (ValueError, RecursionError, _Repeated):
        return None
    if not isinstance(fields, dict) or not fields.keys().isdisjoint(taken) or _deep(text, fields):
        return None
    return " ".join(filter(None, (line.strip() for line in _LINE_ENDS.split(text))))


def _suspect(text: str) -> bool:
    """Whether a JSON text may need one of the rules, apart from repeated names."""
    return (
        "NaN" in text
        or "Infinity" in text
        or ("\\u" in text and _LONE.search(text) is not None)
        or _FAR.search(text) is not None
    )


def encode(value: Any) -> str:
    """JSON of a value by the rules above. Numbers that were read keep their digits."""
    if isinstance(value, str):
        return _STRING(valid_text(value))
    if isinstance(value, dict):
        items = (f"{encode(str(key))}: {encode(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(encode, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = str(value)
    far = isinstance(value, float) or len(text) > 308
    return text if not far or math.isfinite(float(text)) else "null"


def as_text(value: Any) -> str | None:
    """A value as text: strings as they are, numbers as written, all else as JSON; null is None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return encode(value)
    return str(value) if isinstance(value, int | Number) or math.isfinite(value) else None


def with_more(text: str, more: Mapping[str, Any]) -> str:
    """The text of a JSON object with more fields added."""
    if not more:
        return text
    head = text[:-1].rstrip()
    return f"{head}{'' if head == '{' else ', '}{encode(dict(more))[1:]}"
