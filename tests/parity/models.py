"""Tiny models with random weights, one for each way that architectures differ in attention."""

from __future__ import annotations

import copy

import torch
import transformers as tf

_SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HALF = ["sliding_attention", "full_attention", "sliding_attention"]
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

_OLD = {
    "vocab_size": 199,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, tf.PretrainedConfig] = {
    "llama": tf.LlamaConfig(**_SMALL),
    "llama-mha": tf.LlamaConfig(**{**_SMALL, "num_key_value_heads": 4}),
    "qwen2": tf.Qwen2Config(**_SMALL),
    "qwen3": tf.Qwen3Config(**_SMALL, head_dim=32),
    "mistral-window": tf.MistralConfig(**_SMALL, sliding_window=11),
    "gemma": tf.GemmaConfig(**_SMALL, head_dim=32),
    "gemma2-softcap": tf.Gemma2Config(**_SMALL, head_dim=16, sliding_window=9, layer_types=_HALF),
    "gemma3": tf.Gemma3TextConfig(**_SMALL, head_dim=16, sliding_window=9, layer_types=_HALF),
    "phi3": tf.Phi3Config(**_SMALL),
    "gpt-neox": tf.GPTNeoXConfig(**_SMALL),
    "olmo2": tf.Olmo2Config(**_SMALL),
    "smollm3": tf.SmolLM3Config(**_SMALL),
    "mixtral-moe": tf.MixtralConfig(**_SMALL, num_local_experts=4),
    "qwen3-moe": tf.Qwen3MoeConfig(**_SMALL, **_MOE, head_dim=16),
    "gpt-oss-sinks": tf.GptOssConfig(
        **_SMALL, head_dim=16, sliding_window=9, layer_types=_HALF, num_local_experts=4
    ),
    "llama4-chunks": tf.Llama4TextConfig(
        **_SMALL,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=4,
        attention_chunk_size=11,
        no_rope_layers=[1, 0, 1],
        floor_scale=8,
    ),
    # What only their masks say: no attention function is told of these windows.
    "qwen2-moe-window": tf.Qwen2MoeConfig(
        **_SMALL,
        **_MOE,
        shared_expert_intermediate_size=32,
        use_sliding_window=True,
        sliding_window=11,
        layer_types=_HALF,
    ),
    "phimoe-window": tf.PhimoeConfig(**_SMALL, num_local_experts=4, sliding_window=11),
    # Whose own code does not ask for another attention, or does not pass a step on.
    "falcon": tf.FalconConfig(**_SMALL),
    "falcon-grouped": tf.FalconConfig(**_SMALL, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-mha": tf.FalconConfig(**_SMALL, multi_query=False, parallel_attn=False, bias=True),
    "gptj": tf.GPTJConfig(**_OLD, rotary_dim=8),
    "codegen": tf.CodeGenConfig(**_OLD, rotary_dim=8),
    "gpt-neo-window": tf.GPTNeoConfig(
        vocab_size=199,
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=11,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "stablelm": tf.StableLmConfig(**_SMALL, qk_layernorm=True),
    "nemotron": tf.NemotronConfig(**_SMALL, head_dim=16),
    "granite": tf.GraniteConfig(**_SMALL),
    "starcoder2": tf.Starcoder2Config(**_SMALL, sliding_window=None),
    "deepseek-mla": tf.DeepseekV3Config(
        **{**_SMALL, "num_key_value_heads": 4},
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
    ),
}


def build(name: str) -> tf.PreTrainedModel:
    """The model of that name: see `seeded`."""
    model = seeded(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and "sink" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return model


def seeded(config: tf.PretrainedConfig) -> tf.PreTrainedModel:
    """A model with seeded float32 weights, wide enough to make choices differ."""
    torch.manual_seed(7)
    own = copy.deepcopy(config)  # a model notes its attention there
    model = tf.AutoModelForCausalLM.from_config(own, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model


def with_head_dim(name: str, dim: int) -> tf.PretrainedConfig:
    """The configuration of that name with heads of another width."""
    config = copy.deepcopy(CONFIGS[name])
    config.head_dim = dim
    return config
