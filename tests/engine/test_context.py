"""How many tokens a context holds, by the configs that models come with."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

from batchrun.engine.model import prepare as model
from batchrun.engine.model.context import context_length
from batchrun.errors import ModelError

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
QWEN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEEPSEEK = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
OSS = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
OLMO = {
    "full_attention": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 5e5,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
}

CONTEXTS: dict[str, tuple[Any, int]] = {
    "plain": (tf.LlamaConfig(**SIZES, max_position_embeddings=4096), 4096),
    # what a model's card says to add to its config, with the old name of the key and the new one
    "yarn": (
        tf.Qwen2Config(**SIZES, max_position_embeddings=32768, rope_parameters=dict(QWEN)),
        131072,
    ),
    "yarn-qwen3": (
        tf.Qwen3Config(**SIZES, max_position_embeddings=40960, rope_scaling=dict(QWEN)),
        131072,
    ),
    "yarn-old-key": (
        tf.Qwen2Config.from_dict(
            {
                **SIZES,
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            }
        ),
        131072,
    ),
    # positions that are the product already
    "yarn-scaled": (
        tf.Qwen2Config(**SIZES, max_position_embeddings=131072, rope_parameters=dict(QWEN)),
        131072,
    ),
    "llama3": (
        tf.LlamaConfig(**SIZES, max_position_embeddings=131072, rope_parameters=dict(LLAMA)),
        131072,
    ),
    "deepseek": (
        tf.DeepseekV3Config(max_position_embeddings=163840, rope_parameters=dict(DEEPSEEK)),
        163840,
    ),
    "gpt-oss": (tf.GptOssConfig(max_position_embeddings=131072, rope_parameters=OSS), 131072),
    "gemma3": (tf.Gemma3TextConfig(), 131072),
    "olmo3": (
        tf.Olmo3Config(
            max_position_embeddings=65536,
            layer_types=["sliding_attention", "full_attention"],
            num_hidden_layers=2,
            rope_parameters=OLMO,
        ),
        65536,
    ),
    "linear": (
        tf.LlamaConfig(
            **SIZES,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "linear", "factor": 4.0},
        ),
        16384,
    ),
    "gpt2": (tf.GPT2Config(n_positions=77), 77),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_is_what_positions_and_rope_make_of_it(name: str) -> None:
    config, wanted = CONTEXTS[name]
    assert context_length(config, None) == (wanted, ())
    assert context_length(config, wanted) == (wanted, ())
    said = f"--max-model-len {wanted + 1} is more than the {wanted} tokens"
    with pytest.raises(ModelError, match=re.escape(said)) as caught:
        context_length(config, wanted + 1)
    assert f"--max-model-len {wanted} or less" in str(caught.value.hint)


def test_gemma3_is_scaled_in_some_layers() -> None:  # or the case above proves nothing
    config = tf.Gemma3TextConfig(
        rope_parameters=None, rope_scaling={"rope_type": "linear", "factor": 8.0}
    )
    kinds = {rope["rope_type"] for rope in config.rope_parameters.values()}
    assert kinds == {"default", "linear"}
    assert context_length(config, None)[0] == 131072


def dynamic() -> tf.LlamaConfig:
    rope = {"rope_type": "dynamic", "factor": 4.0}
    return tf.LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=rope)


def test_dynamic_rope_ends_where_a_long_row_would_change_the_others() -> None:
    limit, notes = context_length(dynamic(), None)
    assert limit == 64
    assert "64 of 256 tokens: beyond that, dynamic RoPE" in notes[0]
    with pytest.raises(ModelError, match=r"than the 64 tokens .*\(context limited to 64 of 256"):
        context_length(dynamic(), 100)


def test_within_that_length_no_row_changes_another() -> None:
    llama = tf.LlamaForCausalLM(dynamic()).eval()
    before = llama.model.rotary_emb.inv_freq.clone()
    with torch.inference_mode():
        llama(torch.zeros(1, 64, dtype=torch.int64))
        assert torch.equal(llama.model.rotary_emb.inv_freq, before)
        llama(torch.zeros(1, 65, dtype=torch.int64))
    assert not torch.equal(llama.model.rotary_emb.inv_freq, before)


def test_a_config_that_names_no_context() -> None:
    config = SimpleNamespace(hidden_size=64)  # as of code that comes with a model
    limit, notes = context_length(config, None)
    assert (limit, "--max-model-len" in notes[0]) == (8192, True)
    assert context_length(config, 100_000) == (100_000, ())


def test_a_models_context_is_as_long_as_its_card_says() -> None:
    config = tf.Qwen2Config(**SIZES, max_position_embeddings=32768, rope_parameters=dict(QWEN))
    assert model.prepare(tf.Qwen2ForCausalLM(config).eval()).max_model_len == 131072
