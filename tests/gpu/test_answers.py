"""What a user can ask for, in float32: the answers of each device are those of the plainest way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from batchrun import LLM
from tests.gpu.conftest import CUDA
from tests.tiny import byte_vocabulary, write_tokenizer

COMMON = "a sentence that several of the prompts begin with, so that it is computed once: "
PROMPTS = [
    *("x", "two words", COMMON, f"{COMMON}one", f"{COMMON}another", "Ünïcödé ✓", "z" * 300),
    [{"role": "user", "content": "a chat"}],
    {"prompt": "its own parameters", "temperature": 0.5, "max_tokens": 7, "seed": 3},
]
PLAIN = {"device": "cpu", "attention": "sdpa", "overlap": False, "optimize": False}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "seed": 5},
    "cut": {"temperature": 1.2, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "seed": 5},
    "samples": {"temperature": 1.0, "n": 3},
    "best-of": {"temperature": 1.0, "n": 2, "best_of": 4},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "stops": {"stop": ["e", "zz"], "min_tokens": 3},
    "logprobs": {"logprobs": 4},
    "beams": {"num_beams": 4},
    "end-tokens": {"ignore_eos": True, "max_tokens": 40},
}


def write_model(folder: Path) -> Path:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(byte_vocabulary()),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,  # so that choices differ by more than rounding
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LLM]]:
    """Makes one of the model and of the options that a test names."""
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path / "home"))
    model = str(write_model(tmp_path / "model"))
    defaults = {"dtype": "float32", "temperature": 0, "max_tokens": 24, "max_num_seqs": 6}
    with ExitStack() as made:
        yield lambda **options: made.enter_context(
            LLM(model, max_num_batched_tokens=128, **defaults | options)
        )


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_options_mean_the_same_on_each_device(device: str, engine: Callable[..., LLM]) -> None:
    ours, plain = engine(device=device), engine(**PLAIN)
    for name, asked in ASKED.items():
        got, wanted = ours.generate(PROMPTS, **asked), plain.generate(PROMPTS, **asked)
        assert [(r.row, r.sample, r.error) for r in got] == [
            (r.row, r.sample, r.error) for r in wanted
        ], name
        # Float32 rounds differently: one choice of all these may be as near as that.
        same = [(r, w) for r, w in zip(got, wanted, strict=True) if r.token_ids == w.token_ids]
        assert len(same) >= len(got) - 1, name
        for result, other in same:
            assert (result.text, result.finish_reason) == (other.text, other.finish_reason), name
            if result.logprob is not None:
                assert result.logprob == pytest.approx(other.logprob, abs=1e-2), name
            for chosen, others in zip(result.logprobs or (), other.logprobs or (), strict=True):
                assert chosen[0] == pytest.approx(others[0], abs=1e-3), name


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    "fewer", [{"dtype": "float16"}, {"dtype": "bfloat16", "quantize": "int8"}], ids=repr
)
def test_weights_of_fewer_bits_answer_every_row(
    device: str, fewer: dict[str, str], engine: Callable[..., LLM]
) -> None:
    got = engine(device=device, **fewer).generate(PROMPTS, ignore_eos=True)
    assert [r.error for r in got] == [None] * len(PROMPTS)
    assert [r.completion_tokens for r in got] == [24] * (len(PROMPTS) - 1) + [7]
