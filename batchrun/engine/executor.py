"""Runs a step plan on a device: tokens in, keys and values into the slots, next tokens out."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from batchrun.engine.attention import AttentionBackend, LayerAttention
from batchrun.engine.core import Segment, Sequence, StepPlan, StepTokens
from batchrun.engine.model import LoadedModel
from batchrun.engine.sampling import sample


@dataclass(frozen=True, slots=True)
class Ticket:
    """A launched step, to be collected."""

    step: int
    tokens: torch.Tensor


class Executor(Protocol):
    """Computes steps. A step may be launched before the one before it is collected."""

    def launch(self, plan: StepPlan) -> Ticket:
        """Start a step whose memory is in place."""

    def collect(self, ticket: Ticket) -> StepTokens:
        """Wait for a step; its tokens are valid from then on."""


class TorchExecutor:
    """The model's own forward over packed tokens `[1, T]`.

    Args:
        loaded: The model.
        views: Each layer's keys and values, `[num_slots, slot_tokens, kv_heads, dim]`.
        backend: The attention kernels.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        views: Seq[tuple[torch.Tensor, torch.Tensor]],
        backend: AttentionBackend,
    ) -> None:
        self.loaded = loaded
        self.backend = backend
        self._views = views

    def launch(self, plan: StepPlan) -> Ticket:
        """See `Executor.launch`."""
        sequences = [s.sequence for s in plan.segments if s.sampled]
        with torch.inference_mode():
            logits = self.logits(plan.segments)
            if sequences:
                stops = [self.stop_ids(sequence) for sequence in sequences]
                tokens = sample(logits.float(), sequences, stops)
            else:
                tokens = torch.empty(0, dtype=torch.int64)
        return Ticket(plan.step, tokens)

    def collect(self, ticket: Ticket) -> StepTokens:
        """See `Executor.collect`."""
        return StepTokens(ticket.step, tuple(ticket.tokens.tolist()))

    def stop_ids(self, sequence: Sequence) -> frozenset[int]:
        """Tokens that end the sequence."""
        params = sequence.request.params
        own = frozenset(params.stop_token_ids)
        return own if params.ignore_eos else own | self.loaded.eos_ids

    def logits(self, segments: Seq[Segment]) -> torch.Tensor:
        """Compute the segments; returns the logits that follow the sampled ones, `[N, V]`."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last: list[int] = []
        for segment in segments:
            ids += segment.sequence.token_ids(segment.start, segment.length)
            positions += range(segment.start, segment.start + segment.length)
            slots += [segment.slot] * segment.length
            if segment.sampled:
                last.append(len(ids) - 1)
        packed = torch.tensor([ids, positions, slots], device=self.loaded.device)
        self.backend.plan(segments)
        step = _SlotStep(self._views, packed[2], packed[1], self.backend)
        output = self.loaded.model(
            input_ids=packed[0:1],
            position_ids=packed[1:2],
            use_cache=False,
            logits_to_keep=torch.tensor(last, dtype=torch.int64, device=self.loaded.device),
            batchrun_step=step,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


@dataclass(frozen=True, slots=True)
class _SlotStep:
    """Attention of one step: write the new keys and values in place, then attend."""

    views: Seq[tuple[torch.Tensor, torch.Tensor]]
    slots: torch.Tensor
    positions: torch.Tensor
    backend: AttentionBackend

    def attend(
        self,
        layer_index: int,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        keys, values = self.views[layer_index]
        keys[self.slots, self.positions] = key
        values[self.slots, self.positions] = value
        return self.backend.run(layer, query, keys, values)
