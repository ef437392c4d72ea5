"""Test sequences and made-up forwards: what the gates compare."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequences
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from batchrun.engine.attention import KV, QKV, LayerAttention
from batchrun.engine.core import Request, SamplingParams, Segment, Sequence
from batchrun.engine.kvspace import KVSpace
from batchrun.engine.model.hook import Step, is_told_beside
from batchrun.engine.model.prepare import LoadedModel
from batchrun.errors import ModelError

_LEAST = 48  # tokens
COMPARED = 4  # the last chunk's end, and the decodes behind it

# --- through slots ---


def prompt_tokens(loaded: LoadedModel) -> int:
    """Tokens of the longer test prompt: beyond a window, where there is one."""
    return min(loaded.max_model_len, max(loaded.max_window + 19, _LEAST))


def budget_too_small(tokens: int, refusal: str = "") -> ModelError:
    """The error for KV memory that does not hold a test prompt of so many tokens.

    Args:
        tokens: How many.
        refusal: Why the machine has no memory, if it is not the budget.
    """
    if refusal:
        return ModelError(f"there is no memory for a test prompt of {tokens} tokens: {refusal}")
    return ModelError(
        f"the KV budget can't hold a test prompt of {tokens} tokens", hint="raise --kv-budget"
    )


def sequences_of(loaded: LoadedModel) -> list[Sequence]:
    """Two of different lengths, the first one as long as `prompt_tokens`."""
    longest = prompt_tokens(loaded)
    vocab = int(loaded.model.config.get_text_config().vocab_size)
    rng = random.Random(0)
    return [
        Sequence(Request(i, 0, tuple(rng.randrange(vocab) for _ in range(n)), SamplingParams(), 0))
        for i, n in enumerate([longest, max(2, longest * 2 // 3)])
    ]


def through_slots(
    sequences: list[Sequence],
    compute: Callable[[Sequences[Segment]], torch.Tensor],
    chunk: int,
    space: KVSpace | None = None,
) -> list[tuple[Sequence, torch.Tensor]]:
    """Compute sequences interleaved, in chunks, and their last three tokens one by one.

    Args:
        sequences: What to compute.
        compute: As `TorchExecutor.logits`.
        chunk: Tokens of a chunk.
        space: Where slots and memory come from; None where slot i is the i-th sequence's own.

    Returns:
        Each sequence that there was a slot for, and the logits `[n, V]` after its last tokens.
    """
    for i, sequence in enumerate(sequences):
        sequence.slot = i if space is None else space.open(sequence.num_tokens)
    # With a single slot there is no second sequence to mix in.
    sequences = [s for s in sequences if s.slot is not None]  # each at the number of its row
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(s.num_computed_tokens < s.num_tokens for s in sequences):
        segments = []
        for sequence in sequences:
            start = sequence.num_computed_tokens
            length = min(max(1, sequence.num_tokens - 3 - start), chunk)
            if start < sequence.num_tokens and sequence.slot is not None:
                if space is not None and not space.ensure(sequence.slot, start + length):
                    raise budget_too_small(sequence.num_tokens, space.refusal)
                ids = sequence.token_ids(start, length)
                segments.append(
                    Segment(sequence.slot, start, length, True, ids, key=sequence.request.row)
                )
        for segment, row in zip(segments, compute(segments), strict=True):
            sequences[segment.key].num_computed_tokens += segment.length
            logits[segment.key].append(row)
    if space is not None:
        for sequence in sequences:
            if sequence.slot is not None:
                space.close(sequence.slot, 0)
        space.retire(0)
    return [(s, torch.stack(r[-COMPARED:])) for s, r in zip(sequences, logits, strict=True)]


def plain_views(loaded: LoadedModel, sequences: Sequences[Sequence]) -> list[KV]:
    """Each layer's keys and values for the slots of sequences, in ordinary float32 memory."""
    slots = len(sequences), max(s.num_tokens for s in sequences)

    def zeros(heads: int, dim: int) -> torch.Tensor:
        return torch.zeros(*slots, heads, dim, dtype=torch.float32, device=loaded.device)

    return [(zeros(s.kv_heads, s.k_dim), zeros(s.kv_heads, s.v_dim)) for s in loaded.layers]


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Each module computes in float32; no more than one has its weights twice at a time."""
    halves: dict[nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                halves[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in halves:
                parameter.data = halves.pop(parameter)

    hooks = [m.register_forward_pre_hook(widen) for m in model.modules()]
    hooks += [m.register_forward_hook(restore) for m in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, half in halves.items():  # of a forward that failed
            parameter.data = half


# --- forwards without a cache ---

FEW_TOKENS = 17
LayerCall = tuple[torch.Tensor, dict[str, Any], torch.Tensor]  # input, keywords, output


class _Causal:
    """A step of one sequence, whose attention need only be the same each time."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerAttention] = {}

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        self.layers[layer_index] = layer
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in new)
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=layer.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)


@torch.inference_mode()
def logits_of(
    model: PreTrainedModel, tokens: int = FEW_TOKENS, step: Step | None = None
) -> torch.Tensor:
    """Logits after a made-up sequence of so many tokens, float32 `[V]`."""
    vocab = model.config.get_text_config().vocab_size
    positions = torch.arange(tokens, device=model.device)[None]
    output = model(
        input_ids=(positions + 3) * 7919 % vocab,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=torch.tensor([tokens - 1], device=model.device),
        batchrun_step=step or _Causal(),
    )
    logits: torch.Tensor = output.logits[0, 0].float()
    return logits


def decoder_layers(model: PreTrainedModel) -> tuple[nn.ModuleList, dict[int, LayerAttention]]:
    """The model's list of layers, and what each asks of attention.

    Raises:
        ValueError: It has no such list, or several.
    """
    step = _Causal()
    logits_of(model, step=step)
    wanted = [{i} for i in range(len(step.layers))]
    stacks = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and [_layer_numbers(layer) for layer in m] == wanted
    ]
    if len(stacks) != 1:
        raise ValueError(f"{len(stacks)} lists of decoder layers found")
    return stacks[0], step.layers


def _layer_numbers(layer: nn.Module) -> set[int]:
    found = (getattr(module, "layer_idx", None) for module in layer.modules())
    return {number for number in found if isinstance(number, int)}


def layer_calls(model: PreTrainedModel) -> list[LayerCall]:
    """How a forward calls each decoder layer; nothing where a call does not say all it takes."""
    if is_told_beside(model):
        return []
    try:
        layers, _ = decoder_layers(model)
    except ValueError:
        return []
    calls: list[LayerCall] = []
    handles = [
        layer.register_forward_hook(
            lambda _, args, kwargs, out: calls.append((args[0], kwargs, out)), with_kwargs=True
        )
        for layer in layers
    ]
    logits_of(model)
    for handle in handles:
        handle.remove()
    return calls if all(isinstance(out, torch.Tensor) for _, _, out in calls) else []
