"""A tiny real model on disk: random Llama weights, a byte-level tokenizer, a chat template."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTEXT = 256


def write_tiny_model(folder: Path, *, layers: int = 2, seed: int = 7, **sizes: int) -> Path:
    """Saves the model in `folder`; the same arguments give the same bytes of weights.

    `sizes` are fields of its config.
    """
    import torch  # noqa: PLC0415 - not for tests that need no model
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(seed)
    config = {
        "vocab_size": len(byte_vocabulary()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **sizes,
    }
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def byte_vocabulary() -> list[str]:
    """The special tokens, then one token for each byte, spelled as byte-level BPE spells it."""
    from tokenizers.pre_tokenizers import ByteLevel  # noqa: PLC0415

    return [*SPECIAL, *sorted(ByteLevel.alphabet())]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    vocabulary = {token: index for index, token in enumerate(byte_vocabulary())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)


def write_tiny_gguf(
    path: Path,
    *,
    pre: str = "smollm",
    layers: int = 1,
    without: Collection[str] = (),
    parts: int = 1,
) -> Path:
    """A GGUF file of the same shape, its matrices quantised to Q8_0.

    Args:
        path: The file.
        pre: Its rule to split text.
        layers: How many it has.
        without: Names of tensors that it lacks.
        parts: Of how many parts it says to be the first.
    """
    import gguf  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    hidden, inner, heads, kv_heads = 32, 64, 4, 2
    vocabulary = [*byte_vocabulary(), "ab", "abc"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary) - len(SPECIAL)))
    writer.add_token_merges(["a b", "ab c"])  # older transformers misread a list of one
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    if parts > 1:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", parts)
    draw = np.random.default_rng(7)

    def add(name: str, *shape: int) -> None:
        if name in without:
            return
        values = draw.normal(0, 0.2, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) > 1 else None
        data = gguf.quants.quantize(values, kind) if kind is not None else values
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", len(vocabulary), hidden)
    add("output_norm.weight", hidden)
    for layer in range(layers):
        block = f"blk.{layer}"
        for name in ("attn_norm", "ffn_norm"):
            add(f"{block}.{name}.weight", hidden)
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", hidden * kv_heads // heads, hidden),
            ("attn_v", hidden * kv_heads // heads, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            add(f"{block}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def edit_config(folder: Path, **changes: object) -> None:
    """Changes keys of the config; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Saves what `change` makes of the tensors in their place."""
    from safetensors.torch import load, save_file  # noqa: PLC0415

    file = folder / "model.safetensors"
    save_file(change(load(file.read_bytes())), file, metadata={"format": "pt"})


def shard_weights(folder: Path) -> list[Path]:
    """Splits the weights into several files with an index, as large models come."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))


def quantise_to_fp8(folder: Path) -> None:
    """Makes FP8 of the linear layers, in blocks with a scale each, as DeepSeek's models come."""
    import torch  # noqa: PLC0415

    block = 16

    def quantise(weights: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, weight in weights.items():
            if "_proj" not in name:
                found[name] = weight
                continue
            blocks = weight.unflatten(1, (-1, block)).unflatten(0, (-1, block))
            scales = blocks.abs().amax((1, 3)) / 448
            small = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            found |= {name: small.reshape(weight.shape), name + "_scale_inv": scales}
        return found

    edit_weights(folder, quantise)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    edit_config(folder, quantization_config={**settings, "weight_block_size": [block, block]})
