"""A model's chat template: what it can say is found by trying it, and what it can't is an error."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import jinja2

from batchrun.prompts.chat_source import variables
from batchrun.prompts.messages import Arguments, PromptError
from batchrun.prompts.sandbox import bound

# No row's text has it: rows can't know what a process draws. Letters and digits survive whatever a
# template does to text.
_MARK = f"z{secrets.token_hex(8)}"
_SHOWN = 200  # characters of what a template says of a row

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
Render = Callable[[Messages, Tools], str]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

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
        """The template itself, of several the one for chats with tools or for those without."""


class _Form(NamedTuple):
    """How a template takes content: text, else a list of parts; what it puts between parts."""

    text: bool
    between: str | None  # None: nothing that could stand in one text


class _Said(NamedTuple):
    """Something of a row that its prompt must show."""

    kind: tuple[Any, ...]  # what is known of one holds for all
    text: str
    where: tuple[int, int | None]  # message (-1: the tools) and call or tool; None is its content
    missing: str


class ChatTemplate:
    """Makes prompts of chats.

    Args:
        tokenizer: Has the template.
        arguments: What the job says to it, by name.
    """

    def __init__(self, tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> None:
        self._tokenizer, self._arguments = tokenizer, dict(arguments)
        self._form, self._call_form = cache(self._try_form), cache(self._try_calls)
        self._expressed: set[tuple[Any, ...]] = set()
        self._bound: set[bool] = set()  # whether the template for chats with tools, or without, is

    def source(self, *, tools: bool = False) -> str:
        """Its text, for chats with tools or for those without; empty where it has none."""
        try:
            return str(self._tokenizer.get_chat_template(tools=[] if tools else None))
        except (ValueError, NotImplementedError, AttributeError):
            return ""

    def unread(self, names: Sequence[str], *, tools: bool = False) -> tuple[list[str], list[str]]:
        """Names among these that it never reads, and those that it does read."""
        read = variables(self.source(tools=tools))
        if read is None:
            return [], []
        return [name for name in names if name not in read], sorted(read)

    def shape(self, messages: Messages, tools: bool) -> Messages:
        """Messages as `read_messages` has them in the form in which the template takes them."""
        return [self._shape(message, tools) for message in messages]

    def prompt(
        self, messages: Messages, tools: Tools, arguments: Mapping[str, Any], *, first: int = 0
    ) -> str:
        """The text of a prompt for the answer to a chat, or for the rest of its last message.

        Args:
            messages: As `shape` returns them.
            tools: That the model may call.
            arguments: What the row says to the template.
            first: What the row calls the first message: -1 where it is not the row's own.

        Raises:
            PromptError: The template refuses the chat, or leaves out something of it.
        """
        begun = continued(messages)
        if not begun and is_open(messages[-1]):
            if any(messages[-1].get(key) for key in ("reasoning_content", "reasoning", "thinking")):
                number = len(messages) - 1 + first
                raise PromptError("chat_template", f"message {number} has reasoning but no content")
            messages = messages[:-1]
            if not messages:
                raise PromptError("empty_prompt", "the chat is empty")

        def render(messages: Messages, tools: Tools) -> str:
            try:
                return self._render(messages, tools, arguments, answer=not begun)
            except PromptError:
                raise
            except Exception as error:  # a template is the model's program and may raise anything
                raise PromptError(
                    "chat_template", f"the chat template refused it: {_short(error)}"
                ) from error

        text = self._begun(messages, tools, render, first) if begun else render(messages, tools)
        said = list(_said(messages[:-1] if begun else messages, tools, first))
        self._check(said, messages, tools, text, render)
        return text

    def _render(
        self, messages: Messages, tools: Tools, arguments: Mapping[str, Any], *, answer: bool
    ) -> str:
        if (tools is not None) not in self._bound:
            bound(self.source(tools=tools is not None))
            self._bound.add(tools is not None)
        text = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=answer,
            **{**self._arguments, **arguments},
        )
        return str(text)

    def _begun(self, messages: Messages, tools: Tools, render: Render, first: int) -> str:
        """The prompt up to the end of the last message's text, as `continue_final_message` cuts it.

        What a template trims off that text is not there; the turn is not closed.
        """
        text = text_of(messages[-1])
        whole = render([*messages[:-1], _with_more(messages[-1], _MARK + " ")], tools)
        end = whole.rfind(_MARK)
        prompt = whole[: max(end, 0)]
        if not whole[end:].startswith(_MARK + " "):
            prompt = prompt.rstrip()  # it trims, and would have trimmed this
        # A template may put lines around reasoning, but not leave it out.
        if text.strip() in prompt or "".join(text.split()) in "".join(prompt.split()):
            return prompt
        raise PromptError(
            "chat_template",
            f"the chat template can't continue message {len(messages) - 1 + first}: its text is "
            "not in the prompt as the row has it",
        )

    # --- what a template takes ---

    def _shape(self, message: dict[str, Any], tools: bool) -> dict[str, Any]:
        shaped = dict(message)
        if "content" in shaped:
            shaped["content"] = self._content(message["role"], shaped["content"], tools)
        if calls := shaped.get("tool_calls"):
            as_text, empty = self._call_form(tools)
            shaped["tool_calls"] = [_with_arguments(call, as_text) for call in calls]
            if empty:
                shaped.setdefault("content", "")
        return shaped

    def _content(self, role: str, content: str | list[str], tools: bool) -> Any:
        form = self._form(role, tools)
        if form.between is not None and isinstance(content, list):
            content = form.between.join(content)
        if form.text:
            return content
        parts = [content] if isinstance(content, str) else content
        return [{"type": "text", "text": part} for part in parts]

    def _try_form(self, role: str, tools: bool) -> _Form:
        def shown(content: Any) -> str:
            chat = talk(role, content, lambda text: self._content("user", text, tools))
            return self._try(chat, tools)

        a, b = f"{_MARK}a", f"{_MARK}b"
        text = a in shown(a)
        parts = shown([{"type": "text", "text": a}, {"type": "text", "text": b}])
        _, found, rest = parts.partition(a)
        between, both, _ = rest.partition(b)
        listed = bool(found and both) and "'type'" not in between and '"type"' not in between
        plain = between if listed and not between.strip() else None
        if text:
            return _Form(True, "\n" if plain is None else plain)
        if listed:
            return _Form(False, plain)
        return _Form(True, "\n") if role == "user" else self._form("user", tools)

    def _try_calls(self, tools: bool) -> tuple[bool, bool]:
        """Whether arguments of calls are text, and whether content beside them must be there."""
        name, key, value = (f"{_MARK}{letter}" for letter in "abc")
        for as_text in (False, True):
            for empty in (False, True):
                function = {"name": name, "arguments": Arguments({key: value}, None)}
                call = {"id": "abcdefgh1", "type": "function", "function": function}
                message = {"role": "assistant", "tool_calls": [_with_arguments(call, as_text)]}
                if empty:
                    message["content"] = ""
                asked = {"role": "user", "content": self._content("user", "Hi", tools)}
                text = self._try([asked, message], tools)
                if all(mark in text for mark in (name, key, value)) and f"'{key}'" not in text:
                    return as_text, empty
        return False, False

    def _try(self, messages: Messages, tools: bool) -> str:
        """What a made-up chat is in the template, and nothing where it is refused."""
        try:
            return self._render(messages, [] if tools else None, {}, answer=False)
        except Exception:
            return ""

    # --- what a template leaves out ---

    def _check(
        self, said: Sequence[_Said], messages: Messages, tools: Tools, text: str, render: Render
    ) -> None:
        """Refuse a prompt that lacks something of its row.

        What is not there as the row has it may be there in another form, trimmed or as JSON. So it
        is changed into what has no other form, and looked for again.
        """
        open_ = [s for s in said if s.kind not in self._expressed or s.text not in text]
        if not open_:
            return
        marks = [f"{_MARK}n{i}n" for i in range(len(open_))]
        changed, others = list(messages), list(tools or ())
        for (_, _, (i, n), _), mark in zip(open_, marks, strict=True):
            if i < 0:
                others[n or 0] = _renamed(others[n or 0], mark)
            elif n is None:
                changed[i] = _with_text(changed[i], mark)
            else:
                calls = list(changed[i]["tool_calls"])
                calls[n] = _renamed(calls[n], mark)
                changed[i] = {**changed[i], "tool_calls": calls}
        try:
            again = render(changed, others if tools is not None else None)
        except PromptError:
            return  # nothing is known
        for s, mark in zip(open_, marks, strict=True):
            if mark not in again:
                raise PromptError("chat_template", s.missing)
            self._expressed.add(s.kind)


def _said(messages: Messages, tools: Tools, first: int) -> Iterator[_Said]:
    have = tools is not None
    for i, message in enumerate(messages):
        calls, role = message.get("tool_calls") or (), message["role"]
        for n, call in enumerate(calls):
            yield _Said(
                ("calls", len(calls) > 1, have),
                call["function"]["name"],
                (i, n),
                f"message {i + first} has tool calls, and the chat template leaves them out",
            )
        text = "" if calls else text_of(message).strip()  # many leave out what is said beside calls
        if text:
            what = f"message {i + first}, whose role is {role!r}"
            what = "the message of --system" if i + first < 0 else what
            yield _Said(
                (role, i == 0, have), text, (i, None), f"the chat template leaves out {what}"
            )
    for n, tool in enumerate(tools or ()):
        yield _Said(
            ("tools",),
            tool["function"]["name"],
            (-1, n),
            "the row has tools, and the chat template has no place for them "
            "(--ignore-param-columns takes the column as data)",
        )


def is_open(message: Mapping[str, Any]) -> bool:
    """Whether an answer may be more of this message."""
    return message["role"] == "assistant" and not message.get("tool_calls")


def continued(messages: Messages) -> bool:
    """Whether an answer is the rest of the last message."""
    return is_open(messages[-1]) and bool(text_of(messages[-1]).strip())


def text_of(message: Mapping[str, Any]) -> str:
    """A message's text, in whichever form the template takes it."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _with_text(message: dict[str, Any], text: str) -> dict[str, Any]:
    if isinstance(message.get("content"), list):
        return {**message, "content": [{"type": "text", "text": text}]}
    return {**message, "content": text}


def _with_more(message: dict[str, Any], text: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + text}
    return {
        **message,
        "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + text}],
    }


def _with_arguments(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    value, text = call["function"]["arguments"]
    if as_text:
        value = json.dumps(value, ensure_ascii=False) if text is None else text
    return {**call, "function": {**call["function"], "arguments": value}}


def _renamed(function: dict[str, Any], name: str) -> dict[str, Any]:
    return {**function, "function": {**function["function"], "name": name}}


def talk(role: str, content: Any, users: Callable[[str], Any]) -> Messages:
    """A short chat in which a role says something."""
    said = {"role": role, "content": content}
    if role == "user":
        return [said]
    user = {"role": "user", "content": users("Hi")}
    if role in ("system", "developer"):
        return [said, user]
    return [user, said] if role != "assistant" else [user, said, user]


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, jinja2.TemplateError) or isinstance(error, jinja2.UndefinedError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
