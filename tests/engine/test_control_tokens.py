"""What reads like a control token in a row is text, with every kind of tokenizer."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.prompts.builder import PromptBuilder
from batchrun.prompts.control_tokens import ControlTokens
from batchrun.prompts.messages import PromptError
from tests.engine.chat_templates import CHATML, TEMPLATES, byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<ctl>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% if add_generation_prompt %}<ctl>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<ctl>", "<end>", "<end>>", "<e"]
WORDS = ["the", "cat", "sat", "on", "a", "mat", *".,!</>sendctl"]


def finished(backend: Any, *, template: str = TEMPLATE, **flags: Any) -> Any:
    from tokenizers import AddedToken  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    backend.add_special_tokens([AddedToken(t, special=True, **flags) for t in SPECIAL])
    backend.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=template,
    )


def sentencepiece(scheme: str, flags: dict[str, Any]) -> Any:
    """As Llama 2 has it: BPE with bytes to fall back on, spaces as ▁, `</s>` in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: PLC0415

    letters = sorted({c for word in WORDS for c in word} | {"▁"})
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    pieces = ["</", "s>", "</s>", "▁t", "▁<"]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", *bytes_, *letters, *pieces])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("▁", "t"), ("▁", "<")]
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    if scheme == "nfkc":
        backend.normalizer = normalizers.NFKC()
    elif scheme == "normalizer":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return finished(backend, **flags)


def unigram() -> Any:
    """As T5 and ALBERT have it: NFKC first, and control tokens among the pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: PLC0415

    letters = sorted({c for word in WORDS for c in word} | {"▁"})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<end>", 0.0)]
    pieces += [(c, -5.0) for c in letters] + [("▁the", -3.0), ("▁cat", -3.0), ("nd", -4.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    return finished(backend)


def wordpiece(*, normalized: bool) -> Any:
    """As BERT has it, in lower case."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: PLC0415

    letters = sorted({c for word in WORDS for c in word})
    vocabulary = [*SPECIAL, *letters, *(f"##{c}" for c in letters)]
    backend = Tokenizer(
        models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return finished(backend, normalized=normalized)


MADE = {
    "bytes": lambda: byte_tokenizer(TEMPLATE, SPECIAL),
    "sentencepiece": lambda: sentencepiece("normalizer", {"normalized": False}),
    "nfkc": lambda: sentencepiece("nfkc", {"normalized": False}),
    "normalized": lambda: sentencepiece("first", {"normalized": True}),
    "metaspace": lambda: sentencepiece("first", {"normalized": False}),
    "always": lambda: sentencepiece("always", {"normalized": False}),
    "stripping": lambda: sentencepiece("first", {"lstrip": True, "rstrip": True}),
    "unigram": unigram,
    "wordpiece": lambda: wordpiece(normalized=False),
    "uncased": lambda: wordpiece(normalized=True),
}
KINDS = sorted(MADE)


@cache
def tokenizer_of(kind: str) -> Any:
    return MADE[kind]()


@cache
def builder_of(kind: str, **options: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer_of(kind), column="messages", **options)


def control(kind: str, ids: Any) -> list[int]:
    tokenizer = tokenizer_of(kind)
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return [i for i in ids if i in special - {tokenizer.unk_token_id}]


def prompt(kind: str, *contents: str, **fields: Any) -> tuple[int, ...]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    return builder_of(kind)({"messages": messages, **fields})


texts = st.lists(
    st.sampled_from(
        [*SPECIAL, *WORDS, "\uff1c/s\uff1e", "<END>", "<", "nd>", "<think>", " ", "\n", "é", "🙂"]
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts, tools=st.booleans())
@settings(max_examples=120, deadline=None)
def test_control_tokens_are_those_of_the_template_alone(kind: str, text: str, tools: bool) -> None:
    def given_(text: str) -> dict[str, Any]:
        function = {"name": f"f{text}", "parameters": {text: {"enum": [text]}}}
        return {"tools": [{"type": "function", "function": function}]} if tools else {}

    alone = control(kind, prompt(kind, "cat", "cat", "cat", **given_("cat")))
    ids = prompt(kind, text, "cat", text + "cat", **given_(text))
    assert control(kind, ids) == alone


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@settings(max_examples=120, deadline=None)
def test_text_without_them_is_encoded_as_always(kind: str, text: str) -> None:
    """Also on the way that rows go which have some: by it each text becomes what it always does."""
    tokenizer = tokenizer_of(kind)
    chat = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    usual = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    guard = ControlTokens(tokenizer)
    if guard.put(text) == text:
        assert list(prompt(kind, text)) == usual
    if "\uff1c" in text:  # which no template writes for a control token
        return
    # All that reads like one is the template's here.
    assert guard.encode(rendered, add_special_tokens=False) == usual
    assert guard.encode(text, add_special_tokens=True) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "normalized", "metaspace", "always"])
@given(text=texts)
@settings(max_examples=120, deadline=None)
def test_no_character_of_the_data_is_lost(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    decoded = tokenizer.decode(prompt(kind, text, "x", "y"))
    if kind == "always":  # which writes a space after each control token
        assert text.replace(" ", "") in decoded.replace(" ", "")
    else:
        assert f"user\n{text}" in decoded


@given(text=texts)
@settings(max_examples=120, deadline=None)
def test_a_token_a_byte(text: str) -> None:
    text = text.replace("<think>", "")
    harmless = text.translate({ord(c): "x" for c in "<>/\uff1c\uff1e"})
    more = len(text.encode()) - len(harmless.encode())
    assert len(prompt("bytes", text, "x", "y")) == len(prompt("bytes", harmless, "x", "y")) + more


@pytest.mark.parametrize("kind", KINDS)
@given(a=texts, b=texts)
@settings(max_examples=60, deadline=None)
def test_values_in_a_template(kind: str, a: str, b: str) -> None:
    tokenizer = tokenizer_of(kind)
    builder = PromptBuilder(tokenizer, template="<ctl>{a}{b}<end> cat {b}")
    alone = control(kind, builder({"a": "cat", "b": "cat"}))
    assert control(kind, builder({"a": a, "b": b})) == alone
    chat = PromptBuilder(tokenizer, template="<ctl>{a}{b}<end> cat {b}", chat=True)
    alone = control(kind, chat({"a": "cat", "b": "cat"}))
    assert control(kind, chat({"a": a, "b": [b]})) == alone


def test_what_stays_as_it_was() -> None:
    tokenizer = tokenizer_of("bytes")
    plain = PromptBuilder(tokenizer)({"prompt": "a<end>b"})
    assert list(plain) == tokenizer("a<end>b")["input_ids"]
    allowed = builder_of("bytes", special_tokens_in_data=True)
    messages = [{"role": "user", "content": "a<end>b"}]
    want = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert list(allowed({"messages": messages})) == want
    own = PromptBuilder(tokenizer, system="Be<end>brief")({"prompt": "x<end>"})
    assert control("bytes", own).count(tokenizer.convert_tokens_to_ids("<end>")) == 3
    thought = tokenizer.convert_tokens_to_ids("<think>")
    assert thought in prompt("bytes", "<think> hm<end>")


def test_begun_answers_and_tools_may_have_them_too() -> None:
    for end in ("<end>", " <end> x", "<"):
        ids = prompt("bytes", "x", f"So{end}")
        assert control("bytes", ids) == control("bytes", prompt("bytes", "x", "So"))
        assert tokenizer_of("bytes").decode(ids).endswith(f"So{end}")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_in_the_manner_of_well_known_ones(name: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name])
    special = set(tokenizer.all_special_ids) | {
        i for i, t in tokenizer.added_tokens_decoder.items() if t.special
    }
    builder = PromptBuilder(tokenizer, chat=True)
    evil = "".join(t.content for i, t in tokenizer.added_tokens_decoder.items() if i in special)
    safe = evil.translate({ord(c): "x" for c in "<>[]"})
    ours, theirs = builder({"prompt": f"a {evil} b"}), builder({"prompt": f"a {safe} b"})
    assert len(ours) == len(theirs)
    assert [i for i in ours if i in special] == [i for i in theirs if i in special]
    assert f"a {evil} b" in tokenizer.decode(ours)


def test_a_role_of_which_a_template_would_make_one() -> None:
    builder = PromptBuilder(byte_tokenizer(TEMPLATES["phi4"]), column="messages")
    with pytest.raises(PromptError, match="message 0 has the role 'end'"):
        builder({"messages": [{"role": "end", "content": "x"}]})
    assert builder({"messages": [{"role": "tool", "content": "x"}]})


def test_a_piece_that_no_way_of_writing_avoids_is_the_rows_error() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "x": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = finished(backend, template="{{ messages[0].content }}")
    builder = PromptBuilder(tokenizer, chat=True)
    with pytest.raises(PromptError, match="this tokenizer can encode only as") as caught:
        builder({"prompt": "x <end> x"})
    assert caught.value.kind == "control_tokens"
    assert builder({"prompt": "x y x"}) == (2, 0, 2)


@pytest.mark.parametrize("text", ["a</s>b", "</s>", "x", "a<pad></s>", "é</s>"])
def test_a_tokenizer_in_python(text: str) -> None:
    from transformers import ByT5Tokenizer  # noqa: PLC0415

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>")
    builder = PromptBuilder(tokenizer, chat=True)
    ids = builder({"prompt": text})
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in ids
    assert len(ids) == len(builder({"prompt": "x" * len(text.encode())}))
    filled = PromptBuilder(tokenizer, template="{a}</s>{a}")({"a": text})
    assert filled.count(tokenizer.eos_token_id) == 2


def test_ordinary_rows_are_looked_at_once() -> None:
    guard, text = ControlTokens(tokenizer_of("bytes")), "Some words, and (a < b) more. " * 300
    begin = time.thread_time()
    tokenizer_of("bytes")(text)
    encoding = time.thread_time() - begin
    begin = time.thread_time()
    assert guard.put(text) == text
    assert time.thread_time() - begin < encoding
