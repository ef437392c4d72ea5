"""Columns of the input that hold a row's own sampling parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import pyarrow as pa

from batchrun.engine.core import SamplingParams
from batchrun.grammars.constraint import with_constraint
from batchrun.jobs.errors import InputError
from batchrun.jobs.kinds import FLAG, NUMBER, TEXT, Integer, RowRule
from batchrun.jobs.rows.arrowtypes import is_text, without_dictionary
from batchrun.jobs.rows.row import Source
from batchrun.jobs.shapes import CHOICES, REGEX, SCHEMA, choices_of, schema_text
from batchrun.jobs.spec import OPTIONS

IGNORE = "--ignore-param-columns"
_LOOKED_AT = 1000  # rows, before the job starts
_SHOWN = 60  # characters of a value, in a message
_Types = tuple[Callable[[pa.DataType], bool], ...]
_NUMBERS: _Types = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, is_text)


@dataclass(frozen=True)
class _Column:
    """What a parameter's column can hold. Numbers may also be text, as CSV has them."""

    read: Callable[[Any], Any]  # raises TypeError, ValueError or ArithmeticError if invalid
    types: _Types
    items: _Types  # types of a list's items
    must: RowRule

    def takes(self, type: pa.DataType) -> bool:  # noqa: A002 - Arrow's word
        """Whether a column of that Arrow type can hold it."""
        types = self.types
        if isinstance(type, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
            type, types = type.value_type, self.items  # noqa: A001
        kind = without_dictionary(type)
        return any(is_kind(kind) for is_kind in (pa.types.is_null, *types))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real | Decimal | str):
        raise TypeError
    if isinstance(value, str) and "_" in value:  # Python would accept that
        raise ValueError
    return float(value)


def _integer(value: Any) -> int:
    if not math.isfinite(_number(value)):
        raise ValueError
    exact = Decimal(value.strip()) if isinstance(value, str) else value
    whole = int(exact)
    if whole != exact:
        raise ValueError
    return whole


def _flag(value: Any) -> bool:
    found = {"true": True, "1": True, "false": False, "0": False}.get(
        str(value).strip().lower().removesuffix(".0")
    )
    if found is None:
        raise ValueError
    return found


def _texts(value: Any) -> tuple[str, ...]:
    """The texts, without null and empty ones: no text stops at these."""
    texts = [value] if isinstance(value, str) else [v for v in value if v is not None]
    if isinstance(value, Mapping) or not all(isinstance(text, str) for text in texts):
        raise TypeError
    return tuple(filter(None, texts))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = json.loads(value)
    return tuple(map(_integer, value if isinstance(value, list | tuple) else [value]))


# By kind, and whether there may be several.
_COLUMNS: dict[tuple[Any, bool], tuple[Callable[[Any], Any], _Types, _Types]] = {
    (Integer(), False): (_integer, _NUMBERS, ()),
    (Integer(0), True): (_ids, _NUMBERS, _NUMBERS),
    (NUMBER, False): (_number, _NUMBERS, ()),
    (FLAG, False): (_flag, (pa.types.is_boolean, *_NUMBERS), ()),
    (TEXT, True): (_texts, (is_text,), (is_text,)),
    (REGEX, False): (_text, (is_text,), ()),
    (CHOICES, False): (choices_of, (is_text,), (is_text,)),
    (SCHEMA, False): (schema_text, (is_text, pa.types.is_struct), ()),
}

# Columns of these names are the row's own sampling parameters.
OVERRIDES = {
    name: _Column(*_COLUMNS[option.kind, option.several], option.row)
    for name, option in OPTIONS.items()
    # Those of the shape of an answer are not read yet.
    if option.row is not None and (option.kind, option.several) in _COLUMNS
}


class BadParameterError(ValueError):
    """A column's value is invalid for the parameter that the column is named after.

    Args:
        value: As shown in messages.
        rule: What it must be.
    """

    def __init__(self, name: str, value: str, rule: str) -> None:
        super().__init__(
            f"the column {name} holds {value}, and {name} must be {rule}; "
            f"{IGNORE} treats such columns as data"
        )
        self.value, self.rule = value, rule


def read_parameter(name: str, value: Any) -> Any:
    """The parameter that a row's value in a column of that name sets.

    Returns:
        The parameter, or None if the row sets none and the job's value holds: for null, NaN and
        blank text, and no choices; for `stop`, where a space is text, also for a list of nulls and
        empty texts.

    Raises:
        BadParameterError: The value is invalid.
    """
    if _says_nothing(name, value):
        return None
    column = OVERRIDES[name]
    try:
        found = column.read(value)
        if column.must.valid(found):
            return None if found == () and name == "stop" else found
    except (TypeError, ValueError, ArithmeticError, RecursionError):
        pass
    raise BadParameterError(name, _shown(value), column.must.rule)


def _says_nothing(name: str, value: Any) -> bool:
    if isinstance(value, float | Decimal):
        return math.isnan(value)
    if isinstance(value, str) and name != "stop":  # `stop` may be a space, or `nan`
        return value.strip().lower() in {"", "nan"}
    return value is None or value == "" or (name == "choices" and value == [])


def param_columns(source: Source, job: Mapping[str, Any], limit: int | None = None) -> list[str]:
    """The columns of an input that act as sampling parameters, by its first rows.

    Args:
        source: The input. Leaves out columns that first appear later in it.
        job: The job's own sampling parameters, by name.
        limit: Maximum number of rows of the job.

    Raises:
        InputError: A column's type does not fit the parameter, or half of its first values don't.
    """
    names = [name for name in OVERRIDES if name in source.column_names]
    if not names:
        return []
    if source.num_rows is not None:  # else a schema would need all rows
        for name in names:
            kind, column = source.schema().field(name).type, OVERRIDES[name]
            if not column.takes(kind):
                raise column_refused(name, f"it holds {kind}, and must be {column.must.rule}")
    tallies = {name: _ColumnUse() for name in names}
    rows = 0
    for row in source.rows(names, min(_LOOKED_AT, limit or _LOOKED_AT)):
        rows += 1
        if row.error is None:
            _look(row.index, row.fields, job, tallies)
    # One bad value in many rows is only that row's error, even if no other row has a value.
    least = 1 if rows == 1 else 2
    for name, tally in tallies.items():
        if tally.bad >= max(least, tally.values / 2):
            raise column_refused(
                name,
                f"{tally.first} ({tally.bad:,} of its first {tally.values:,} values don't fit)",
            )
    return names


def parameters_taken(names: Iterable[str]) -> str:
    """The message about columns that act as sampling parameters."""
    taken = ", ".join(names)
    return f"sampling parameters taken from columns: {taken}; to treat them as data: {IGNORE}"


@dataclass
class _ColumnUse:
    """A column's values so far: how many, how many invalid, and the first invalid one."""

    values: int = 0
    bad: int = 0
    first: str = ""

    def refuse(self, what: str) -> None:
        self.bad += 1
        self.first = self.first or what


def _look(
    index: int, fields: Mapping[str, Any], job: Mapping[str, Any], tallies: Mapping[str, _ColumnUse]
) -> None:
    """Check a row's values, each alone and all together."""
    given = {}
    for name, tally in tallies.items():
        try:
            found = read_parameter(name, fields.get(name))
        except BadParameterError as error:
            tally.values += 1
            tally.refuse(f"row {index} has {error.value}, and {name} must be {error.rule}")
            continue
        if found is not None:
            tally.values += 1
            given[name] = found
    try:
        # The model's own max_tokens is not known yet.
        SamplingParams(**with_constraint({"max_tokens": 1 << 62, **job, **given}, given))
    except ValueError as error:
        name = str(error).partition(" ")[0]
        if name in given:
            tallies[name].refuse(f"in row {index}, {error}")


def column_refused(name: str, reason: str) -> InputError:
    """The error for a column named like a row's own setting whose values don't fit."""
    return InputError(
        f"the column '{name}' can't set {name} for its rows: {reason}",
        hint=f"if it is data, add {IGNORE}; otherwise correct it",
    )


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
