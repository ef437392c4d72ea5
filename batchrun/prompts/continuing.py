"""A tokenizer for text that continues other text: it puts no space before the first word.

Tokenizers in SentencePiece's manner encode `Paris` as ` Paris`, as if every text began a sentence,
and some strip a space that is there. Behind a prompt, either would change the text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

# Text to put before another, and its tokens to take away again: a line break joins seldom.
_ANCHORS = ("\n", ".", "a", "1")


def continuing(tokenizer: Any) -> Any:
    """The tokenizer itself, or a copy or wrapper of it, for `tokenizer(text)` without prefixes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _Anchored(tokenizer)
    try:
        made = json.loads(backend.to_str())
    except Exception:  # parts in Python can't be written
        return _Anchored(tokenizer)
    bare = {**made, **{part: _bare(made.get(part)) for part in ("normalizer", "pre_tokenizer")}}
    if bare == made:
        return tokenizer
    found = copy.copy(tokenizer)
    found._tokenizer = Backend.from_str(json.dumps(bare))
    return found


def _bare(part: Any) -> Any:
    """A normalizer or pre-tokenizer, as JSON, that adds and strips nothing at the beginning."""
    if not isinstance(part, Mapping):
        return part
    kept = dict(part)
    if part.get("type") == "Prepend":
        return None
    if part.get("type") == "Strip":
        kept["strip_left"] = False
    if "prepend_scheme" in part:
        kept["prepend_scheme"] = "never"
    if part.get("add_prefix_space"):
        kept["add_prefix_space"] = False
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            kept[name] = [bare for each in part[name] if (bare := _bare(each)) is not None]
    return kept


class _Anchored:
    """A tokenizer that can't be changed: it encodes a text behind another, whose tokens go."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """As the tokenizer's own."""
        for anchor in _ANCHORS:
            alone = list(self._tokenizer(anchor, **options)["input_ids"])
            ids = list(self._tokenizer(anchor + text, **options)["input_ids"])
            if ids[: len(alone)] == alone:
                return {"input_ids": ids[len(alone) :]}
        return {"input_ids": list(self._tokenizer(text, **options)["input_ids"])}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
