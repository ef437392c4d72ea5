"""Input columns that hold chats, or arguments for the chat template."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from batchrun.jobs.errors import InputError
from batchrun.jobs.options import PromptSpec
from batchrun.jobs.rows.arrowtypes import is_list, is_text, without_dictionary
from batchrun.jobs.rows.row import Source
from batchrun.prompts.messages import ARGUMENT_COLUMNS, CHAT_COLUMNS
from batchrun.runner.param_columns import column_refused

# Names that columns of prompts have in well-known data sets, the likeliest first.
_USUAL = (
    *("question", "instruction", "query", "input", "text", "content", "problem", "article"),
    *("document", "sentence", "review", "source", "body", "message", "passage", "title"),
)
_ID = re.compile(r"(^|_)((u|gu|uu)?id|idx|index|key|url)$", re.IGNORECASE)
_LOOKED_AT = 20  # rows
_LONG = 2000  # characters: more say no more
_CHAT = 1 << 20
_SHOWN = 4  # columns


def usual_column(names: Sequence[str]) -> str:
    """The default prompt column: `prompt`, else one that holds chats."""
    return next((name for name in ("prompt", *CHAT_COLUMNS) if name in names), "prompt")


def suggested(source: Source) -> str:
    """What to type where no column is called `prompt`: the columns that most likely hold prompts.

    Judged by name, type and the length of the text in the first rows.
    """
    names, found = source.column_names, dict.fromkeys(source.column_names, 0.0)
    for row in islice(source.rows(names, _LOOKED_AT), _LOOKED_AT):
        for name in names:
            value = row.fields.get(name)
            found[name] += min(len(value), _LONG) if isinstance(value, str) else 0
            found[name] += _CHAT if _looks_like_chat(value) else 0
    usual = {name: (len(_USUAL) - i) * _LONG for i, name in enumerate(_USUAL)}
    texts = [name for name in names if found[name]]
    texts = [name for name in texts if not _ID.search(name)] or texts
    ranked = sorted(texts, key=lambda n: -(usual.get(n.lower(), 0) * _LOOKED_AT + found[n]))
    if not ranked:
        return "name the column with the prompts: --prompt-column NAME; or --template TEXT"
    listed = f" (or {', '.join(ranked[1:_SHOWN])})" if ranked[1:] else ""
    chosen = f"--prompt-column {shlex.quote(ranked[0])}{listed}"
    if found[ranked[0]] >= _CHAT:
        return f"name the column with the chats: {chosen}"
    template = shlex.quote(f"... {{{ranked[0]}}}")
    return (
        f"name the column with the prompts: {chosen}; or build them from columns: "
        f"--template {template}"
    )


def _looks_like_chat(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool({"role", "from"} & first.keys())


def are_chats(prompt: PromptSpec, source: Source) -> bool | None:
    """Whether prompts are chats; None if that depends on the row."""
    if prompt.chat or prompt.system is not None:
        return True
    if prompt.template:
        return False
    column = prompt.column or "prompt"
    if column in CHAT_COLUMNS:
        return True
    if source.typed and column in source.column_names:
        kind = without_dictionary(source.schema().field(column).type)
        return None if pa.types.is_null(kind) else not is_text(kind)
    return None


def argument_columns(prompt: PromptSpec, source: Source) -> list[str]:
    """The columns that may hold arguments for the chat template, such as `tools`."""
    if prompt.ignore_param_columns or are_chats(prompt, source) is False:
        return []
    # If later rows may add columns, look for all of them in each row.
    names = ARGUMENT_COLUMNS if source.num_rows is None else source.column_names
    return [name for name in ARGUMENT_COLUMNS if name in names]


def check_prompt_type(field: pa.Field[Any]) -> None:
    """Refuse a column that holds no prompts.

    Raises:
        InputError: It is neither text nor a chat.
    """
    kind = without_dictionary(field.type)
    if is_text(kind) or pa.types.is_null(kind) or _is_chat(kind):
        return
    raise InputError(
        f"the column '{field.name}' holds {field.type}, not text or a list of messages",
        hint=f"convert it to text: --template '{{{field.name}}}'",
    )


def check_argument_types(names: Sequence[str], source: Source) -> None:
    """Refuse columns whose type doesn't fit their name.

    Raises:
        InputError: One holds neither objects nor text.
    """
    for name in names if source.typed else ():
        kind = without_dictionary(source.schema().field(name).type)
        nested = is_list(kind) or pa.types.is_struct(kind) or pa.types.is_map(kind)
        if not (nested or is_text(kind) or pa.types.is_null(kind)):
            raise column_refused(name, f"it holds {kind}")


def _is_chat(kind: pa.DataType) -> bool:
    """Whether values can be messages, or one message."""
    if is_list(kind):
        inner = without_dictionary(kind.value_type)  # type: ignore[attr-defined]
        return pa.types.is_null(inner) or _is_chat(inner)
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return bool({"role", "from"} & names)
    return pa.types.is_map(kind)
