"""Tiny random models of every causal-LM type that the installed transformers has."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
# Those that see images too, of which only the text half is used.
WITH_IMAGES = tuple(sorted({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} - {*TYPES}))
_VOCAB = 199
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
# What an entry of a config becomes, by its name, wherever it stands.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"), _VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "inner_dim"), 96
    ),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 96),
    **dict.fromkeys(_LAYERS, 4),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4
    ),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    **dict.fromkeys(("sliding_window", "window_size", "sliding_window_size"), 23),
    "attention_chunk_size": 32,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
# What else a type takes to be built small.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "llama4": {"text_config": {"floor_scale": 16}},
    "llama4_text": {"floor_scale": 16},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"per_layer_config": {}},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoehybrid": {
        "layer_types": ["full_attention"] * 4,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
    },
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "cosmos3_edge": {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}},
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "mistral4": {"rope_parameters": {"partial_rotary_factor": 1.0}},
    "granite4_vision": {"deepstack_layer_map": []},
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
    **{
        kind: {"text_config": {"rope_parameters": {"mrope_section": [2, 3, 3]}}}
        for kind in (
            *("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl"),
            *("qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"),
        )
    },
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"d_head": 16},
    "zaya": {"num_experts_per_tok": 1},
}
_WINDOWS = {"sliding_window": 23, "use_sliding_window": True}
_DROPPED = {"layer_types", "mlp_layer_types", "quantization_config"}  # derived from the sizes anew


def config_of(kind: str, *, window: bool = False) -> tf.PretrainedConfig:
    """The default config of a model type, everything in it made small.

    Args:
        kind: The type.
        window: Whether windows are on that are off by default.

    Raises:
        ValueError: A window is wanted where there is none to turn on.
    """
    given = CONFIG_MAPPING[kind]().to_dict()
    config = _merged(_shrunk(given), _SPECIAL.get(kind, {}))
    if window:
        off = [key for key in _WINDOWS if key in given and not given[key]]
        if not off:
            raise ValueError(f"{kind} has no window that is off")
        config.update({key: _WINDOWS[key] for key in off}, max_window_layers=4)
    return CONFIG_MAPPING[kind].from_dict(config)


def _shrunk(given: dict[str, Any]) -> dict[str, Any]:
    layers = next((n for key in _LAYERS if isinstance(n := given.get(key), int)), 0)
    made = {}
    for key, value in given.items():
        if key in _DROPPED or (isinstance(value, dict) and any(str(k).isdigit() for k in value)):
            continue  # is derived from the sizes anew
        if isinstance(value, dict):
            made[key] = _shrunk(value)
        elif isinstance(value, list) and layers and len(value) == layers:
            made[key] = [*value[:3], value[-1]]
        elif key in _SMALL and value is not None:
            made[key] = _SMALL[key]
        else:
            made[key] = value
    if given.get("kv_lora_rank"):  # one latent for all heads
        made["num_key_value_heads"] = made["num_attention_heads"]
        if "head_dim" in made:  # its rotary part
            made["head_dim"] = made["qk_rope_head_dim"]
    return made


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    made = {**below, **above}
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            made[key] = _merged(below[key], value)
    return made


def build(kind: str, *, window: bool = False) -> tf.PreTrainedModel:
    """A model of that type with seeded float32 weights, wide enough to make choices differ."""
    torch.manual_seed(7)
    config = config_of(kind, window=window)
    auto: Any = tf.AutoModelForImageTextToText if kind in WITH_IMAGES else tf.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model
