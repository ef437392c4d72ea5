"""Turns an answer's tokens into text, and finds where a stop string ends it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from batchrun.prompts.chat import Tokenizer

_CONTEXT = 8  # prompt tokens that precede the output when it is decoded
_REMEMBERED = 1024  # lists of stop strings
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns one sequence's output tokens into text as they arrive.

    Text is emitted only when no later token can change it: a character whose bytes span several
    tokens is held back until it is complete. The prompt's last tokens are decoded in front of the
    output, for tokenizers that attach the space to the word after it.

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

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """Add tokens; returns the text that became final.

        With `last`, nothing is held back: an incomplete character becomes U+FFFD.
        """
        self._ids += token_ids
        new = self._emit(flush=False)
        return new + self._emit(flush=True) if last else new

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
            # A model may have tokens that its tokenizer lacks; they have no text.
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
    """A tokenizer's special tokens, which are hidden in a completion's text.

    Args:
        texts: The tokens' texts.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        longest_first = sorted(filter(None, texts), key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.among = lru_cache(_REMEMBERED)(self._among)

    def without(self, text: str) -> str:
        """The text without special tokens."""
        return self._any.sub("", text)

    def _among(self, stops: tuple[str, ...]) -> tuple[str, ...]:
        """The stop strings that contain a special token beside other text."""
        return tuple(s for s in stops if self._any.search(s) and not self._any.fullmatch(s))


class Answer:
    """One sequence's text as its tokens arrive, and where a stop string ends it.

    Stop strings that contain special tokens are searched for in a text that shows those.

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
        """The text that is final so far."""
        return self._shown.text

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> int | None:
        """Add tokens; returns where a stop string that is now complete begins, or None."""
        new = self._shown.push(token_ids, last=last)
        ends = [find_stop(self._shown.text, len(new), self._stops)]
        if self._whole is not None:
            new = self._whole.push(token_ids, last=last)
            at = find_stop(self._whole.text, len(new), self._marked)
            if at is not None:
                behind = self._specials.without(self._whole.text[at:])
                ends.append(max(0, len(self._shown.text) - len(behind)))
        return min((i for i in ends if i is not None), default=None)


def find_stop(text: str, new: int, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string that ends within the last `new` characters begins."""
    found = [text.find(s, max(0, len(text) - new - len(s) + 1)) for s in stops]
    return min((i for i in found if i >= 0), default=None)
