"""How the options for the shape of an answer are read, from options and from rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from batchrun.jobs.kinds import Kind

_MEANT = {"const", "default", "enum", "examples"}  # keys whose value may be null


def schema_text(value: Any) -> str:
    """A JSON schema as JSON on one line, with its keys in their order.

    Args:
        value: An object, or its JSON; or a class with `model_json_schema`, as in pydantic.

    Raises:
        ValueError: It is no JSON object.
    """
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    try:
        found = json.loads(value) if isinstance(value, str) else _without_nulls(value)
        if not isinstance(found, Mapping):
            raise ValueError("a schema must be an object")
        text = json.dumps(found, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"this is not a JSON schema: {error}") from None
    return text


def _without_nulls(value: Any) -> Any:
    """A value without its absent keys, which in a column of structs are null."""
    if isinstance(value, Mapping):
        kept = ((k, v) for k, v in value.items() if v is not None or k in _MEANT)
        return {k: v if k in _MEANT else _without_nulls(v) for k, v in kept}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def choices_of(value: Any, what: str = "choice") -> tuple[str, ...]:
    """Choices, or labels, from a list of texts, a JSON array, or text separated by commas.

    Raises:
        ValueError: There are none, one is empty or no text, or one is there twice.
    """
    if isinstance(value, str):
        try:
            found = json.loads(value) if value.lstrip().startswith("[") else None
        except (ValueError, RecursionError):
            found = None
        value = found if found is not None else [part.strip() for part in value.split(",")]
    if not all(isinstance(choice, str) for choice in value):
        raise ValueError(f"each {what} must be text")
    if not value or not all(value):
        raise ValueError(f"a {what} must not be empty")
    if len(set(value)) < len(value):
        twice = next(choice for choice in value if list(value).count(choice) > 1)
        raise ValueError(f"the {what} {twice!r} appears twice")
    return tuple(value)


def _of_file(value: Any, is_text: Callable[[str], bool], what: str) -> Any:
    """The text of the file that a value names, or the value, if it is the text itself."""
    if not isinstance(value, str | os.PathLike) or (isinstance(value, str) and is_text(value)):
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"{os.fspath(value)!r} can't be read as {what}: {reason}") from None


def _schema(value: Any) -> str:
    said = _of_file(value, lambda text: text.lstrip().startswith("{"), "a JSON schema")
    return schema_text(said)


def _grammar(value: Any) -> str:
    text = _of_file(value, lambda text: "\n" in text or "start:" in text, "a Lark grammar")
    if not str(text).strip():
        raise ValueError("the grammar is empty")
    return str(text)


def _regex(value: str) -> str:
    if not value:
        raise ValueError("the expression is empty")
    return value


SCHEMA = Kind((object,), "JSON schema", _schema, "FILE|JSON")
CHOICES = Kind((str, list, tuple), "list of texts", choices_of, "A,B,...")
LABELS = Kind((str, list, tuple), "list of texts", partial(choices_of, what="label"), "A,B,...")
REGEX = Kind((str,), "regular expression", _regex, "RE")
GRAMMAR = Kind((str, os.PathLike), "Lark grammar", _grammar, "FILE")
