"""From the options for the shape of an answer to a constraint: a grammar that llguidance reads.

Loads llguidance (https://github.com/guidance-ai/llguidance) only if there is a constraint.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from batchrun.grammars.schema import kept

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

CHOICES = "["  # begins a constraint that is a JSON array of choices: its grammar is the model's
SHAPES = ("json_schema", "json_object", "regex", "choices", "grammar")
_ANY_OBJECT = '{"type": "object"}'
# JSON as Python's json.dumps writes it, which models have seen most.
_JSON: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_REMEMBERED = 1024
_FUEL = 10_000_000  # for compiling: a fifth of a second, or a choice of 100,000 texts
_WIDEST = 100_000  # what may come next at one place: objects of 10,000 optional properties
_SAID = 300  # characters of a reason
_PLACE = re.compile(r"^at \d+\(\d+\): | \(in regex\)")
_COMPILE_S = 30  # what compiles at all takes milliseconds, seldom a second


def with_constraint(values: Mapping[str, Any], own: Collection[str] = ()) -> dict[str, Any]:
    """Sampling parameters whose shape of the answer, if any, has become their `constraint`.

    Args:
        values: By the names of the options.
        own: The names that a row sets itself: its own shape replaces the job's.

    Raises:
        ValueError: There are two shapes, or one that can't be kept; the message begins with its
            name.
    """
    rest = {name: value for name, value in values.items() if name not in SHAPES}
    given = [name for name in SHAPES if values.get(name)]
    given = [name for name in given if name in own] or given
    if len(given) > 1:
        raise ValueError(f"{given[1]} can't be combined with {given[0]}: an answer has one shape")
    for name in given:
        try:
            rest["constraint"] = constraint_of(name, values[name])
        except ValueError as error:
            raise ValueError(f"{name} can't be enforced: {error}") from None
    return rest


@lru_cache(_REMEMBERED)
def constraint_of(name: str, value: Any) -> str:
    """The constraint for a shape: one of `SHAPES`, and the option's value.

    Raises:
        ValueError: It can't be kept; the message says why.
    """
    return _MADE[name](value)


@lru_cache(_REMEMBERED)
def problem(constraint: str) -> str | None:
    """Why a constraint can't be kept, whatever the model; None if it can."""
    from llguidance import LLMatcher  # noqa: PLC0415

    if constraint.startswith(CHOICES):
        return None

    def found() -> str | None:
        failed, said = LLMatcher.validate_grammar_with_warnings(constraint, None, limits=limits())
        return reason(said[0]) if failed else None

    return in_time(found)


def in_time(found: Callable[[], str | None]) -> str | None:
    """What `found` returns, or that it takes too long; it is then left to itself.

    Its thread can't be ended, so this is for processes that end soon because of it.
    """
    told: Future[str | None] = Future()

    def work() -> None:
        try:
            told.set_result(found())
        except BaseException as error:
            told.set_exception(error)

    threading.Thread(target=work, name="compile", daemon=True).start()
    try:
        return told.result(timeout=_COMPILE_S)
    except TimeoutError:
        return f"compiling it takes more than {_COMPILE_S} s"


def limits() -> Any:
    """What compiling a constraint, and each mask, may cost: in llguidance's units of work.

    They bound the time, and unlike time they are the same on every machine.
    """
    from llguidance import LLParserLimits  # noqa: PLC0415

    return LLParserLimits(verbose_errors=False, initial_lexer_fuel=_FUEL, max_items_in_row=_WIDEST)


def reason(said: str) -> str:
    """What llguidance says of a problem, on one line."""
    if said.startswith("NoExtensionBias"):
        return "it allows no answer"
    said = _PLACE.sub("", said).replace("Unimplemented keys:", "unsupported keywords:")
    lines = [line.strip() for line in said.splitlines()] or ["it can't be read"]
    found = next((line for line in lines if line.startswith("error:")), "")
    text = lines[0].rstrip(":") + (f": {found[7:]}" if found else "")
    return text if len(text) <= _SAID else f"{text[: _SAID - 3]}..."


def _of_schema(text: str) -> str:
    from llguidance import LLMatcher  # noqa: PLC0415

    schema, escapes = kept(json.loads(text))
    options: JsonCompileOptions = {**_JSON, "json_allowed_escapes": escapes}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def _of_regex(text: str) -> str:
    from llguidance import LLMatcher  # noqa: PLC0415

    return LLMatcher.grammar_from_regex(text)


_MADE: dict[str, Callable[[Any], str]] = {
    "json_schema": _of_schema,
    "json_object": lambda _: _of_schema(_ANY_OBJECT),
    "regex": _of_regex,
    "choices": json.dumps,
    "grammar": lambda text: f" {text}" if text.startswith(CHOICES) else text,
}
