"""Matchers: say which tokens may come next in an answer that a constraint describes."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from batchrun.errors import ModelError, said_by
from batchrun.grammars.constraint import CHOICES, limits, reason
from batchrun.prompts.continuing import continuing

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 256  # compiled constraints
_MOST_TOKENISED = 1000  # choices that are matched as tokens: each is tried once
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Matchers:
    """Compiles constraints for one model, each once, and hands out matchers.

    Any thread may use it.

    Args:
        tokenizer: The model's tokenizer, from transformers.
        eos_ids: Tokens that end an answer.
        vocabulary: Number of the model's tokens.
    """

    def __init__(self, tokenizer: Any, eos_ids: Collection[int], vocabulary: int) -> None:
        self._given, self._vocabulary = tokenizer, vocabulary
        self._eos_ids = sorted(eos_ids)
        self._compiled: OrderedDict[str, tuple[LLMatcher, str | None]] = OrderedDict()
        self._lock = Lock()

    def start(self, constraint: str) -> LLMatcher:
        """A matcher at the beginning of an answer; in an error state if there is a problem.

        Raises:
            ModelError: The model's tokenizer can't be used with constraints.
        """
        with self._lock:
            return self._found(constraint)[0].deep_copy()

    def problem(self, constraint: str) -> str | None:
        """Why a constraint can't be kept with this model; None if it can.

        Raises:
            ModelError: See `start`.
        """
        with self._lock:
            return self._found(constraint)[1]

    def _found(self, constraint: str) -> tuple[LLMatcher, str | None]:
        found = self._compiled.get(constraint)
        if found is None:
            if constraint.startswith(CHOICES):
                matcher = self._of_choices(json.loads(constraint))
            else:
                matcher = self._compile(constraint)
            found = self._compiled[constraint] = matcher, _problem(matcher)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint)
        return found

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher  # noqa: PLC0415

        return LLMatcher(self.tokenizer, grammar, log_level=0, limits=limits())

    def _of_choices(self, choices: Sequence[str]) -> LLMatcher:
        """A matcher of choices as the tokens that the tokenizer makes of them.

        If any tokens with the same text would do, a model that wants to say `Great` could only say
        `g` and be held to `green`. llguidance can't match tokens by number where another one has
        the same bytes, as letters have in Llama 2's tokenizer: then they are matched as text.
        """
        texts = [json.dumps(choice) for choice in choices]
        if len(choices) <= _MOST_TOKENISED:
            each = _tokenised(choices, self._given)
            parts = [
                text if ids is None else " ".join(f"<[{i}]>" for i in ids)
                for ids, text in zip(each, texts, strict=True)
            ]
            matcher = self._compile(f"start: {' | '.join(parts)}")
            if all(ids is None or _takes(matcher, ids) for ids in each):
                return matcher
        return self._compile(f"start: {' | '.join(texts)}")

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance knows it: made once, in about a second."""
        from llguidance import LLTokenizer  # noqa: PLC0415
        from llguidance.hf import from_tokenizer  # noqa: PLC0415

        size = max(self._vocabulary, len(self._given))
        # A model without end tokens gets one that it can't choose.
        ends = self._eos_ids or [size]
        size += not self._eos_ids
        try:
            return from_tokenizer(self._given, n_vocab=size, eos_token=ends)
        except Exception:  # what it raises depends on what the tokenizer is made of
            try:
                decoded: Any = _Decoded(self._given, ends)
                return LLTokenizer(decoded, n_vocab=size, eos_token=ends)
            except Exception as error:
                raise ModelError(
                    f"answers of this model can't be constrained: llguidance can't use its "
                    f"tokenizer ({said_by(error)})",
                    hint="leave out the structured-output option, or use another model",
                ) from error


def _tokenised(choices: Sequence[str], tokenizer: Any) -> list[list[int] | None]:
    """The tokens that a tokenizer makes of choices; None for one that they can't be told to say.

    It reads like a special token, or decoding puts a space in front of it.
    """
    encode, special = continuing(tokenizer), set(tokenizer.all_special_ids)
    before = list(encode("a", add_special_tokens=False)["input_ids"])

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def plain(choice: str, ids: list[int]) -> bool:
        said = text(before + ids).removeprefix(text(before))
        return said == choice and not special.intersection(ids)

    each = [list(encode(choice, add_special_tokens=False)["input_ids"]) for choice in choices]
    return [ids if plain(choice, ids) else None for choice, ids in zip(choices, each, strict=True)]


def _takes(matcher: LLMatcher, ids: Sequence[int]) -> bool:
    """Whether an answer may consist of these tokens."""
    begun = matcher.deep_copy()
    for token in ids:
        begun.compute_bitmask()  # what is forced is fixed then
        if not begun.consume_token(token):
            return False
    return begun.is_accepting()


def _problem(matcher: LLMatcher) -> str | None:
    """What is wrong with a constraint, also where its first token shows it."""
    allowed = matcher.deep_copy()
    if not allowed.is_error() and not any(allowed.compute_bitmask()):
        return "it allows no answer"
    return reason(allowed.get_error()) if allowed.is_error() else None


class _Decoded:
    """A tokenizer of a kind that llguidance doesn't know: tokens are the text they decode to.

    A `llguidance.TokenizerWrapper`, by its attributes.
    """

    def __init__(self, tokenizer: Any, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self.is_tokenizer_wrapper = True
        self.eos_token_id, self.bos_token_id = ends[0], None
        special = set(tokenizer.all_special_ids)
        count = len(tokenizer)
        self.special_token_ids = sorted({i for i in special if i < count} | {*ends} - {count})
        # Behind another token, so that a space before the word shows.
        anchor = next(i for i in range(count) if i not in special and self._text([i]).strip())
        before = self._text([anchor])
        texts = [self._text([anchor, i]).removeprefix(before) for i in range(count)]
        self.tokens = [b"" if _UNKNOWN in text else text.encode() for text in texts]
        self.tokens += [b""] * (max(ends) + 1 - count)
        self._ids = {token: i for i, token in enumerate(self.tokens) if token}
        self._longest = max(map(len, self._ids))

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens of a text, the longest first; up to where there is none for it.

        The tokenizer itself would put a space before the text.
        """
        said, ids, at = text.encode() if isinstance(text, str) else text, list[int](), 0
        while at < len(said):
            ends = range(min(len(said), at + self._longest), at, -1)
            end = next((end for end in ends if said[at:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[said[at:end]])
            at = end
        return ids
