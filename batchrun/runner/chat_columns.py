"""Input columns that hold chats, or arguments for the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from batchrun.jobs.errors import InputError
from batchrun.jobs.options import PromptSpec
from batchrun.jobs.rows.arrowtypes import is_list, is_text, without_dictionary
from batchrun.jobs.rows.row import Source
from batchrun.prompts.messages import ARGUMENT_COLUMNS, CHAT_COLUMNS
from batchrun.runner.param_columns import column_refused


def usual_column(names: Sequence[str]) -> str:
    """The default prompt column: `prompt`, else one that holds chats."""
    return next((name for name in ("prompt", *CHAT_COLUMNS) if name in names), "prompt")


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
