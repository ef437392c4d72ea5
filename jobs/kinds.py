"""What an option is: its words, and the values that it can have. Each stands at its field."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Protocol

from batchrun.jobs.errors import OptionError

MODEL, PROMPT, OUTPUT = "Model", "Prompt", "Output"
SAMPLING = (
    "Sampling (defaults: the model's generation config; a column of the same name wins in its row)"
)
RUNNING = "Running (these never change an answer)"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Kind(Protocol):
    """The values that an option can have."""

    def read(self, value: Any) -> Any:
        """What a value means; raises ValueError, which says what is wrong with it."""


@dataclass(frozen=True)
class Text:
    """Text."""

    def read(self, value: Any) -> str:
        """The text; a path is one, too."""
        if not isinstance(value, str | os.PathLike):
            raise ValueError(f"{value!r} is no text")
        return os.fspath(value)


TEXT = Text()


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def read(self, value: Any) -> bool:
        """The flag."""
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither True nor False")
        return value


@dataclass(frozen=True)
class Integer:
    """A whole number between two, both included; None is no bound."""

    least: int | None = None
    most: int | None = None

    def read(self, value: Any) -> int:
        """The number."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{value!r} is no whole number")
        if self.least is not None and value < self.least:
            raise ValueError(f"{value} is less than {self.least}")
        if self.most is not None and value > self.most:
            raise ValueError(f"{value} is more than {self.most}")
        return value


@dataclass(frozen=True)
class Number:
    """A number."""

    def read(self, value: Any) -> float:
        """The number."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{value!r} is no number")
        return float(value)


@dataclass(frozen=True)
class Choice:
    """One of some words, each of which stands for a value."""

    words: Mapping[str, Any]

    def read(self, value: Any) -> Any:
        """The value of a word, or the value itself."""
        if isinstance(value, str) and value in self.words:
            return self.words[value]
        if any(value is known for known in self.words.values()):
            return value
        raise ValueError(f"{value!r} is not one of {', '.join(map(repr, self.words))}")


def one_of(*words: str) -> Choice:
    """A choice of words that stand for themselves."""
    return Choice({word: word for word in words})


@dataclass(frozen=True)
class Size:
    """Bytes above 0, with an optional binary unit: `256MiB`, `2G`, `1048576`."""

    multiple_of: int = 1

    def read(self, value: Any) -> int:
        """The bytes."""
        text = str(value).strip()
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
        if found is None:
            raise ValueError(f"{value!r} is no size; write for example 256MiB or 2GiB")
        size = int(float(found[1]) * _UNITS[found[2].upper()])
        if size <= 0 or size % self.multiple_of:
            raise ValueError(f"{value!r} is no positive multiple of {self.multiple_of} bytes")
        return size


@dataclass(frozen=True)
class Device:
    """A device by its name; whether it is there is found out when it is used."""

    def read(self, value: Any) -> str:
        """The name."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)):
            raise ValueError(f"{value!r} is no device; there are auto, cpu, cuda and cuda:N")
        return str(value)


@dataclass(frozen=True)
class Named:
    """Values by name, as JSON has them."""

    def read(self, value: Any) -> dict[str, Any]:
        """The values."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{value!r} has no names")
        try:
            json.dumps(dict(value), allow_nan=False)
        except (TypeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        return dict(value)


@dataclass(frozen=True)
class RowRule:
    """What a row's own value of a parameter must be, in a column of its name.

    A range is of what is plausible where that tells parameters from data: no temperature of the
    weather is to be taken for one of sampling.

    Args:
        rule: In words, behind `must be`.
        valid: Whether a value that is of the option's kind is one.
    """

    rule: str
    valid: Callable[[Any], bool] = lambda _: True


def whole(low: int, high: int, rule: str) -> RowRule:
    """Whole numbers from `low` on, below `high`."""
    return RowRule(f"a whole number, {rule}", lambda value: low <= value < high)


FINITE = RowRule("a finite number", lambda value: abs(value) < 1e6)


@dataclass(frozen=True)
class Option:
    """What a user can say of a job. Its default is that of the field at which it stands.

    Args:
        help: What it does, as `--help` says it.
        kind: Its values.
        name: As an argument in Python; that of the field where it is empty.
        flag: On the command line; the name with dashes where it is empty.
        short: A letter for it there.
        metavar: Stands for its value in help.
        section: Of the help; that of the class where it is empty.
        several: Its value is a tuple of that kind, and is repeated on the command line.
        row: What rows can say in a column of its name; None where they can't.
        anew: `resume` may say it anew.
        at: The field at which it stands.
        default: What it is where nobody says it.
    """

    help: str
    kind: Kind = TEXT
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

    def read(self, value: Any) -> Any:
        """What a value means; None is the default.

        Raises:
            OptionError: It can't be one.
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
    kind: Kind | None = None,
    default: Any = None,
    **more: Any,
) -> Any:
    """A field that is an option, text or a flag unless it is said otherwise: see `Option`."""
    kind = kind or (Flag() if isinstance(default, bool) else TEXT)
    said = {"option": Option(help, kind, **more)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=said)
    return field(default=default, metadata=said)


def options_of(part: Any) -> Iterator[Option]:
    """The options that stand at the fields of a dataclass."""
    for f in fields(part):
        if (found := f.metadata.get("option")) is not None:
            yield replace(
                found,
                name=found.name or f.name,
                flag=found.flag or f"--{(found.name or f.name).replace('_', '-')}",
                section=found.section or part.SECTION,
                at=f.name,
                default={} if f.default is MISSING else f.default,
            )
