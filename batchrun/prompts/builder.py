"""From a row's fields to the tokens of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from batchrun.errors import ModelError
from batchrun.models.resolve import no_chat_template
from batchrun.prompts.chat import ChatTemplate, Messages, Tokenizer, Tools, continued
from batchrun.prompts.chat_source import check_template_args, has_literal
from batchrun.prompts.control_tokens import ControlTokens
from batchrun.prompts.messages import (
    ARGUMENT_COLUMNS,
    CHAT_COLUMNS,
    ROLES,
    PromptError,
    arguments_taken,
    is_chat,
    kind_of,
    read_arguments,
    read_messages,
    read_tools,
    wrong_type,
)
from batchrun.prompts.sandbox import check_constants
from batchrun.prompts.template import Template

_TOOLS, _ARGUMENTS = ARGUMENT_COLUMNS


@dataclass(eq=False)
class PromptBuilder:
    """Makes the prompt tokens of a row.

    Args:
        tokenizer: The model's tokenizer.
        column: The column to read, `prompt` by default, unless there is a template.
        template: Text with `{column}` fields.
        chat: Wrap a plain prompt as a user message with the model's chat template.
        system: System message put before it; implies `chat`.
        template_args: What the job says to the chat template, by name.
        special_tokens_in_data: What reads like a control token in a row of a chat or template is
            one. In a plain prompt it always is.
        arguments_are_data: Columns `tools` and `chat_template_kwargs` say nothing to it.
        columnar: Nulls in a row's objects mean absent keys, as in Parquet.
        max_chars: Longer texts can not fit the context, so they are not even tokenised.
        plain: Makes what JSON can hold of a value that a template shows.
        log: Told, once each, what is done with chats that users may not expect.
        told: Columns that need not be told of.

    Raises:
        ValueError: The template is malformed.
    """

    tokenizer: Tokenizer
    column: str | None = None
    template: str | None = None
    chat: bool = False
    system: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_in_data: bool = False
    arguments_are_data: bool = False
    columnar: bool = False
    max_chars: int | None = None
    plain: Callable[[Any], Any] = lambda value: value
    log: Callable[[str], None] = lambda _: None
    told: Collection[str] = ()
    chat_template: ChatTemplate = field(init=False, repr=False)
    _template: Template | None = field(init=False, default=None, repr=False)
    _control: ControlTokens | None = field(init=False, default=None, repr=False)
    _told: set[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.chat_template = ChatTemplate(self.tokenizer, self.template_args)
        self._told = set(self.told)
        if self.template is not None:
            self._template = Template(self.template)
        if not self.special_tokens_in_data:
            with suppress(NotImplementedError):  # mistral-common's: it has none in text
                self._control = ControlTokens(self.tokenizer)

    @property
    def needs_chat_template(self) -> bool:
        """Whether every prompt is a chat."""
        return self.chat or self.system is not None or self.column in CHAT_COLUMNS

    def __call__(self, fields: Mapping[str, Any]) -> tuple[int, ...]:
        """Token ids of the row's prompt.

        Raises:
            PromptError: The row has no usable prompt.
        """
        value, marked = self._value(fields)
        if value is None:
            raise PromptError("null_prompt", "the prompt is null, not text")
        if isinstance(value, str):
            if not value:
                raise PromptError("empty_prompt", "the prompt is empty")
        elif not is_chat(value):
            raise wrong_type(f"the prompt is {kind_of(value)}, not text")
        plain = isinstance(value, str) and not self.needs_chat_template
        try:
            text, marked = (value, marked) if plain else self._chat(value, fields, marked)
        except RecursionError:
            raise wrong_type("the chat is nested too deeply") from None
        return self._encode(text, marked, add_special_tokens=plain)

    def _value(self, fields: Mapping[str, Any]) -> tuple[Any, bool]:
        """What makes the prompt, and whether it has marks of `ControlTokens`."""
        if self._template is None:
            column = self.column or "prompt"
            if column not in fields:
                raise PromptError("missing_field", f"the row has no field {column!r}")
            return fields[column], False
        for name in self._template.columns:
            if name not in fields:
                raise PromptError("missing_field", f"the row has no field {name!r}")
            if fields[name] is None:
                raise PromptError("null_prompt", f"the field {name!r} is null")
        values, marked = self._guarded({name: fields[name] for name in self._template.columns})
        return self._template.fill(values, self.plain), marked

    def _guarded(self, value: Any) -> tuple[Any, bool]:
        """A row's value with marks where it needs any, and whether it does."""
        if self._control is None or not self._control.touches(value):
            return value, False
        return self._control.put(value), True

    def _chat(self, value: Any, fields: Mapping[str, Any], filled: bool) -> tuple[str, bool]:
        """The text of a chat's prompt, and whether it has marks."""
        tools, arguments = self._arguments(fields)
        if isinstance(value, str) and self.column not in CHAT_COLUMNS:
            messages: Messages = [{"role": "user", "content": value}]
        else:
            messages = read_messages(value, columnar=self.columnar)
            self._check_roles(messages, tools is not None)
        messages = self.chat_template.shape(messages, tools is not None)
        made = self._template is not None  # whose marks, if any, are there already
        said, marked = self._guarded([None if made else messages, tools, arguments])
        messages, first = messages if made else said[0], 0
        if continued(messages):
            self._tell("continued", "chats that end with an assistant's text are continued there")
        if self.system is not None and messages[0]["role"] != "system":
            system = self.chat_template.shape(
                [{"role": "system", "content": self.system}], tools is not None
            )
            messages, first = [*system, *messages], -1
        text = self.chat_template.prompt(messages, *said[1:], first=first)
        return text, marked or filled

    def _arguments(self, fields: Mapping[str, Any]) -> tuple[Tools, dict[str, Any]]:
        """The row's tools, and what it says to the chat template."""
        shown = self._template.columns if self._template is not None else [self.column]
        if self.arguments_are_data:
            return None, {}
        tools = arguments = None
        if _TOOLS not in shown:
            tools = read_tools(fields.get(_TOOLS), columnar=self.columnar)
        if _ARGUMENTS not in shown:
            arguments = read_arguments(fields.get(_ARGUMENTS), columnar=self.columnar)
        for name, there in ((_TOOLS, tools), (_ARGUMENTS, arguments)):
            if there:
                self._tell(name, arguments_taken([name]))
        if arguments:
            unread, read = self.chat_template.unread(list(arguments), tools=tools is not None)
            if unread:
                raise PromptError(
                    "bad_parameter",
                    f"{_ARGUMENTS} has {unread[0]!r}, which the chat template does not read; "
                    f"it reads {', '.join(read)}",
                )
        return tools, arguments or {}

    def _check_roles(self, messages: Messages, tools: bool) -> None:
        """Refuse roles of which templates that write `<|role|>` would make a control token."""
        for i, message in enumerate(messages):
            role = message["role"]
            if role in ROLES or self._control is None or not self._control.in_name(role.strip()):
                continue
            if not has_literal(self.chat_template.source(tools=tools), role):
                raise wrong_type(f"message {i} has the role {role!r}, which is no role")

    def _encode(self, text: str, marked: bool, *, add_special_tokens: bool) -> tuple[int, ...]:
        control = self._control if marked else None
        length = len(text if control is None else control.strip(text))
        if self.max_chars is not None and length > self.max_chars:
            raise PromptError(
                "prompt_too_long",
                f"the prompt has {length:,} characters, and the context holds "
                f"{self.max_chars:,} even of the longest tokens",
            )
        try:
            if control is not None:
                ids = control.encode(text, add_special_tokens=add_special_tokens)
            else:
                ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except (UnicodeError, TypeError) as error:
            raise PromptError("invalid_text", f"the prompt is not valid Unicode: {error}") from None
        if not ids:
            raise PromptError("empty_prompt", "the prompt has no tokens")
        if add_special_tokens and self._begins_twice(text, ids):
            ids = ids[1:]
        return tuple(ids)

    def _begins_twice(self, text: str, ids: Sequence[int]) -> bool:
        """Whether a text that has the token for its beginning was given another one."""
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos) and ids[:2] == [self.tokenizer.bos_token_id] * 2

    def _tell(self, what: str, line: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self.log(line)


def prompt_builder(
    tokenizer: Tokenizer,
    prompt: Mapping[str, Any],
    *,
    max_model_len: int,
    model: str,
    log: Callable[[str], None] = lambda _: None,
) -> PromptBuilder:
    """What makes a job's prompts for a model.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Keyword arguments of `PromptBuilder`.
        max_model_len: Tokens that the context holds.
        model: What to call the model in messages.
        log: Told, a line each, what the user should know.

    Raises:
        ModelError: The prompts are chats, and the model has no template for them, or one that does
            not read what the job says to it, or would take all memory.
    """
    longest = max(map(len, tokenizer.get_vocab()), default=0)
    if not longest:
        raise ModelError(
            f"the tokenizer of the model {model} has no tokens",
            hint="copy the tokenizer of the model that it was made from",
        )
    builder = PromptBuilder(tokenizer, **prompt, max_chars=longest * max_model_len, log=log)
    if builder.needs_chat_template and not tokenizer.chat_template:
        raise no_chat_template(model)
    sources = [builder.chat_template.source(tools=tools) for tools in (False, True)]
    for source in sources:
        try:
            check_constants(source)
        except PromptError as error:
            raise ModelError(
                f"the chat template of {model} is refused: {error}",
                hint="mend the model's chat template",
            ) from None
    check_template_args(builder.template_args, sources, model)
    return builder
