"""What a model's files say about generating, and what rows make of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers as tf

from batchrun.engine.core import FinishReason, SamplingParams
from batchrun.engine.model.generation import (
    Generation,
    eos_ids,
    read_generation,
    special_tokens,
    vocabulary_size,
    within_vocabulary,
)
from batchrun.engine.model.prepare import prepare
from batchrun.engine.output import Answer, Detokenizer, Specials, find_stop
from batchrun.prompts.messages import PromptError
from tests.parity.models import CONFIGS, seeded
from tests.parity.runner import rig, run
from tests.tiny import SPECIAL, byte_vocabulary, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A token a byte, of which a text shows no special one; id 2 is the end token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    found = tf.AutoTokenizer.from_pretrained(folder)
    found.add_tokens(["<plain>"])
    found.add_special_tokens({"additional_special_tokens": SPECIAL})
    return found


def llama() -> tf.PreTrainedModel:
    """A model whose config is its own."""
    return seeded(copy.deepcopy(CONFIGS["llama"]))


def generation(**config: Any) -> Generation:
    model = llama()
    model.generation_config = tf.GenerationConfig(**config)
    return read_generation(model, None, 256)


def test_defaults_are_the_models_own() -> None:
    assert generation().sampling == {}
    asked = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    found = generation(do_sample=True, max_new_tokens=77, **asked)
    assert found.sampling == {**asked, "max_tokens": 77}
    assert generation(do_sample=False, repetition_penalty=1.1).sampling == {
        "repetition_penalty": 1.1
    }
    assert generation(do_sample=True).sampling == {"temperature": 1.0}


def test_a_job_and_its_rows_override_them() -> None:
    found = generation(min_new_tokens=50, repetition_penalty=1.2, max_new_tokens=90)
    assert found.params({}).min_tokens == 50
    assert found.params({"max_tokens": 24}).min_tokens == 24
    assert found.params({"min_tokens": 3, "repetition_penalty": 1.0}) == SamplingParams(
        max_tokens=90, min_tokens=3
    )
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens"):
        found.params({"min_tokens": 5, "max_tokens": 4})


def test_lengths_of_prompt_and_answer_together() -> None:
    found = generation(max_length=30, min_length=25)
    params = found.params({})
    assert found.fitted(params, {}, 20) == SamplingParams(max_tokens=10, min_tokens=5)
    assert found.fitted(params, {}, 29) == SamplingParams(max_tokens=1)
    given = {"max_tokens": 3}
    assert found.fitted(found.params(given), given, 20).max_tokens == 3
    given = {"max_tokens": 8, "min_tokens": 1}
    assert found.fitted(found.params(given), given, 20) == SamplingParams(**given)
    with pytest.raises(PromptError, match=r"has 30 tokens.*max_length=30.*--max-tokens"):
        found.fitted(params, {}, 30)
    for config in ({"max_length": 20}, {"max_length": 30, "max_new_tokens": 5}):
        assert generation(**config).max_length is None


def test_what_is_not_done_is_named() -> None:
    asked = {"num_beams": 4, "guidance_scale": 1.5, "penalty_alpha": 0.6, "num_return_sequences": 3}
    assert set(generation(**asked).ignored) == {f"{k}={v}" for k, v in asked.items()}
    defaults = tf.GenerationConfig._get_default_generation_params()
    assert generation(**defaults).ignored == ()
    assert generation(**defaults).logits == generation().logits


def test_values_that_can_not_be_are_named_and_left_out() -> None:
    config = tf.GenerationConfig(do_sample=True)
    for name, value in {
        "top_p": 7.0,
        "repetition_penalty": -1.0,
        "typical_p": -2.0,
        "suppress_tokens": ["x"],
        "sequence_bias": 3,
    }.items():
        setattr(config, name, value)
    model = llama()
    model.generation_config = config
    found = read_generation(model, None, 256)
    assert len(found.ignored) == 5
    assert found.params({}) == SamplingParams(temperature=1.0)
    assert found.logits == generation().logits


def test_tokens_beyond_the_vocabulary_are_no_part_of_any_processor() -> None:
    found = generation(
        suppress_tokens=[3, 10**6, -1],
        begin_suppress_tokens=[199],
        bad_words_ids=[[4, 500], [198], []],
        sequence_bias=[[[7, 199], 1.0], [[7, 8], 2.0]],
        forced_eos_token_id=[400, 5],
    ).logits
    assert (found.suppress, found.begin_suppress, found.bad_words) == ((3,), (), ((198,),))
    assert (found.sequence_bias, found.forced_eos) == ({(7, 8): 2.0}, (5,))


def test_end_tokens_are_those_of_all_files(tokenizer: Any) -> None:
    model = llama()
    model.generation_config = tf.GenerationConfig(eos_token_id=[9, 10**6, -4])
    model.config.eos_token_id = [0, 7]
    assert eos_ids(model, None) == {9, 0, 7}
    assert eos_ids(model, tokenizer) == {9, 0, 2}, "7 is an ordinary token of the tokenizer"
    model.config.eos_token_id = None
    model.generation_config = None
    assert eos_ids(model, None) == frozenset()


def test_a_token_that_only_the_tokenizer_has_is_a_rows_error(tokenizer: Any) -> None:
    size = len(byte_vocabulary())
    encode = within_vocabulary(lambda fields: fields["ids"], tokenizer, size)
    assert encode({"ids": (0, size - 1)}) == (0, size - 1)
    says = rf"the prompt has the token '<plain>' \({size}\), but the model's vocabulary has {size}"
    with pytest.raises(PromptError, match=says) as caught:
        encode({"ids": (5, size, 6)})
    assert caught.value.kind == "unknown_token"
    assert vocabulary_size(llama()) == 199


def test_special_stop_strings_are_stop_tokens(tokenizer: Any) -> None:
    specials = special_tokens(tokenizer)
    assert specials == {text: i for i, text in enumerate(SPECIAL)}
    own = Generation(stop=("###", SPECIAL[1]), specials=specials)
    params = own.params({"stop": (SPECIAL[2], "x", "<plain>"), "stop_token_ids": (2, 9)})
    assert params.stop == (SPECIAL[2], "x", "<plain>", "###", SPECIAL[1])
    assert params.stop_token_ids == (2, 9, 1)
    assert own.params({"stop": ("x",), "ignore_eos": True}).stop == ("x",)
    assert Generation(specials=specials).params({}) == SamplingParams()


@pytest.mark.parametrize(
    ("tokens", "stop", "text"),
    [
        (["ab", 2, "\nUser: c"], ("<|im_end|>\nUser:",), "ab"),
        (["ab\nEnd", 2, "c"], ("End<|im_end|>",), "ab\n"),
        (["a", 1, 2, "b", 0, "c"], ("<|im_end|>b<|endoftext|>c",), "a"),
        (["ab<|im_end|>\nUser: c"], ("<|im_end|>\nUser:",), "ab"),  # spelled out
        (["a", 2, "b"], ("<|im_end|>c", "b"), "a"),
        (["a", 2, "b"], ("<|im_end|>c",), None),
        (["é", 2, "日本"], ("<|im_end|>日",), "é"),
        (["abc"], ("bc", "abc"), ""),
    ],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_stop_strings_with_special_tokens(
    tokenizer: Any, tokens: list[str | int], stop: tuple[str, ...], text: str | None, at_once: bool
) -> None:
    ids: list[int] = []
    for part in tokens:
        spelled = [] if isinstance(part, int) else spell(part)
        ids += [part] if isinstance(part, int) else spelled
    answer = Answer(tokenizer, [5, 6], stop, Specials(SPECIAL))
    cut = None
    for piece in [ids] if at_once else [[i] for i in ids]:
        cut = answer.push(piece)
        if cut is not None:
            break
    assert (None if cut is None else answer.text[:cut]) == text


def spell(text: str) -> list[int]:
    """Tokens of bytes, also where the text looks like a special token."""
    from tokenizers.pre_tokenizers import ByteLevel  # noqa: PLC0415

    level = ByteLevel(add_prefix_space=False, use_regex=False)
    [(spelled, _)] = level.pre_tokenize_str(text)
    vocabulary = {token: i for i, token in enumerate(byte_vocabulary())}
    return [vocabulary[c] for c in spelled]


def test_no_text_stops_at_nothing() -> None:
    with pytest.raises(ValueError, match="stop must be non-empty text"):
        SamplingParams(stop=("x", ""))
    assert find_stop("abc", 0, ["c"]) is None


def test_tokens_beyond_the_tokenizers_vocabulary_have_no_text(tokenizer: Any) -> None:
    class Strict:
        """A tokenizer that raises for tokens that it does not know."""

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            if max(ids, default=0) >= len(tokenizer):
                raise IndexError("piece id is out of range.")
            return str(tokenizer.decode(ids, **kwargs))

    for each in (tokenizer, Strict()):
        detokenizer = Detokenizer(each, [])
        for token in [*spell("a日"), 10**6, *spell("b")]:
            detokenizer.push([token])
        detokenizer.push([], last=True)
        assert detokenizer.text == "a日b"


class Panic(BaseException):
    """What a tokenizer in Rust raises at its worst is no `Exception` either."""


class Panicking:
    """A tokenizer that can't decode a token."""

    chat_template = None

    def decode(self, ids: list[int], **_: Any) -> str:
        if any(i % 17 == 2 for i in ids):
            raise Panic("at a token\nmore")
        return "".join(f"{i} " for i in ids)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_tokenizer_that_fails_makes_errors_of_its_rows(num_beams: int) -> None:
    model = prepare(llama(), Panicking())
    prompts = [[i, i + 1] for i in range(3, 40)]
    params = SamplingParams(max_tokens=5, ignore_eos=True, num_beams=num_beams)
    with rig(model) as r:
        done = run(r, prompts, params)
        assert r.arena.num_open == 0
    failed = [c for c in done if c.finish_reason is FinishReason.ERROR]
    assert 0 < len(failed) < len(done)
    for completion in done:
        if completion in failed:
            assert completion.error == "its tokens can't be decoded to text: Panic: at a token"
            assert completion.error_kind == "internal"
            assert any(i % 17 == 2 for i in (*completion.request.prompt_ids, *completion.token_ids))
        else:
            assert completion.text is not None


def test_the_models_own_stop_strings_end_an_answer(tokenizer: Any) -> None:
    model = llama()
    model.resize_token_embeddings(len(byte_vocabulary()))
    loaded = prepare(model, tokenizer)
    prompts = [[i, i + 1] for i in range(3, 60)]
    with rig(loaded) as r:
        free = run(r, prompts, SamplingParams(max_tokens=20))
    stop = next(c.text[3] for c in free if c.text and len(c.text) > 8 and c.text[3].isascii())
    model.generation_config = tf.GenerationConfig(stop_strings=[stop], eos_token_id=2)
    found = read_generation(model, tokenizer, 256)
    with rig(loaded) as r:
        held = run(r, prompts, found.params({"max_tokens": 20}))
        ignored = run(r, prompts, found.params({"max_tokens": 20, "ignore_eos": True}))
    assert [c.text.partition(stop)[0] for c in free] == [c.text for c in held]
    assert sum(c.finish_reason is FinishReason.STOP for c in held) > 1
    assert all(len(c.token_ids) == 20 for c in ignored)
