"""From a row's fields to the tokens of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from batchrun.errors import ModelError
from batchrun.models.resolve import no_chat_template
from batchrun.prompts.chat import ChatTemplate, Messages, Tokenizer, Tools, continued
from batchrun.prompts.chat_source import check_template_args, has_literal, variables
from batchrun.prompts.continuing import continuing
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
_READERS: dict[str, Callable[..., Any]] = {_TOOLS: read_tools, _ARGUMENTS: read_arguments}


@dataclass(eq=False)
class PromptBuilder:
    """Makes the prompt tokens of a row.

    Args:
        tokenizer: The model's tokenizer.
        column: The column to read, `prompt` by default, unless there is a template.
        template: Text with `{column}` fields.
        chat: Wrap a plain prompt as a user message with the model's chat template.
        system: System message put before it; implies `chat`.
        template_args: The job's arguments for the chat template, by name.
        special_tokens_in_data: Text in a row that reads like a control token is one, in chats and
            templates too. In a plain prompt it always is.
        arguments_are_data: Columns `tools` and `chat_template_kwargs` are not passed to it.
        columnar: Nulls in a row's objects mean absent keys, as in Parquet.
        max_chars: Longer texts cannot fit the context, so they are not even tokenised.
        plain: Converts a value that a template shows to one that JSON can hold.
        log: Called once for each thing done with chats that users may not expect.
        told: Columns that have been logged already.

    Attributes:
        templates: The model's chat templates, by whether the chat has tools.

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

    def __post_init__(self) -> None:
        self.templates = {
            tools: ChatTemplate(self.tokenizer, self.template_args, tools=tools)
            for tools in (False, True)
        }
        self._told = set(self.told)
        self._template = Template(self.template) if self.template is not None else None
        self._control: ControlTokens | None = None
        if not self.special_tokens_in_data:
            with suppress(NotImplementedError):  # mistral-common's have no control tokens in text
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
        value = self._value(fields)
        if value is None:
            raise PromptError("null_prompt", "the prompt is null, not text")
        if isinstance(value, str):
            if not value:
                raise PromptError("empty_prompt", "the prompt is empty")
        elif not is_chat(value):
            raise wrong_type(f"the prompt is {kind_of(value)}, not text")
        plain = isinstance(value, str) and not self.needs_chat_template
        try:
            text = value if plain else self._chat(value, fields)
        except RecursionError:
            raise wrong_type("the chat is nested too deeply") from None
        ids = self._encode(text, self.tokenizer, self._control, add_special_tokens=plain)
        if not ids:
            raise PromptError("empty_prompt", "the prompt has no tokens")
        if plain and self._begins_twice(text, ids):
            ids = ids[1:]
        return tuple(ids)

    def continuation(self, text: str, fields: Mapping[str, Any] | None = None) -> tuple[int, ...]:
        """Token ids of a text behind a prompt: no special tokens, and no space before it.

        Args:
            text: The text; may be empty.
            fields: The row that has it. Text that reads like a control token is treated as in the
                row's prompt. None if it is the user's own, like that of a template.

        Raises:
            PromptError: It can't be encoded.
        """
        tokenizer, control = self._continuing
        if fields is not None and not self._is_as_it_is(fields):
            text = self._marked(text)
        return tuple(self._encode(text, tokenizer, control, what="text to score"))

    def _is_as_it_is(self, fields: Mapping[str, Any]) -> bool:
        """Whether a row's prompt is its own text, in which control tokens are what they seem."""
        own = self._template is None and not self.needs_chat_template
        return own and isinstance(fields.get(self.column or "prompt"), str)

    @cached_property
    def _continuing(self) -> tuple[Tokenizer, ControlTokens | None]:
        """The tokenizer for text that continues other text, and its control tokens."""
        tokenizer = continuing(self.tokenizer)
        if self._control is None or tokenizer is self.tokenizer:
            return tokenizer, self._control
        return tokenizer, ControlTokens(tokenizer)

    def _value(self, fields: Mapping[str, Any]) -> Any:
        """The value that makes the prompt; values filled into a template are marked."""
        names = [self.column or "prompt"] if self._template is None else self._template.columns
        for name in names:
            if name not in fields:
                raise PromptError("missing_field", f"the row has no field {name!r}")
            if self._template is not None and fields[name] is None:
                raise PromptError("null_prompt", f"the field {name!r} is null")
        if self._template is None:
            return fields[names[0]]
        return self._template.fill(self._marked({n: fields[n] for n in names}), self.plain)

    def _marked(self, value: Any) -> Any:
        """A row's value with marks in all text that might read as a control token."""
        return value if self._control is None else self._control.put(value)

    def _chat(self, value: Any, fields: Mapping[str, Any]) -> str:
        """The text of a chat's prompt, with marks."""
        tools, arguments = self._arguments(fields)
        template = self.templates[tools is not None]
        if isinstance(value, str) and self.column not in CHAT_COLUMNS:
            messages: Messages = [{"role": "user", "content": value}]
        else:
            messages = read_messages(value, columnar=self.columnar)
            self._check_roles(messages, template)
        if self._template is None:  # a template's values are marked already
            messages = self._marked(messages)
        if continued(messages):
            self._tell("continued", "chats that end with an assistant message are continued")
        first = 0
        if self.system is not None and messages[0]["role"] != "system":
            messages, first = [{"role": "system", "content": self.system}, *messages], -1
        return template.prompt(messages, *self._marked([tools, arguments]), first=first)

    def _arguments(self, fields: Mapping[str, Any]) -> tuple[Tools, dict[str, Any]]:
        """The row's tools, and its arguments for the chat template."""
        if self.arguments_are_data:
            return None, {}
        shown = self._template.columns if self._template is not None else [self.column]
        said = {
            name: read(fields.get(name), columnar=self.columnar)
            for name, read in _READERS.items()
            if name not in shown
        }
        for name in filter(said.get, said):
            self._tell(name, arguments_taken([name]))
        tools, arguments = said.get(_TOOLS), said.get(_ARGUMENTS) or {}
        known = variables(self.templates[tools is not None].source) if arguments else None
        for name in arguments:
            if known is not None and name not in known:
                raise PromptError(
                    "bad_parameter",
                    f"{_ARGUMENTS} has {name!r}, which the chat template does not read; "
                    f"it reads {', '.join(sorted(known))}",
                )
        return tools, arguments

    def _check_roles(self, messages: Messages, template: ChatTemplate) -> None:
        """Refuse roles that a template writing `<|role|>` would turn into a control token."""
        for i, role in enumerate(message["role"] for message in messages):
            if role in ROLES or self._control is None or not self._control.in_name(role.strip()):
                continue
            if not has_literal(template.source, role):
                raise wrong_type(f"message {i} has the role {role!r}, which is not a valid role")

    def _encode(
        self,
        text: str,
        tokenizer: Tokenizer,
        control: ControlTokens | None,
        *,
        add_special_tokens: bool = False,
        what: str = "prompt",
    ) -> list[int]:
        control = control if control and control.marked(text) else None
        length = len(text if control is None else control.strip(text))
        if self.max_chars is not None and length > self.max_chars:
            raise PromptError(
                "prompt_too_long",
                f"the {what} has {length:,} characters, but the context holds at most "
                f"{self.max_chars:,}, even of the longest tokens",
            )
        try:
            if control is not None:
                return control.encode(text, add_special_tokens=add_special_tokens)
            return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        except (UnicodeError, TypeError) as error:
            raise PromptError("invalid_text", f"the {what} is not valid Unicode: {error}") from None

    def _begins_twice(self, text: str, ids: Sequence[int]) -> bool:
        """Whether a text that begins with the BOS token was given a second one."""
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
    """The builder of a job's prompts for a model.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Keyword arguments of `PromptBuilder`.
        max_model_len: Tokens that the context holds.
        model: What to call the model in messages.
        log: Called with each line that the user should know.

    Raises:
        ModelError: The prompts are chats, and the model has no chat template, or one that does not
            read the job's arguments or would take all memory.
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
    sources = [template.source for template in builder.templates.values()]
    for source in sources:
        try:
            check_constants(source)
        except PromptError as error:
            raise ModelError(
                f"the chat template of {model} is refused: {error}",
                hint="fix the model's chat template",
            ) from None
    check_template_args(builder.template_args, sources, model)
    return builder
