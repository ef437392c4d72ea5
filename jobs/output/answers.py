"""What answers say beyond their text: JSON, or one of some choices."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from batchrun.jobs.journal.results import Result
from batchrun.jobs.output.typed import MisfitError, ValueType, check_finite
from batchrun.jobs.rows.jsontext import parse_value
from batchrun.jobs.rows.row import valid_text

# Where this is not found, no number is beyond float64.
_FAR = re.compile(r"[eE]\+?[0-9]{2}|[0-9]{300}|NaN|Infinity")


class Parsed(NamedTuple):
    """What an answer says; all is None if there is no answer.

    Args:
        value: As JSON has it; numbers have their digits.
        stored: As Arrow takes it; None exactly if `value` is.
        error: Why there is no value.
    """

    value: Any = None
    stored: Any = None
    error: str | None = None


Parse = Callable[[Result], Parsed]


def json_parser(kind: ValueType, name: str) -> Parse:
    """Parses answers that are JSON of a type.

    An answer that was cut off counts as whole if nothing can follow what it says.

    Args:
        kind: The type.
        name: Of the column, for errors.
    """

    def parse(text: str, cut: str | None) -> Parsed:
        try:
            value = parse_value(text)
        except ValueError as error:
            return Parsed(error=cut or f"the answer {error}")
        if cut and isinstance(value, int | float) and not isinstance(value, bool):
            return Parsed(error=cut)  # digits may be missing
        try:
            if _FAR.search(text):
                check_finite(value)
            return Parsed(value, kind.fitted(value))
        except MisfitError as error:
            return Parsed(error=error.at(name))

    return _each_once(parse)


def choice_parser(choices: Sequence[str], *, own: bool) -> Parse:
    """Parses answers that are one of some choices, stored as their indices.

    An answer that was cut off counts as whole if no other choice begins with it.

    Args:
        choices: All different.
        own: Rows may have other choices, or none: any whole answer is stored as it is.
    """
    indices = {choice: i for i, choice in enumerate(choices)}
    begun = {one for one, next_one in pairwise(sorted(choices)) if next_one.startswith(one)}

    def parse(text: str, cut: str | None) -> Parsed:
        if cut and (text not in indices or text in begun):
            return Parsed(error=cut)
        if own:
            return Parsed(text, text)
        if text in indices:
            return Parsed(text, indices[text])
        return Parsed(error="the answer is not one of the job's choices")

    return _each_once(parse)


def _each_once(parse: Callable[[str, str | None], Parsed]) -> Parse:
    """Parses a result's text once, however many columns ask for it in a row.

    Args:
        parse: Takes the text, and the error to give if the answer was cut off.
    """
    last: Result | None = None
    parsed = Parsed()

    def parse_result(result: Result) -> Parsed:
        nonlocal last, parsed
        if result is not last:
            last, parsed = result, Parsed()
            if result.status == "ok" and result.text is not None:
                cut = f"the answer was cut off after {result.completion_tokens:,} tokens"
                parsed = parse(
                    valid_text(result.text), cut if result.finish_reason == "length" else None
                )
        return parsed

    return parse_result
