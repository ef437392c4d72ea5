"""Between a row's fields and tokens: templates, tokenising, detokenising, stop strings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from batchrun.engine.template import Template
from batchrun.models import no_chat_template

_CONTEXT = 8  # prompt tokens that precede the output when it is decoded
_REMEMBERED = 1024  # lists of stop strings
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


# What ends the process, of all that a tokenizer may raise: its own panics are no `Exception`.
PROCESS_ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)
_SAID = 300  # characters of an error


def said_by(error: BaseException) -> str:
    """An error's kind and its first line, in valid Unicode."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    return text.encode(errors="backslashreplace").decode()[:_SAID]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """Text to `input_ids`."""

    def get_vocab(self) -> Mapping[str, int]:
        """All tokens, as the tokenizer writes them."""

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        """Tokens to text."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Messages to the model's own prompt text."""


class PromptError(Exception):
    """A row can't be turned into a prompt.

    Args:
        kind: A short name that failures are counted under.
        message: What is wrong with the row.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class PromptBuilder:
    """Makes the prompt tokens of a row.

    Args:
        tokenizer: The model's tokenizer.
        column: The column to read, `prompt` or `messages` by default, unless there is a template.
        template: Text with `{column}` fields.
        chat: Wrap a plain prompt as a user message with the model's chat template.
        system: System message put before it; implies `chat`.
        max_chars: Longer texts can not fit the context, so they are not even tokenised.
        plain: Makes what JSON can hold of a value that a template shows.

    Raises:
        ValueError: The template is malformed.
    """

    tokenizer: Tokenizer
    column: str | None = None
    template: str | None = None
    chat: bool = False
    system: str | None = None
    max_chars: int | None = None
    plain: Callable[[Any], Any] = lambda value: value
    _template: Template | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if self.template is not None:
            object.__setattr__(self, "_template", Template(self.template))

    @property
    def needs_chat_template(self) -> bool:
        """Whether every prompt is a chat."""
        return self.chat or self.system is not None or self.column == "messages"

    def __call__(self, fields: Mapping[str, Any]) -> tuple[int, ...]:
        """Token ids of the row's prompt.

        Raises:
            PromptError: The row has no usable prompt.
        """
        value = self._value(fields)
        if isinstance(value, str) and self.column == "messages":
            value = _parse_messages(value)
        if isinstance(value, list):
            text, special = self._chat(_check_messages(value)), False
        elif not isinstance(value, str):
            kind = "null_prompt" if value is None else "wrong_type"
            raise PromptError(kind, f"the prompt is {_kind(value)}, not text")
        elif self.chat or self.system is not None:
            text, special = self._chat([{"role": "user", "content": value}]), False
        else:
            text, special = value, True
        if isinstance(value, str) and not value:
            raise PromptError("empty_prompt", "the prompt is empty")
        if self.max_chars is not None and len(text) > self.max_chars:
            raise PromptError(
                "prompt_too_long",
                f"the prompt has {len(text):,} characters, and the context holds "
                f"{self.max_chars:,} even of the longest tokens",
            )
        try:
            ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        except (UnicodeError, TypeError) as error:
            raise PromptError("invalid_text", f"the prompt is not valid Unicode: {error}") from None
        if not ids:
            raise PromptError("empty_prompt", "the prompt has no tokens")
        return tuple(ids)

    def _value(self, fields: Mapping[str, Any]) -> Any:
        if self._template is None:
            column = self.column or "prompt"
            if column not in fields:
                raise PromptError("missing_field", f"the row has no field {column!r}")
            return fields[column]
        for name in self._template.columns:
            if name not in fields:
                raise PromptError("missing_field", f"the row has no field {name!r}")
            if fields[name] is None:
                raise PromptError("null_prompt", f"the field {name!r} is null")
        return self._template.fill(fields, self.plain)

    def _chat(self, messages: list[dict[str, Any]]) -> str:
        if self.system is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is the model's program and may raise anything
            raise PromptError("chat_template", f"the chat template refused it: {error}") from error
        return str(text)


def prompt_builder(
    tokenizer: Tokenizer, prompt: Mapping[str, Any], *, max_model_len: int, model: str
) -> PromptBuilder:
    """What makes a job's prompts for a model.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Keyword arguments of `PromptBuilder`.
        max_model_len: Tokens that the context holds.
        model: What to call the model in messages.

    Raises:
        ModelError: The prompts are chats, and the model has no template for them.
    """
    longest = max(map(len, tokenizer.get_vocab()))
    builder = PromptBuilder(tokenizer, **prompt, max_chars=longest * max_model_len)
    if builder.needs_chat_template and not tokenizer.chat_template:
        raise no_chat_template(model)
    return builder


def _parse_messages(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise PromptError("wrong_type", f"messages is text but not JSON: {error}") from None


def _check_messages(value: list[Any]) -> list[dict[str, Any]]:
    if not value:
        raise PromptError("empty_prompt", "messages is an empty list")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise PromptError("wrong_type", f"message {i} is not an object with a role")
        if message.get("content") is None and not message.get("tool_calls"):
            raise PromptError("wrong_type", f"message {i} has no content")
    # Parquet gives every struct all fields; a template must not see the absent ones as null.
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _kind(value: Any) -> str:
    if isinstance(value, int | float):
        return "true or false" if isinstance(value, bool) else "a number"
    return {type(None): "null", dict: "an object"}.get(type(value), f"a {type(value).__name__}")


class Detokenizer:
    """Turns one sequence's output tokens into text as they come.

    Text is emitted only when no later token can change it: a character whose bytes are spread over
    several tokens is held back until it is whole. The prompt's last tokens precede the output, for
    tokenizers that write a word's space with the word.

    Args:
        tokenizer: The model's tokenizer.
        prompt_ids: The prompt's tokens.
        special: Whether special tokens are part of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, special: bool = False
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._skip = not special
        self._ids = list(prompt_ids[-_CONTEXT:])
        #  _ids:  [0 ... prefix ......... read ........ end)
        #                | text emitted  | text held back |
        self._prefix, self._read = 0, len(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the text that became final."""
        self._ids += token_ids
        return self._emit(flush=False)

    def finish(self) -> str:
        """Emit what is held back, an incomplete character as U+FFFD; returns the whole text."""
        self._emit(flush=True)
        return self.text

    def _emit(self, *, flush: bool) -> str:
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if not flush and (after.endswith(_REPLACEMENT) or len(after) <= len(before)):
            return ""
        new = after[len(before) :]
        self._prefix, self._read = self._read, len(self._ids)
        self.text += new
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        try:
            return self._decode_known(ids)
        except (TypeError, ValueError, IndexError, KeyError, OverflowError):
            # A model may have more tokens than its tokenizer, and those are no text.
            return self._decode_known([token for token in ids if self._knows(token)])

    def _decode_known(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )

    def _knows(self, token: int) -> bool:
        try:
            self._decode_known([token])
        except (TypeError, ValueError, IndexError, KeyError, OverflowError):
            return False
        return True


class Specials:
    """A tokenizer's special tokens, which a completion's text does not show.

    Args:
        texts: The tokens.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        longest_first = sorted(filter(None, texts), key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.among = lru_cache(_REMEMBERED)(self._among)

    def without(self, text: str) -> str:
        """A text that shows them, as it is if it does not."""
        return self._any.sub("", text)

    def _among(self, stops: tuple[str, ...]) -> tuple[str, ...]:
        """The stop strings that have one beside other text."""
        return tuple(s for s in stops if self._any.search(s) and not self._any.fullmatch(s))


class Answer:
    """One sequence's text as its tokens come, and where a stop string ends it.

    Stop strings with special tokens in them are looked for in a text that shows those.

    Args:
        tokenizer: The model's tokenizer.
        prompt_ids: The prompt's tokens.
        stops: The stop strings.
        specials: The tokenizer's special tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stops: tuple[str, ...] = (),
        specials: Specials | None = None,
    ) -> None:
        self._shown = Detokenizer(tokenizer, prompt_ids)
        self._stops, self._specials = stops, specials or Specials()
        self._marked = self._specials.among(stops) if stops else ()
        self._whole = Detokenizer(tokenizer, prompt_ids, special=True) if self._marked else None

    @property
    def text(self) -> str:
        """What is final of it."""
        return self._shown.text

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> int | None:
        """Add tokens, the last ones or not; returns where a stop string begins that now ended."""
        new = _grow(self._shown, token_ids, last)
        ends = [find_stop(self._shown.text, new, self._stops)]
        if self._whole is not None:
            new = _grow(self._whole, token_ids, last)
            at = find_stop(self._whole.text, new, self._marked)
            if at is not None:
                behind = self._specials.without(self._whole.text[at:])
                ends.append(max(0, len(self._shown.text) - len(behind)))
        return min((i for i in ends if i is not None), default=None)


def _grow(detokenizer: Detokenizer, token_ids: Sequence[int], last: bool) -> int:
    """Add tokens; returns how many characters became final."""
    before = len(detokenizer.text)
    detokenizer.push(token_ids)
    return len(detokenizer.finish() if last else detokenizer.text) - before


def find_stop(text: str, new: int, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins, if one ends within the last `new` characters."""
    found = [text.find(s, max(0, len(text) - new - len(s) + 1)) for s in stops]
    return min((i for i in found if i >= 0), default=None)
