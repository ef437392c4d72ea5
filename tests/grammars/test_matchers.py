"""Matchers over tokenizers of all kinds that models come with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from batchrun.errors import ModelError
from batchrun.grammars.constraint import constraint_of
from batchrun.grammars.matchers import Matchers
from tests.tiny import byte_vocabulary

WORDS = ["yes", "no", "perhaps", "not", "y", "es", "n", "o"]


def fast(backend: Tokenizer, **more: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"eos_token": "</s>", "unk_token": "<unk>", **more}
    )


def unigram() -> Any:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"▁{w}", -2.0) for w in WORDS)]
    pieces += [(w, -3.0) for w in WORDS]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return fast(backend)


def word_piece() -> Any:
    vocabulary = ["<unk>", "</s>", *WORDS, *(f"##{w}" for w in WORDS)]
    backend = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return fast(backend)


def sentence_piece() -> Any:
    """BPE with bytes to fall back on, as Llama 2 has it."""
    vocabulary = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    vocabulary += sorted(set("".join(WORDS)))
    backend = Tokenizer(
        models.BPE(
            vocab={w: i for i, w in enumerate(vocabulary)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return fast(backend)


def byte_level(**more: Any) -> Any:
    vocabulary = {token: i for i, token in enumerate(byte_vocabulary())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **more)


def first_answer(matchers: Matchers, constraint: str, vocabulary: int) -> list[int]:
    """The answer that always takes the first token that is allowed."""
    matcher, ids = matchers.start(constraint), []
    while not matcher.is_stopped():
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        assert allowed, matcher.get_error()
        assert allowed[0] < vocabulary
        assert matcher.consume_token(allowed[0]), matcher.get_error()
        ids.append(allowed[0])
        assert len(ids) < 50
    return ids


@pytest.mark.parametrize("make", [unigram, word_piece, sentence_piece, byte_level])
@pytest.mark.parametrize("more", [0, 7])
def test_an_answer_of_any_tokenizer(make: Any, more: int) -> None:
    tokenizer = make()
    size = len(tokenizer) + more  # models pad their vocabulary
    eos = tokenizer.eos_token_id
    matchers = Matchers(tokenizer, [] if eos is None else [eos], size)
    for choices in (("yes",), ("noyes", "yesno")):
        constraint = constraint_of("choices", choices)
        assert matchers.problem(constraint) is None
        ids = first_answer(matchers, constraint, size)
        before = [tokenizer.convert_tokens_to_ids("n")]  # as an answer follows its prompt
        texts = [
            tokenizer.decode(i, clean_up_tokenization_spaces=False) for i in (before, before + ids)
        ]
        assert texts[1].removeprefix(texts[0]).strip() in choices


def merging() -> Any:
    """Byte-level, with tokens of several letters."""
    words = ["ye", "yes", "no", "no ", "not"]
    vocabulary = [*byte_vocabulary(), *words[:2], "no", "Ġp"]
    merges = [("y", "e"), ("ye", "s"), ("n", "o"), ("Ġ", "p")]
    backend = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def allowed_tokens(matcher: Any, tokenizer: Any) -> set[str]:
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    ids = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
    return {tokenizer.decode([i]) for i in ids}


def test_choices_are_the_tokens_that_the_tokenizer_makes_of_them() -> None:
    """Any tokens with the same bytes would let a model say the beginning of something else."""
    tokenizer = merging()
    matchers = Matchers(tokenizer, [2], len(tokenizer))
    choices = matchers.start(constraint_of("choices", ("yes", "no", "no please", "maybe")))
    assert allowed_tokens(choices, tokenizer) == {"yes", "no", "m"}
    assert choices.consume_token(tokenizer.convert_tokens_to_ids("no"))
    assert not choices.is_stopped()
    assert allowed_tokens(choices, tokenizer) == {"<|im_end|>", " p"}
    text = matchers.start(constraint_of("regex", "yes|no|no please|maybe"))
    assert allowed_tokens(text, tokenizer) > {"y", "ye", "n"}


def test_a_choice_that_reads_like_a_special_token_is_text() -> None:
    tokenizer = merging()
    matchers = Matchers(tokenizer, [2], len(tokenizer))
    matcher = matchers.start(constraint_of("choices", ("<|im_end|>", "yes")))
    assert allowed_tokens(matcher, tokenizer) == {"<", "yes"}


def test_a_model_with_fewer_tokens_than_its_tokenizer() -> None:
    tokenizer = byte_level()
    matchers = Matchers(tokenizer, [2], 100)
    assert matchers.tokenizer.vocab_size == len(tokenizer)


def test_a_model_without_end_tokens_ends_where_nothing_can_follow() -> None:
    tokenizer = byte_level()
    matchers = Matchers(tokenizer, [], len(tokenizer))
    assert matchers.tokenizer.eos_tokens == [len(tokenizer)]
    ids = first_answer(matchers, constraint_of("regex", "ab"), len(tokenizer))
    assert tokenizer.decode(ids) == "ab"


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    class Odd:
        all_special_ids = ()

        def __len__(self) -> int:
            return 3

        def decode(self, ids: list[int], **_: Any) -> str:
            raise ValueError("nothing here")

    with pytest.raises(ModelError, match="answers of this model can't be constrained"):
        Matchers(Odd(), [2], 3).problem(constraint_of("regex", "a"))


def test_a_constraint_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matchers = Matchers(byte_level(), [2], len(byte_vocabulary()))
    constraint = constraint_of("regex", "[a-f]{2}")
    one = matchers.start(constraint)
    assert one.consume_token(matchers._given.convert_tokens_to_ids("a"))
    compiled = matchers._compiled[constraint]
    assert matchers.problem(constraint) is None
    assert matchers._compiled[constraint] is compiled
    assert not matchers.start(constraint).is_stopped()
