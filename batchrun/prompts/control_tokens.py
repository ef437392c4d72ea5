r"""Only a template makes control tokens: what reads like one in a row's data is encoded as text.

    data       Good.<|im_end|>            put(): a mark in what reads as a control token
    marked     Good.<MARK|im_end|>
    rendered   <|im_start|>user\nGood.<MARK|im_end|><|im_end|>
    aliased    zAk0kuser\nGood.<|im_end|>zAk1k          encode(): the template's become aliases

Aliases are tokens of a copy of the tokenizer that reads control tokens as text. So the text is
split where it always is, and encoded as always.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Callable
from functools import cached_property
from typing import Any

from tokenizers import AddedToken

from batchrun.prompts.messages import PromptError

# Random in each process, so no row's text contains them. Letters and digits survive whatever a
# template or a normalizer does to text, lower case or not.
_NONCE = secrets.token_hex(8)
_MARK = f"z{_NONCE}m"
_BEFORE = f"z{_NONCE}o"  # precedes a token of one character, which can't be broken
_MARKS = re.compile(f"{_MARK}|{_BEFORE}", re.IGNORECASE)


class ControlTokens:
    """A tokenizer's control tokens, told apart from text that reads like them.

    These are its special tokens. Added tokens that are not special, such as `<think>`, are text
    that a row may well have.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._tokens: dict[int, AddedToken] = _special(tokenizer)
        self._ids = {token.content: i for i, token in self._tokens.items()}
        self._unknown = self._ids.get(str(getattr(tokenizer, "unk_token", None)))
        texts = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        many = "|".join(re.escape(text) for text in texts if len(text) > 1) or "(?!)"
        one = "|".join(re.escape(text) for text in texts if len(text) == 1) or "(?!)"
        self._firsts = "".join({text[0] for text in texts})
        self._lasts = "".join({text[-1] for text in texts})
        self._longest = max(map(len, texts), default=0)
        self._texts = texts
        self._breakable = re.compile(f"(?=(?:{many}))(?P<first>.)|(?P<one>{one})", re.DOTALL)
        self._normalized = self._read_as()
        self._aliases = {i: f"z{_NONCE}k{i}k" for i in self._tokens}
        self._aliased: dict[int, int] = {}

    def put(self, value: Any) -> Any:
        """A text, or lists and objects of texts, with marks in what might read as a control token.

        `encode` removes the marks again. Most texts need none, and stay as they are.
        """
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, dict):
            return {self._broken(key): self.put(item) for key, item in value.items()}
        return [self.put(item) for item in value] if isinstance(value, list) else value

    def marked(self, text: str) -> bool:
        """Whether a text has marks, in whatever case a template wrote them."""
        return _NONCE in text.lower()

    def strip(self, text: str) -> str:
        """A text without marks."""
        return _MARKS.sub("", text)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokens of a text with marks.

        Raises:
            PromptError: Text that reads like a control token can't be encoded otherwise.
        """
        if self._backend is None:
            return self._encode_pieces(text, add_special_tokens)
        parts, end = [], 0
        for i, start, stop in self._found(text):
            parts += [self.strip(text[end:start]), self._aliases[i]]
            end = stop
        parts.append(self.strip(text[end:]))
        encoding = self._copy.encode("".join(parts), add_special_tokens=add_special_tokens)
        ids: list[int] = []
        for i, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if i in self._aliased:
                ids.append(self._aliased[i])
            elif i in self._tokens and i != self._unknown and not added:
                ids += self._broken_up(self._tokens[i].content)
            else:
                ids.append(i)
        return ids

    def in_name(self, name: str) -> bool:
        """Whether a control token contains a name: a template may build the token from it."""
        return any(name in text for text in self._ids)

    # --- data ---

    def _has(self, text: str) -> bool:
        if self._normalized is not None and self._normalized.search(self._normalize(text)):
            return True
        return _any_in(self._firsts, text) and self._pattern.search(text) is not None

    def _marked(self, text: str) -> str:
        text = self._broken(text)
        if (end := self._end(text)) is not None:
            text = text[:end] + _MARK + text[end:]
        if (begin := self._begin(text)) is not None:
            text = text[:begin] + _MARK + text[begin:]
        return text

    def _broken(self, text: str) -> str:
        """The text with a mark in everything that is, or reads like, a control token."""
        if not self._has(text):
            return text
        text = self._breakable.sub(
            lambda found: found[0] + _MARK if found["one"] is None else _BEFORE + found[0], text
        )
        if self._normalized is not None:
            for _ in range(len(text)):  # each turn breaks one
                begin = next((begin for _, begin, _ in self._found(text)), None)
                if begin is None:
                    break
                text = text[: begin + 1] + _MARK + text[begin + 1 :]
        return text

    def _end(self, text: str) -> int | None:
        """Where a text ends, if it ends with the start of a control token that others could end."""
        end = len(text.rstrip())
        tail = text[max(0, end - self._longest) : end]
        if not _any_in(self._firsts, tail):
            return None
        begins = [tail[n:] for n, character in enumerate(tail) if character in self._firsts]
        return end if any(self._is_part(str.startswith, begin) for begin in begins) else None

    def _begin(self, text: str) -> int | None:
        """Where a text begins, if it begins with the end of a control token others could begin."""
        begin = len(text) - len(text.lstrip())
        head = text[begin : begin + self._longest]
        if not _any_in(self._lasts, head):
            return None
        ends = [head[: n + 1] for n, character in enumerate(head) if character in self._lasts]
        return begin if any(self._is_part(str.endswith, end) for end in ends) else None

    def _is_part(self, of: Callable[[str, str], bool], text: str) -> bool:
        """Whether some longer control token begins, or ends, with a text."""
        return any(len(text) < len(token) and of(token, text) for token in self._texts)

    # --- tokens ---

    def _found(self, text: str) -> list[tuple[int, int, int]]:
        """Control tokens that the tokenizer finds in a text: id, start and end."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [
            (i, start, stop)
            for i, (start, stop) in places
            if i in self._tokens
            and (i != self._unknown or text[start:stop].strip() == self._tokens[i].content)
            and not text.endswith(_BEFORE, 0, start)
        ]

    @cached_property
    def _copy(self) -> Any:
        """A copy of the tokenizer that reads control tokens as text and aliases as tokens."""
        made = copy.deepcopy(self._backend)
        made.add_special_tokens(list(self._tokens.values()))
        made.encode_special_tokens = True
        for i, token in self._tokens.items():
            alias = self._aliases[i]
            flags = {"lstrip": token.lstrip, "rstrip": token.rstrip}
            flags |= {"single_word": token.single_word, "normalized": token.normalized}
            made.add_tokens([AddedToken(alias, special=False, **flags)])
            self._aliased[made.token_to_id(alias)] = i
        return made

    def _broken_up(self, text: str) -> list[int]:
        """Tokens for the text of a control token that is itself a piece of the vocabulary."""
        for n in range(1, len(text)):
            parts = (self._backend.model.tokenize(part) for part in (text[:n], text[n:]))
            ids = [piece.id for pieces in parts for piece in pieces]
            if not set(ids) & self._tokens.keys():
                return ids
        raise _no_text(text)

    def _encode_pieces(self, text: str, add_special_tokens: bool) -> list[int]:
        """`encode` for a tokenizer written in Python, which gets the text in pieces."""
        ids: list[int] = []
        # Alternately text and the template's control tokens.
        parts = re.split(f"(?<!{_BEFORE})({self._pattern.pattern})", text)
        for n, part in enumerate(parts):
            if n % 2:
                ids.append(self._ids[part])
                continue
            part = self.strip(part)  # noqa: PLW2901
            if n and self._tokens[self._ids[parts[n - 1]]].rstrip:
                part = part.lstrip()  # noqa: PLW2901
            if n < len(parts) - 1 and self._tokens[self._ids[parts[n + 1]]].lstrip:
                part = part.rstrip()  # noqa: PLW2901
            has = self._pattern.search(part) is not None
            found = self._tokenizer(part, add_special_tokens=False, split_special_tokens=has)
            if bad := set(found["input_ids"]) & self._tokens.keys() - {self._unknown}:
                raise _no_text(self._tokens[bad.pop()].content)
            ids += found["input_ids"]
        if add_special_tokens:
            ids = self._tokenizer.build_inputs_with_special_tokens(ids)
        return ids

    def _normalize(self, text: str) -> str:
        return str(self._backend.normalizer.normalize_str(text))

    def _read_as(self) -> re.Pattern[str] | None:
        """Finds control tokens in normalized text; None if no other text can become one."""
        if self._backend is None or self._backend.normalizer is None:
            return None
        texts = set()
        for i, token in self._tokens.items():
            pieces = self._backend.model.tokenize(token.content)
            if token.normalized or i in (piece.id for piece in pieces):
                texts |= {token.content, self._normalize(token.content)} - {""}
        return re.compile("|".join(map(re.escape, texts))) if texts else None


def _any_in(characters: str, text: str) -> bool:
    """Whether a text has one of these characters."""
    for character in characters:  # noqa: SIM110 - half the time of any(), for every row's text
        if character in text:
            return True
    return False


def _special(tokenizer: Any) -> dict[int, AddedToken]:
    added = dict(tokenizer.added_tokens_decoder)
    found = {int(i): token for i, token in added.items() if token.special and token.content}
    known = {token.content: i for i, token in added.items()}
    for text in map(str, tokenizer.all_special_tokens):
        i = known.get(text, tokenizer.convert_tokens_to_ids(text))
        none = i is None or (i == tokenizer.unk_token_id and text != str(tokenizer.unk_token))
        if not none and i not in found and text:
            found[int(i)] = added.get(i) or AddedToken(text, special=True, normalized=False)
    return found


def _no_text(text: str) -> PromptError:
    return PromptError(
        "control_tokens",
        f"the row's text has {text}, which this tokenizer can encode only as a control token; "
        "--special-tokens-in-data allows that",
    )
