"""What an option is: its name, help and valid values, declared at its field."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from batchrun.jobs.errors import OptionError

MODEL, PROMPT, OUTPUT = "Model", "Prompt", "Output"
SAMPLING = (
    "Sampling (the model's defaults: its generation config; a column of that name takes precedence)"
)
SHAPE = "Structured output (one of these; a column json_schema, regex or choices takes precedence)"
SCORES = "Scores (nothing is generated unless --max-tokens or a shape asks for it)"
NAMES = "Names (for you to find the job by)"
RUNNING = "Running (these never change an answer)"
FLEET = "Several devices or machines (these never change an answer either)"
OF_SUBMIT = (MODEL, PROMPT, SAMPLING, SHAPE, SCORES, OUTPUT, NAMES, FLEET, RUNNING)
_LABEL = 100  # characters of a job's name, or of a tag
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Kind:
    """The values that an option can have: some Python types, and a conversion.

    Args:
        types: The Python types.
        what: The kind in words.
        make: Converts a value; raises ValueError if it is invalid.
        metavar: Stands for a value in the help; None if the kind says enough.
    """

    types: tuple[type[Any], ...]
    what: str
    make: Callable[[Any], Any]
    metavar: str | None = None

    def read(self, value: Any) -> Any:
        """The converted value; raises a ValueError that says what is wrong."""
        if not isinstance(value, self.types) or isinstance(value, bool) != (bool in self.types):
            kind = self.what if self.what == "text" else f"a {self.what}"
            raise ValueError(f"{value!r} is not {kind}")
        return self.make(value)


@dataclass(frozen=True)
class Integer:
    """A whole number between two bounds, inclusive; None is no bound."""

    least: int | None = None
    most: int | None = None
    metavar = "N"

    def read(self, value: Any) -> int:
        """The number; see `Kind.read`."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{value!r} is not a whole number")
        if self.least is not None and value < self.least:
            raise ValueError(f"{value} is less than {self.least}")
        if self.most is not None and value > self.most:
            raise ValueError(f"{value} is more than {self.most}")
        return value


@dataclass(frozen=True)
class Choice:
    """One of several words, each of which stands for a value."""

    words: Mapping[str, Any]
    metavar = None

    def read(self, value: Any) -> Any:
        """The value for a word, or the value itself; see `Kind.read`."""
        if isinstance(value, str) and value in self.words:
            return self.words[value]
        if any(value is known for known in self.words.values()):
            return value
        raise ValueError(f"{value!r} is not one of {', '.join(map(repr, self.words))}")


def one_of(*words: str) -> Choice:
    """A choice of words that stand for themselves."""
    return Choice({word: word for word in words})


def size(multiple_of: int = 1) -> Kind:
    """Bytes above 0, with an optional binary unit: `256MiB`, `2G`, `1048576`."""

    def make(value: int | str) -> int:
        text = str(value).strip()
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
        if found is None:
            raise ValueError(f"{value!r} is not a size; write, for example, 256MiB or 2GiB")
        bytes_ = int(float(found[1]) * _UNITS[found[2].upper()])
        if bytes_ <= 0 or bytes_ % multiple_of:
            raise ValueError(f"{value!r} is not a positive multiple of {multiple_of} bytes")
        return bytes_

    return Kind((int, str), "size", make, "SIZE")


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"{name!r} is not a device; write auto, cpu, cuda or cuda:N")
    return name


def _devices(text: str) -> str:
    """The canonical form: `all`, `cpu:N`, or `cuda:N` for each GPU, with commas."""
    if text == "all" or re.fullmatch(r"cpu(:[1-9]\d{0,3})?", text):
        return "cpu:1" if text == "cpu" else text
    found = re.fullmatch(r"(?:cuda:)?\d{1,3}(?:,(?:cuda:)?\d{1,3})*", text)
    if found is None:
        raise ValueError(
            f"{text!r} names no devices; write all, the numbers of GPUs (0,1,2), or cpu:N for N "
            "workers on the CPU"
        )
    numbers = [int(part.removeprefix("cuda:")) for part in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{text!r} names a device twice")
    return ",".join(f"cuda:{number}" for number in numbers)


def _at_least_0(value: float | str) -> float:
    with suppress(ValueError):
        if 0 <= float(value) < 1e6:
            return float(value)
    raise ValueError(f"{value!r} is not a number of 0 or more")


def _count_or_auto(value: int | str) -> int | None:
    if value == "auto":
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{value!r} is neither auto nor a whole number of 1 or more")
    return int(value)


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return dict(value)


def _label(text: str) -> str:
    """A name or tag: one line that means something where it is printed."""
    text = text.strip()
    if not text or len(text) > _LABEL or not text.isprintable():
        raise ValueError(f"{text[:_LABEL]!r} is not one line of 1 to {_LABEL} characters")
    return text


TEXT = Kind((str, os.PathLike), "text", os.fspath)
LABEL = Kind((str,), "text", _label)
TEXT_OR_FILE = Kind((str, os.PathLike), "text", os.fspath, "TEXT|@FILE")  # a file for commands only
FLAG = Kind((bool,), "flag: True or False", bool)
NUMBER = Kind((int, float), "number", float, "X")
DEVICE = Kind((str,), "device", _device, "auto|cpu|cuda|cuda:N")
DEVICES = Kind((str,), "list of devices", _devices, "all|0,1,2|cpu:N")
AT_LEAST_0 = Kind((int, float, str), "number", _at_least_0, "X")
COUNT_OR_AUTO = Kind((int, str), "whole number or auto", _count_or_auto, "auto|N")
NAMED = Kind((Mapping,), "mapping", _as_json, "NAME=VALUE")


@dataclass(frozen=True)
class RowRule:
    """What a row's own value of a parameter, in a column of that name, must be.

    Some ranges cover only plausible values, to tell parameters from data: a column of air
    temperatures must not be taken for sampling temperatures.

    Args:
        rule: In words, to follow `must be`.
        valid: Whether a value of the option's kind is valid.
    """

    rule: str
    valid: Callable[[Any], bool] = lambda _: True


@dataclass(frozen=True)
class Option:
    """An option of a job. Its default is that of the field that declares it.

    Args:
        help: What it does, for `--help`.
        kind: Its values.
        name: Its name as a Python argument; if empty, the field's.
        flag: Its name on the command line; if empty, the name with dashes.
        short: A letter for it there.
        metavar: Stands for its value in the help; if None, the kind's.
        section: Its section in the help; if empty, the class's.
        several: Its value is a tuple of that kind; the flag can be repeated.
        row: What a row's own value, in a column of its name, must be; None if rows can't have one.
        anew: Whether `resume` may change it.
        at: The field that declares it.
        default: Its value if the user gives none.
        without: What applies then, for the help, if that is not simply `default`.
    """

    help: str
    kind: Kind | Integer | Choice = TEXT
    name: str = ""
    flag: str = ""
    short: str = ""
    metavar: str | None = None
    section: str = ""
    several: bool = False
    row: RowRule | None = None
    anew: bool = False
    at: str = ""
    default: Any = None
    without: str = ""

    def read(self, value: Any) -> Any:
        """The converted value; None is the default.

        Raises:
            OptionError: The value is invalid.
        """
        if value is None:
            return self.default
        try:
            if not self.several:
                return self.kind.read(value)
            several = value if isinstance(value, list | tuple) else [value]
            return tuple(map(self.kind.read, several))
        except ValueError as error:
            raise OptionError(f"{{{self.name}}}: {{}}", str(error)) from None


def option(
    help: str,  # noqa: A002
    kind: Kind | Integer | Choice | None = None,
    default: Any = None,
    **more: Any,
) -> Any:
    """A field that declares an option: by default text, or a flag. See `Option`."""
    kind = kind or (FLAG if isinstance(default, bool) else TEXT)
    said = {"option": Option(help, kind, **more)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=said)
    return field(default=default, metadata=said)


def number(
    help: str,  # noqa: A002
    rule: str = "a finite number",
    valid: Callable[[float], bool] = lambda value: abs(value) < 1e6,
    without: str = "",
) -> Any:
    """A numeric sampling parameter; `rule` and `valid` apply to a row's own value."""
    return option(help, NUMBER, row=RowRule(rule, valid), without=without)


def whole(
    help: str,  # noqa: A002
    rule: str,
    low: int = 0,
    high: int = 1 << 63,
    default: int | None = None,
    **more: Any,
) -> Any:
    """A whole-number parameter; a row's own value is at least `low` and below `high`."""
    row = RowRule(f"a whole number, {rule}", lambda value: low <= value < high)
    return option(help, Integer(), default, row=row, **more)


def options_of(part: Any) -> Iterator[Option]:
    """The options that a dataclass's fields declare."""
    for f in fields(part):
        if (found := f.metadata.get("option")) is not None:
            yield replace(
                found,
                name=found.name or f.name,
                flag=found.flag or f"--{(found.name or f.name).replace('_', '-')}",
                metavar=found.metavar or found.kind.metavar,
                section=found.section or part.SECTION,
                at=f.name,
                default={} if f.default is MISSING else f.default,
            )
