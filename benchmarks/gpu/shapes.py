"""The models that are measured: real shapes, seeded random weights, nothing to download."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder-only transformer that decide its speed."""

    name: str
    family: str  # of transformers' config classes
    hidden: int
    intermediate: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    rope_theta: float
    context: int
    dtype_bytes: int = 2

    @property
    def linear_params(self) -> int:
        """Elements of all layers' weight matrices: attention projections and gated MLP."""
        heads = 2 * self.q_heads + 2 * self.kv_heads
        return self.layers * self.hidden * (heads * self.head_dim + 3 * self.intermediate)

    @property
    def head_params(self) -> int:
        """Elements of the matrix that makes logits."""
        return self.hidden * self.vocab

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3-8b", "llama", 4096, 14336, 32, 32, 8, 128, 128256, False, 5e5, 8192),
        Shape("qwen3-0.6b", "qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True, 1e6, 40960),
        Shape("qwen3-14b", "qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False, 1e6, 40960),
        Shape("toy", "llama", 64, 128, 4, 4, 2, 16, 512, False, 1e4, 512, dtype_bytes=4),
    )
}


def build(shape: Shape, device: str, *, seed: int = 0) -> PreTrainedModel:
    """The model, its weights drawn on the device itself; no byte of them crosses from the host."""
    import torch  # noqa: PLC0415 - the shapes alone are wanted without torch
    import transformers  # noqa: PLC0415

    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config(shape), dtype=dtype_of(shape))
    return model.eval()


def config(shape: Shape) -> PretrainedConfig:
    """The model's numbers as transformers has them."""
    import transformers  # noqa: PLC0415

    kind = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[shape.family]
    return kind(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def dtype_of(shape: Shape) -> torch.dtype:
    """bfloat16, or float32 for the toy."""
    import torch  # noqa: PLC0415

    return torch.bfloat16 if shape.dtype_bytes == 2 else torch.float32


@dataclass(frozen=True)
class Load:
    """Requests of uniformly drawn lengths, the same ones for the same numbers.

    The default is nano-vllm's benchmark (github.com/GeeekExplorer/nano-vllm, bench.py): 256
    requests, 100 to 1024 tokens in, 100 to 1024 tokens out.
    """

    requests: int = 256
    shortest: int = 100
    longest: int = 1024
    seed: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens in and out of each request."""
        rng = random.Random(self.seed)
        draw = [rng.randint(self.shortest, self.longest) for _ in range(2 * self.requests)]
        return list(zip(draw[::2], draw[1::2], strict=True))


TOY_LOAD = Load(requests=8, shortest=4, longest=24)


def chats(count: int = 1000, *, longest: int = 1024, seed: int = 0) -> list[tuple[int, int]]:
    """Tokens in and out of requests as long as ShareGPT's: few long ones among many short.

    Log-normal, cut at 4 and at `longest`. The means of 222 in and 189 out are those of the 1,000
    rows that vLLM's benchmark takes of it (224 and 188, by its pull request 14036).
    """
    rng = random.Random(seed)

    def draw(mean: float, deviation: float) -> int:
        while not 4 <= (length := round(rng.lognormvariate(mean, deviation))) <= longest:
            pass
        return length

    return [(draw(5.0, 1.3), draw(4.9, 1.0)) for _ in range(count)]


def prompt(length: int, vocab: int, seed: int) -> tuple[int, ...]:
    """Random token ids, none of them special."""
    rng = random.Random(seed)
    return tuple(rng.randrange(3, vocab) for _ in range(length))
