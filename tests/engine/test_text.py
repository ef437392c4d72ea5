"""Prompts and completions as text, with the real tokenizer."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchrun.engine.answers import Answers
from batchrun.engine.core import FinishReason, Request, SamplingParams, Sequence
from batchrun.engine.output import Detokenizer, Specials, find_stop
from batchrun.jobs.rows.jsontext import encode, parse_object
from batchrun.prompts.builder import PromptBuilder
from batchrun.prompts.messages import PromptError
from batchrun.prompts.template import Template

HARD = [
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family",
    "a\u200bb",
    "\ufffd",
    "\U0001d518\U0001d52b",
    " lead",
    "tail \n",
]


@given(text=st.one_of(st.sampled_from(HARD), st.text(max_size=40)), data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_whole(tokenizer: Any, text: str, data: st.DataObject) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids)  # the vocabulary lacks a few bytes of very rare characters
    detokenizer = Detokenizer(tokenizer, tokenizer("Say it:")["input_ids"])
    emitted = ""
    while ids:
        count = data.draw(st.integers(1, 4))
        emitted += detokenizer.push(ids[:count])
        assert text.startswith(emitted), "text was emitted that a later token changed"
        ids = ids[count:]
    detokenizer.push([], last=True)
    assert detokenizer.text == text


@given(ids=st.lists(st.integers(0, 49151), max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_tokens_decode_as_a_whole(tokenizer: Any, ids: list[int]) -> None:
    """Also tokens no text encodes to: bytes that are not UTF-8, special tokens."""
    detokenizer = Detokenizer(tokenizer, [])
    for token in ids:
        detokenizer.push([token])
    want = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    detokenizer.push([], last=True)
    assert detokenizer.text == want


def test_a_character_cut_by_the_end_is_marked(tokenizer: Any) -> None:
    ids = tokenizer("日", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer, [])
    assert detokenizer.push(ids[:1]) == ""
    assert detokenizer.push([], last=True) == detokenizer.text == "\ufffd"


@given(
    text=st.text(alphabet="ab\n.", max_size=30),
    stops=st.lists(st.text(alphabet="ab\n.", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 5), max_size=30),
)
def test_stop_strings_are_found_wherever_pieces_begin(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    first = min((i for s in stops if (i := text.find(s)) >= 0), default=None)
    seen, found = "", None
    for size in [*cuts, len(text)]:
        piece = text[len(seen) : len(seen) + size]
        seen += piece
        if piece and (found := find_stop(seen, len(piece), stops)) is not None:
            break
    if first is None:
        assert found is None
    else:
        # The earliest that had ended when the piece came: never one that begins later.
        assert found is not None
        assert any(text.startswith(s, found) for s in stops)
        assert not any(s in seen[:found] for s in stops)


MESSAGES = [{"role": "user", "content": "Hi"}]


def test_prompts(tokenizer: Any) -> None:
    def text(builder: PromptBuilder, **fields: Any) -> str:
        return tokenizer.decode(builder(fields))

    assert text(PromptBuilder(tokenizer), prompt="Once upon") == "Once upon"
    chat = text(PromptBuilder(tokenizer, chat=True), prompt="Hi")
    assert chat == text(PromptBuilder(tokenizer, column="messages"), messages=MESSAGES)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    as_json = '[{"role": "user", "content": "Hi"}]'
    assert chat == text(PromptBuilder(tokenizer, column="messages"), messages=as_json)
    system = text(PromptBuilder(tokenizer, system="Be brief."), prompt="Hi")
    assert system.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    template = PromptBuilder(tokenizer, template="{a}: {{x}} {b}")
    assert text(template, a="Name", b=3) == "Name: {x} 3"


@pytest.mark.parametrize(
    ("options", "fields", "kind", "message"),
    [
        ({}, {"prompt": None}, "null_prompt", "null"),
        ({}, {"prompt": ""}, "empty_prompt", "empty"),
        ({"chat": True}, {"prompt": ""}, "empty_prompt", "empty"),
        ({}, {"prompt": 7}, "wrong_type", "a number, not text"),
        ({}, {"prompt": {"a": 1}}, "wrong_type", "an object, not text"),
        ({}, {"text": "x"}, "missing_field", "'prompt'"),
        ({}, {"prompt": "a\ud800"}, "invalid_text", "Unicode"),
        ({"template": "{a}"}, {"a": None}, "null_prompt", "'a'"),
        ({"template": "{a}"}, {"b": "x"}, "missing_field", "'a'"),
        ({"column": "messages"}, {"messages": []}, "empty_prompt", "empty"),
        ({"column": "messages"}, {"messages": "not json"}, "wrong_type", "JSON"),
        ({"column": "messages"}, {"messages": [{"content": "x"}]}, "wrong_type", "role"),
        ({"column": "messages"}, {"messages": [{"role": "user"}]}, "wrong_type", "content"),
    ],
)
def test_bad_rows_say_what_is_wrong(
    tokenizer: Any, options: dict[str, Any], fields: dict[str, Any], kind: str, message: str
) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        PromptBuilder(tokenizer, **options)(fields)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("template", "columns", "filled"),
    [
        ("{Review Text}: {price (EUR)}", ["Review Text", "price (EUR)"], "<1>: <2>"),
        ("{a.b}{a:b}{x!r}{0}", ["a.b", "a:b", "x!r", "0"], "<1><2><3><4>"),
        ("{a[0]} {\u4fa1\u683c} { }", ["a[0]", "\u4fa1\u683c", " "], "<1> <2> <3>"),
        ("{a}{a}", ["a"], "<1><1>"),
        ('{{"text": "{a}"}}', ["a"], '{"text": "<1>"}'),
        ("{a}}}", ["a"], "<1>}"),
        ("{{{a}}}", ["a"], "{<1>}"),
        ("{a}}}}}{b}{{}}", ["a", "b"], "<1>}}<2>{}"),
        ("{a{{b}}} {{{{", ["a{b}"], "<1> {{"),
        ("{a{{{{b}}}}c}", ["a{{b}}c"], "<1>"),
    ],
)
def test_any_column_can_stand_in_a_template(template: str, columns: list[str], filled: str) -> None:
    made = Template(template)
    assert made.columns == columns
    values = {name: f"<{i}>" for i, name in enumerate(columns, 1)}
    assert made.fill(values, lambda value: value) == filled


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("no field", "names no column"),
        ("{{a}}", "names no column"),
        ("{}", "field {} at character 1"),
        ("{a} {", "begins at character 5 is never closed"),
        ("{a}}", "lone } in the template at character 4"),
        ("} {a}", "lone } in the template at character 1"),
        ("{a{b}", "lone { in the template field {a at character 3"),
        ("{a{{b}c}", "lone } in the template field {a{b at character 6"),
    ],
)
def test_a_brace_that_is_neither_of_a_field_nor_doubled(template: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        Template(template)


names = st.text(alphabet="ab !:[].\n", min_size=1)


@given(parts=st.lists(st.tuples(st.text(alphabet="x{}"), names), min_size=1))
def test_a_template_is_what_was_written(parts: list[tuple[str, str]]) -> None:
    def doubled(text: str) -> str:
        return text.replace("{", "{{").replace("}", "}}")

    template = "".join(f"{doubled(text)}{{{name}}}" for text, name in parts)
    values = {name: f"{{{name}}}" for _, name in parts}  # which is never read as a field
    want = "".join(text + values[name] for text, name in parts)
    assert Template(template).fill(values, lambda value: value) == want


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["a", 'b"', None, True], '["a", "b\\"", null, true]'),
        ({"k": {"n": 1.5}, "\u00e9": "\u4fa1"}, '{"k": {"n": 1.5}, "\u00e9": "\u4fa1"}'),
        (True, "true"),
        (3, "3"),
        (0.1, "0.1"),
        (parse_object('{"n": [1.10, 1E5]}')["n"], "[1.10, 1E5]"),  # to the digit
        ("{a}", "{a}"),
    ],
)
def test_a_template_shows_values_as_json_does(value: Any, text: str) -> None:
    assert Template("{a}").fill({"a": value}, encode) == text


def test_finish_reasons_are_the_fields_usual_words() -> None:
    assert [str(r) for r in FinishReason] == ["stop", "length", "scored", "error"]


@given(
    words=st.lists(st.sampled_from(["s", " t", "日本語", "👩", "in", "ж"]), min_size=2, max_size=9),
    stops=st.lists(st.sampled_from(["s", " t", "in", "本"]), min_size=1, max_size=2),
    least=st.integers(0, 20),
    data=st.data(),
)
@example(words=["s", "日本語", "👩", "in"], stops=["s"], least=3, data=None)
@settings(max_examples=150, deadline=None)
def test_a_continued_answer_ends_where_it_would_have(
    tokenizer: Any, words: list[str], stops: list[str], least: int, data: st.DataObject | None
) -> None:
    """Also where the tokens so far end within a character, and a stop string came too early."""
    ids = tokenizer("".join(words), add_special_tokens=False)["input_ids"]
    params = SamplingParams(max_tokens=40, min_tokens=least, stop=tuple(dict.fromkeys(stops)))

    def ends(begun: int) -> tuple[list[int], str | None]:
        answers = Answers(tokenizer, frozenset(), Specials(), None)
        sequence = Sequence(Request(0, 0, (5, 6), params, 0), ids[:begun])
        for token in ids[begun:]:
            sequence.output_ids.append(token)
            if answers.ended(sequence, token, 1000):
                break
        return sequence.output_ids, sequence.text

    whole, text = ends(0)
    begun = [data.draw(st.integers(0, len(whole) - 1))] if data else range(len(whole))
    assert all(ends(each) == (whole, text) for each in begun)
