"""Prompts made from columns: text with `{column}` fields."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping
from typing import Any

_PLAIN = re.compile(r"\{([^{}]+)\}")  # a field without braces in its name
_BRACE = re.compile(r"[{}]")
_BRACES = re.compile(r"\{\{|\}\}|[{}]")
_HELP = "write {column} for a column, {{ and }} for literal braces"


class Template:
    """A template, parsed once. A row's values are never parsed as templates.

    The name of a field is everything between its braces. Outside fields, `{{` and `}}` stand for
    literal braces; inside, a pair of them stands for braces in the name: `{a{{b}}}` is the column
    `a{b}`.

    Args:
        text: Text such as `Summarise: {text}`.

    Attributes:
        columns: The names of its fields, each once, in order.
        end: The text behind the last field.

    Raises:
        ValueError: A brace is neither part of a field nor doubled, or there is no field.
    """

    def __init__(self, text: str) -> None:
        self._parts = _split(text)  # alternately literal text and names of columns
        self.end = self._parts[-1]
        self.columns = list(dict.fromkeys(self._parts[1::2]))
        if not self.columns:
            raise ValueError(f"the template {text!r} names no column; write, for example, {{text}}")

    def fill(self, values: Mapping[str, Any], plain: Callable[[Any], Any]) -> str:
        """The template with a row's values in it.

        Args:
            values: By column, none of them None.
            plain: Converts any other value to one that JSON can hold.
        """
        parts = list(self._parts)
        parts[1::2] = [_text(values[name], plain) for name in parts[1::2]]
        return "".join(parts)


def looks_like_json(name: str) -> bool:
    """Whether the text between braces is more likely JSON than the name of a column."""
    return not name.strip() or any(sign in name for sign in '":\n')


def doubled(text: str, names: Container[str] | None = None) -> str | None:
    """The template that was probably meant: braces around no name are doubled.

    Args:
        text: A template with braces that are not doubled, such as JSON.
        names: The columns there are; if unknown, what looks like a Python identifier.

    Returns:
        The template, or None if it would be the same, or name no column.
    """
    braces = _BRACES if "{{" in text else _BRACE  # in JSON, `}}` closes two objects
    parts = _PLAIN.split(text)
    for i, part in enumerate(parts):
        known = part.isidentifier() if names is None else part in names
        parts[i] = f"{{{part}}}" if i % 2 else part
        if not (i % 2 and known):
            parts[i] = braces.sub(lambda brace: brace[0][0] * 2, parts[i])
    fixed = "".join(parts)
    try:
        Template(fixed)
    except ValueError:
        return None
    return None if fixed == text else fixed


def _split(text: str) -> list[str]:
    """Alternately literal text and names, beginning and ending with literal text."""
    parts = [""]
    opened = at = depth = 0  # where the field began; how many `{{` of its name are open
    while brace := _BRACES.search(text, at):
        parts[-1] += text[at : brace.start()]
        sign, inside, number = brace[0], len(parts) % 2 == 0, brace.start() + 1
        at = brace.end()
        if inside and sign[0] == "}" and not depth:
            if not parts[-1]:
                raise ValueError(f"template field {{}} at character {opened}: {_HELP}")
            parts.append("")
            at = number  # what follows is not part of the field
        elif len(sign) == 2:
            parts[-1] += sign[0]
            depth += (1 if sign == "{{" else -1) * inside
        elif sign == "{" and not inside:
            opened = number
            parts.append("")
        else:
            where = f"in the template field {{{_short(parts[-1])}" if inside else "in the template"
            raise ValueError(f"there is a lone {sign} {where} at character {number}: {_HELP}")
    if len(parts) % 2 == 0:
        raise ValueError(
            f"the template field that begins at character {opened} is never closed: {_HELP}"
        )
    parts[-1] += text[at:]
    return parts


def _short(name: str) -> str:
    """A name, shortened to one line."""
    name = " ".join(name.split())
    return name if len(name) <= 40 else f"{name[:37]}..."


def _text(value: Any, plain: Callable[[Any], Any]) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    value = plain(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
