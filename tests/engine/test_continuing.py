"""Text behind a prompt is encoded as it continues the prompt: nothing is added, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.prompts.builder import PromptBuilder
from batchrun.prompts.continuing import continuing
from batchrun.prompts.messages import PromptError
from tests.engine.test_control_tokens import KINDS as TOKENIZERS
from tests.engine.test_control_tokens import control, tokenizer_of

# Those whose tokens keep every character of a text.
KINDS = ["bytes", "sentencepiece", "metaspace", "always", "normalized", "unigram"]
WORDS = st.sampled_from(["the", " the", "cat ", " ", "  a", "\n", "mat.", "é", "<", "s>", "</"])
TEXTS = st.lists(WORDS, max_size=5).map("".join)


def builder_of(kind: str, **options: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer_of(kind), **options)


def text_of(kind: str, ids: Any) -> str:
    """As it is read in the middle of a text, where no space is left out."""
    tokenizer = tokenizer_of(kind)
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = str(tokenizer.decode([*before, *ids], clean_up_tokenization_spaces=False))
    alone = str(tokenizer.decode(before, clean_up_tokenization_spaces=False))
    assert whole.startswith(alone)
    return whole[len(alone) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS.filter(bool), text=TEXTS)
def test_prompt_and_text_give_back_the_same_text(kind: str, prompt: str, text: str) -> None:
    if kind == "unigram":  # it knows letters only
        prompt, text = (t.replace("é", "e").replace("\n", " ") for t in (prompt, text))
    builder = builder_of(kind)
    start, ids = builder({"prompt": prompt}), builder.continuation(text, {"prompt": prompt})
    tokenizer = tokenizer_of(kind)

    def decoded(ids: Any) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    assert decoded([*start, *ids]) == decoded(start) + text
    assert bool(ids) == bool(text)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_text_gets_a_space_or_special_tokens(kind: str) -> None:
    builder = builder_of(kind)
    assert builder.continuation("") == ()
    ids = builder.continuation("the")
    assert not control(kind, ids)
    if kind in KINDS:
        assert text_of(kind, ids) == "the"
        assert text_of(kind, builder.continuation(" the")) == " the"


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace", "bytes"])
@pytest.mark.parametrize(
    ("options", "fields", "is_one"),
    [
        ({}, {"prompt": "a"}, True),  # a plain prompt's text, used as is
        ({"chat": True}, {"prompt": "a"}, False),
        ({"template": "{a}"}, {"a": "a"}, False),
        ({}, {"prompt": [{"role": "user", "content": "a"}]}, False),
        ({"chat": True, "special_tokens_in_data": True}, {"prompt": "a"}, True),
    ],
)
def test_control_tokens_are_what_they_are_in_the_prompt(
    kind: str, options: dict[str, Any], fields: dict[str, Any], is_one: bool
) -> None:
    builder = builder_of(kind, **options)
    ids = builder.continuation("the<end>", fields)
    assert len(control(kind, ids)) == is_one
    if not is_one:
        assert text_of(kind, ids) == "the<end>"
    own = builder.continuation("the<end>")  # the user's own, as a label
    assert len(control(kind, own)) == 1


def test_one_that_needs_no_change_is_not_copied() -> None:
    tokenizer = tokenizer_of("bytes")
    assert continuing(tokenizer) is tokenizer
    assert continuing(tokenizer_of("metaspace")) is not tokenizer_of("metaspace")


@pytest.mark.parametrize("text", ["", "x", " x", "a</s>b", "é"])
def test_a_tokenizer_in_python(text: str) -> None:
    from transformers import ByT5Tokenizer  # noqa: PLC0415

    builder = PromptBuilder(ByT5Tokenizer(), chat=True)
    ids = builder.continuation(text, {"prompt": "x"})
    assert ids == tuple(byte + 3 for byte in text.encode())


class _Prefixing:
    """Written in Python: it puts a space before each text, and joins spaces."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in " " + text if c != " " or text != ""]}


def test_a_prefix_that_can_not_be_switched_off_is_taken_away() -> None:
    made = continuing(_Prefixing())
    assert made("x")["input_ids"] == [ord("x")]
    assert made(" x")["input_ids"] == [ord(" "), ord("x")]


def test_a_text_too_long_for_any_context_is_not_encoded() -> None:
    builder = builder_of("bytes", max_chars=10)
    with pytest.raises(PromptError, match="the text to score has 11 characters") as caught:
        builder.continuation("x" * 11)
    assert caught.value.kind == "prompt_too_long"
