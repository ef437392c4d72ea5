"""Test sequences, and their way through slots: what the third gate compares."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from batchrun.engine.core import Request, SamplingParams, Segment, Sequence
from batchrun.engine.model.prepare import LoadedModel
from batchrun.errors import ModelError

_LEAST = 48  # tokens
COMPARED = 4  # the last chunk's end, and the decodes behind it


class Computes(Protocol):
    """What a trial needs of an executor: see `TorchExecutor`."""

    def logits(self, segments: Sequences[Segment]) -> torch.Tensor: ...  # noqa: D102


class KVSlots(Protocol):
    """What a trial needs of KV memory: see `KVSpace`."""

    def open(self, num_tokens: int = 0) -> int | None: ...  # noqa: D102
    def ensure(self, slot: int, num_tokens: int) -> bool: ...  # noqa: D102
    def close(self, slot: int, step: int) -> None: ...  # noqa: D102
    def retire(self, step: int) -> None: ...  # noqa: D102
    @property
    def refusal(self) -> str: ...  # noqa: D102


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
    sequences: list[Sequence], executor: Computes, space: KVSlots, chunk: int
) -> list[tuple[Sequence, torch.Tensor]]:
    """Each sequence, and the logits `[n, V]` after its last tokens."""
    for sequence in sequences:
        sequence.slot = space.open(sequence.num_tokens)
    # With a single slot there is no second sequence to mix in.
    sequences = [s for s in sequences if s.slot is not None]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(s.num_computed_tokens < s.num_tokens for s in sequences):
        segments = []
        for sequence in sequences:
            start = sequence.num_computed_tokens
            # The last three tokens one by one, as decodes.
            length = min(max(1, sequence.num_tokens - 3 - start), chunk)
            if start < sequence.num_tokens and sequence.slot is not None:
                if not space.ensure(sequence.slot, start + length):
                    raise budget_too_small(sequence.num_tokens, space.refusal)
                segments.append(Segment(sequence, sequence.slot, start, length, sampled=True))
        rows = executor.logits(segments)
        for segment, row in zip(segments, rows, strict=True):
            segment.sequence.num_computed_tokens += segment.length
            logits[segment.sequence.request.row].append(row)
    for sequence in sequences:
        if sequence.slot is not None:
            space.close(sequence.slot, 0)
    space.retire(0)
    return [(s, torch.stack(r[-COMPARED:])) for s, r in zip(sequences, logits, strict=False)]


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


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number wanted; infinite if it is none."""
    off = float((got.float() - want).abs().max() / want.abs().max().clamp_min(1e-6))
    return off if math.isfinite(off) else math.inf
