"""A model's chat template: trying it out shows what it can express; what it can't is an error."""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from itertools import product
from typing import Any, NamedTuple, Protocol

import jinja2

from batchrun.prompts.messages import PromptError
from batchrun.prompts.sandbox import bound

# Random in each process, so no row's text contains it. Letters and digits survive whatever a
# template does to text.
_MARK = f"z{secrets.token_hex(8)}"
_SHOWN = 200  # characters of a template's error message

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
Render = Callable[[Messages, Tools], str]


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    chat_template: Any
    bos_token: Any
    bos_token_id: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """Text to `input_ids`."""

    def get_vocab(self) -> Mapping[str, int]:
        """All tokens, as the tokenizer writes them."""

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        """Tokens to text."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Messages to the model's own prompt text."""

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template itself; of several, the one for chats with or without tools."""


class _Said(NamedTuple):
    """A piece of a row that its prompt must show."""

    kind: tuple[Any, ...]  # what holds for one holds for all of its kind
    texts: list[str]
    holder: dict[str, Any]  # has it, under `key`
    key: str
    missing: str  # the error if the prompt lacks it


class ChatTemplate:
    """Makes prompts from chats that have tools, or from chats that have none.

    Args:
        tokenizer: Has the template.
        arguments: The job's arguments for it, by name.
        tools: Whether the chats have tools: a model may have a separate template for these.

    Attributes:
        source: The template's text; empty if there is none.
    """

    def __init__(
        self, tokenizer: Tokenizer, arguments: Mapping[str, Any], *, tools: bool = False
    ) -> None:
        self._tokenizer, self._arguments = tokenizer, dict(arguments)
        self._tools: Tools = [] if tools else None  # for made-up chats
        self.source = ""
        with suppress(ValueError, NotImplementedError, AttributeError):
            self.source = str(tokenizer.get_chat_template(tools=self._tools))
        self._form = cache(self._try_form)
        self._expressed: set[tuple[Any, ...]] = set()
        self._bound = False

    def prompt(
        self, messages: Messages, tools: Tools, arguments: Mapping[str, Any], *, first: int = 0
    ) -> str:
        """The text of a prompt for the answer to a chat, or for the rest of its last message.

        Args:
            messages: As `read_messages` returns them.
            tools: The tools that the model may call.
            arguments: The row's arguments for the template.
            first: The first message's number in the row: -1 if it is not the row's own.

        Raises:
            PromptError: The template refuses the chat, or leaves out part of it.
        """
        begun = continued(messages)
        if not begun and _is_open(messages[-1]):
            if any(messages[-1].get(key) for key in ("reasoning_content", "reasoning", "thinking")):
                number = len(messages) - 1 + first
                raise PromptError("chat_template", f"message {number} has reasoning but no content")
            messages = messages[:-1]
            if not messages:
                raise PromptError("empty_prompt", "the chat is empty")

        def render(messages: Messages, tools: Tools) -> str:
            shaped = [self._shaped(message) for message in messages]
            return self._render(shaped, tools, arguments, answer=not begun)

        text = _begun(messages, tools, render, first) if begun else render(messages, tools)
        self._check(messages, tools, text, render, first)
        return text

    def _render(
        self, messages: Messages, tools: Tools, arguments: Mapping[str, Any], *, answer: bool
    ) -> str:
        try:
            if not self._bound:
                bound(self.source)
                self._bound = True
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=answer,
                **{**self._arguments, **arguments},
            )
        except PromptError:
            raise
        except Exception as error:  # a template is the model's program and may raise anything
            raise PromptError(
                "chat_template", f"the chat template refused the chat: {_short(error)}"
            ) from error
        return str(text)

    # --- what a template takes ---

    def _shaped(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message in the form that the template takes."""
        shaped = dict(message)
        if "content" in shaped:
            shaped["content"] = self._content(message["role"], shaped["content"])
        if calls := shaped.get("tool_calls"):
            as_text, empty = self._call_form
            shaped["tool_calls"] = [_with_arguments(call, as_text) for call in calls]
            if empty:
                shaped.setdefault("content", "")
        return shaped

    def _content(self, role: str, content: str | list[str]) -> Any:
        as_text, between = self._form(role)
        if between is not None and isinstance(content, list):
            content = between.join(content)
        if as_text:
            return content
        parts = [content] if isinstance(content, str) else content
        return [{"type": "text", "text": part} for part in parts]

    def _try_form(self, role: str) -> tuple[bool, str | None]:
        """Whether a role's content is text rather than a list of parts, and what joins parts.

        The latter is None if parts can't be joined, as the template puts other text between them.
        """
        a, b = f"{_MARK}a", f"{_MARK}b"

        def shown(content: Any) -> str:
            said, chat = {"role": role, "content": content}, []
            if role != "user":
                chat = [{"role": "user", "content": self._content("user", "Hi")}]
            if role in ("system", "developer"):
                return self._try([said, *chat])
            return self._try([*chat, said, *(chat if role == "assistant" else [])])

        text = a in shown(a)
        parts = shown([{"type": "text", "text": a}, {"type": "text", "text": b}])
        found = re.search(f"{a}(.*?){b}", parts, re.DOTALL)
        listed = found is not None and not re.search("['\"]type['\"]", found[1])
        between = found[1] if found is not None and listed and not found[1].strip() else None
        if text or (role == "user" and not listed):
            return True, "\n" if between is None else between
        return (False, between) if listed else self._form("user")

    @cached_property
    def _call_form(self) -> tuple[bool, bool]:
        """Whether arguments of calls are text, and whether a message with calls needs content."""
        name, key, value = (f"{_MARK}{letter}" for letter in "abc")
        function = {"name": name, "arguments": {"value": {key: value}, "text": None}}
        call = {"id": "abcdefgh1", "type": "function", "function": function}
        asked = {"role": "user", "content": self._content("user", "Hi")}
        for as_text, empty in product((False, True), repeat=2):
            message = {"role": "assistant", "tool_calls": [_with_arguments(call, as_text)]}
            text = self._try([asked, {**message, "content": ""} if empty else message])
            if all(mark in text for mark in (name, key, value)) and f"'{key}'" not in text:
                return as_text, empty
        return False, False

    def _try(self, messages: Messages) -> str:
        """A made-up chat as the template renders it; empty if the template refuses it."""
        try:
            return self._render(messages, self._tools, {}, answer=False)
        except PromptError:
            return ""

    # --- what a template leaves out ---

    def _check(
        self, messages: Messages, tools: Tools, text: str, render: Render, first: int
    ) -> None:
        """Refuse a prompt that lacks part of its row.

        A piece that is not there as the row has it may be there in another form, trimmed or as
        JSON. So it is replaced by a mark, which has only one form, and looked for again.
        """
        said, marks = _said(messages, tools, first), {}
        for n, (kind, texts, *_) in enumerate(said):
            if kind not in self._expressed or not all(part in text for part in texts):
                marks[n] = f"{_MARK}n{n}n"
        if not marks:
            return
        changed = copy.deepcopy((messages, tools))
        copies = _said(*changed, first)
        for n, mark in marks.items():
            copies[n].holder[copies[n].key] = mark
        try:
            again = render(*changed)
        except PromptError:
            return  # this tells nothing
        for n, mark in marks.items():
            if mark not in again:
                raise PromptError("chat_template", said[n].missing)
            self._expressed.add(said[n].kind)


def _said(messages: Messages, tools: Tools, first: int) -> list[_Said]:
    found = []
    for i, message in enumerate(messages[:-1] if continued(messages) else messages, first):
        role, calls = message["role"], message.get("tool_calls") or ()
        missing = f"message {i} has tool calls, and the chat template leaves them out"
        for function in (call["function"] for call in calls):
            kind = ("calls", len(calls) > 1)
            found.append(_Said(kind, [function["name"]], function, "name", missing))
        if text_of(message).strip() and not calls:  # many templates drop content beside calls
            content = message["content"]
            texts = [part.strip() for part in ([content] if isinstance(content, str) else content)]
            what = f"message {i}, whose role is {role!r}" if i >= 0 else "the message of --system"
            missing = f"the chat template leaves out {what}"
            found.append(_Said((role, i == first), texts, message, "content", missing))
    missing = (
        "the row has tools, but the chat template has no place for them "
        "(--ignore-param-columns treats the column as data)"
    )
    for function in (tool["function"] for tool in tools or ()):
        found.append(_Said(("tools",), [function["name"]], function, "name", missing))
    return found


def _begun(messages: Messages, tools: Tools, render: Render, first: int) -> str:
    """The prompt up to the end of the last message's text, as `continue_final_message` cuts it.

    Text that the template trims off is left out, and the turn is not closed.
    """
    *before, last = messages
    content, text = last["content"], text_of(last)
    more = f"{_MARK} "
    if isinstance(content, str):
        content += more
    else:
        content = [*content[:-1], content[-1] + more]
    whole = render([*before, {**last, "content": content}], tools)
    end = whole.rfind(_MARK)
    prompt = whole[: max(end, 0)]
    if not whole[end:].startswith(more):
        prompt = prompt.rstrip()  # the template trims, and would have trimmed this
    # A template may put lines around reasoning, but not leave it out.
    if text.strip() in prompt or "".join(text.split()) in "".join(prompt.split()):
        return prompt
    raise PromptError(
        "chat_template",
        f"the chat template can't continue message {len(before) + first}: the prompt "
        "does not contain its text unchanged",
    )


def continued(messages: Messages) -> bool:
    """Whether the answer continues the last message."""
    return _is_open(messages[-1]) and bool(text_of(messages[-1]).strip())


def text_of(message: Mapping[str, Any]) -> str:
    """All text of a message."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(content)


def _is_open(message: Mapping[str, Any]) -> bool:
    """Whether an answer may continue this message."""
    return message["role"] == "assistant" and not message.get("tool_calls")


def _with_arguments(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    value, text = (call["function"]["arguments"][key] for key in ("value", "text"))
    if as_text:
        value = json.dumps(value, ensure_ascii=False) if text is None else text
    return {**call, "function": {**call["function"], "arguments": value}}


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, jinja2.TemplateError) or isinstance(error, jinja2.UndefinedError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
