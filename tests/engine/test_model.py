"""What would be silently wrong is refused, by name and reason, before a job starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from batchrun.engine.attention import KV, LayerAttention
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.core import EngineError
from batchrun.engine.model import gates, verdicts
from batchrun.engine.model import prepare as model
from batchrun.engine.shortage import device_errors
from batchrun.errors import ModelError
from tests.parity.models import build
from tests.parity.runner import rig

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

REFUSED = {
    "T5ForConditionalGeneration": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
    "BloomForCausalLM": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    ),
    "MambaForCausalLM": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "BertLMHeadModel": lambda: tf.BertLMHeadModel(
        tf.BertConfig(**SIZES, intermediate_size=32, is_decoder=False)
    ),
    "MptForCausalLM": lambda: tf.MptForCausalLM(
        tf.MptConfig(vocab_size=99, d_model=32, n_layers=2, n_heads=4)
    ),
    "RwkvForCausalLM": lambda: tf.RwkvForCausalLM(
        tf.RwkvConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_would_be_wrong_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=rf"the architecture {name} is refused: \w+") as caught:
        model.prepare(REFUSED[name]().eval())
    assert caught.value.hint


class _WrongWindow(SDPA):
    """A backend that forgets the sliding window: right for short prompts, wrong beyond."""

    def run(self, layer: LayerAttention, query: torch.Tensor, slots: KV) -> torch.Tensor:
        return super().run(LayerAttention(layer.scale), query, slots)


class _StaleKeys(SDPA):
    """A backend that is wrong only where a prompt is cut into chunks."""

    def run(self, layer: LayerAttention, query: torch.Tensor, slots: KV) -> torch.Tensor:
        out = super().run(layer, query, slots)
        return out if self._segments[0].start == 0 else out * 1.05


@pytest.mark.parametrize("backend", [_WrongWindow, _StaleKeys])
def test_the_canary_catches_wrong_attention(backend: type[SDPA]) -> None:
    loaded = model.prepare(build("mistral-window"))
    with rig(loaded) as r:
        r.executor.backend = backend()
        with pytest.raises(ModelError, match=r"MistralForCausalLM is refused: .* differ"):
            gates.verify(loaded, r.executor, r.arena, 64)


def test_a_verdict_is_remembered_for_the_same_model_only(tmp_path: Path) -> None:
    loaded = model.prepare(build("llama"))
    asked = []

    def check() -> float:
        asked.append(1)
        return 1e-6

    assert verdicts.verify_once(loaded, "abc", tmp_path, "sdpa", check) == 1e-6
    assert verdicts.verify_once(loaded, "abc", tmp_path, "sdpa", check) is None
    assert verdicts.verify_once(loaded, "abd", tmp_path, "sdpa", check) == 1e-6
    assert verdicts.verify_once(loaded, "abc", tmp_path, "other", check) == 1e-6
    assert len(asked) == 3
    found = [json.loads(p.read_text()) for p in tmp_path.iterdir()]
    assert {v["architecture"] for v in found} == {"LlamaForCausalLM"}


def test_a_refusal_is_not_remembered(tmp_path: Path) -> None:
    loaded = model.prepare(build("llama"))

    def refuse() -> float:
        raise ModelError("no")

    for _ in range(2):
        with pytest.raises(ModelError):
            verdicts.verify_once(loaded, "abc", tmp_path, "sdpa", refuse)
    assert list(tmp_path.iterdir()) == []


def test_longrope_limits_the_context_and_says_so() -> None:
    config = tf.Phi3Config(
        **SIZES,
        intermediate_size=32,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
    )
    loaded = model.prepare(tf.Phi3ForCausalLM(config).eval())
    assert loaded.max_model_len == 64
    assert "64 of 256" in loaded.notes[0]


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ModelError, match="--max-model-len 300 is more than the 256 tokens"):
        model.prepare(build("llama"), max_model_len=300)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_take_as_many_bytes_before_there_are_any(tied: bool) -> None:
    config = tf.LlamaConfig(**SIZES, intermediate_size=48, tie_word_embeddings=tied)
    real = tf.LlamaForCausalLM(config)
    with torch.device("meta"):
        empty = tf.LlamaForCausalLM(config)
    assert model.prepare(empty).weights_bytes == model.prepare(real).weights_bytes


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            lambda: torch.empty(1 << 60, dtype=torch.uint8),
            "there is no memory left for activations",
        ),
        (lambda: _raise(torch.OutOfMemoryError("CUDA out of memory")), "CUDA out of memory"),
        (
            lambda: _raise(torch.AcceleratorError("an illegal access\nmore")),
            "the device failed: an",
        ),
    ],
)
def test_a_device_that_fails_is_said_to_be_one(error: Any, says: str) -> None:
    with pytest.raises(EngineError, match=says) as raised, device_errors():
        error()
    assert "batchrun resume" in str(raised.value.hint)
    with pytest.raises(RuntimeError, match="a defect"), device_errors():
        _raise(RuntimeError("a defect"))


@pytest.mark.parametrize(
    ("less", "says"),
    [
        ("--max-num-seqs N", "then: batchrun resume, with a lower --max-num-seqs N if needed"),
        (None, "then: batchrun resume; or use a smaller model"),
    ],
)
def test_what_to_type_where_there_is_no_memory(less: str | None, says: str) -> None:
    with pytest.raises(EngineError) as raised, device_errors("the weights", less):
        _raise(torch.OutOfMemoryError("CUDA out of memory"))
    assert raised.value.hint == f"free memory that other programs use, {says}"


def _raise(error: Exception) -> None:
    raise error
