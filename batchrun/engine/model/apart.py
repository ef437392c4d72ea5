"""Attention judged apart from everything else, where logits say little.

In a mixture of experts a router's choice between two that are nearly alike is decided by rounding,
and what follows is another computation. So two questions are asked instead: is the hooked model the
model itself in float32, where routers agree; and does each layer's attention over slots give what
float32 gives of the very same queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batchrun.engine.attention import LayerAttention
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.core import Segment
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.model.hook import Step
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.model.trial import KVSlots, difference, in_float32, sequences_of, through_slots
from batchrun.engine.transfers import HostTransfers


class _PlainSlots:
    """Slots of ordinary float32 memory for a trial's sequences."""

    refusal = ""

    def __init__(self, loaded: LoadedModel, num_slots: int, num_tokens: int) -> None:
        def zeros(heads: int, dim: int) -> torch.Tensor:
            shape = num_slots, num_tokens, heads, dim
            return torch.zeros(shape, dtype=torch.float32, device=loaded.device)

        self.views = [
            (zeros(layer.kv_heads, layer.k_dim), zeros(layer.kv_heads, layer.v_dim))
            for layer in loaded.layers
        ]
        self._free = list(range(num_slots))

    def open(self, num_tokens: int = 0) -> int | None:
        return self._free.pop(0) if self._free else None

    def ensure(self, slot: int, num_tokens: int) -> bool:
        return True

    def close(self, slot: int, step: int) -> None:
        self._free.append(slot)

    def retire(self, step: int) -> None:
        pass


def hooked_in_float32(loaded: LoadedModel, want: tuple[torch.Tensor, ...]) -> float:
    """How far the hooked model is from its own logits where both compute in float32.

    Args:
        loaded: The model, in half precision.
        want: Its own float32 logits for the test sequences, as of `Reference`.

    Returns:
        The largest difference, as a share of the largest logit.
    """
    sequences = sequences_of(loaded)
    longest = sequences[0].num_tokens
    slots = _PlainSlots(loaded, len(sequences), longest)
    executor = TorchExecutor(loaded, slots.views, [], SDPA(), HostTransfers(loaded.device))
    with torch.inference_mode(), in_float32(loaded.model):
        found = through_slots(sequences, executor, slots, max(1, longest // 3))
    return max(difference(got, want[s.request.row][-len(got) :]) for s, got in found)


def attention_alone(
    loaded: LoadedModel, executor: TorchExecutor, space: KVSlots, chunk: int
) -> float:
    """How far attention over slots is from float32's of the same queries, keys and values.

    Args:
        loaded: The model.
        executor: The executor to judge; steps that it has recorded are launched anew meanwhile.
        space: An idle KV space; idle again afterwards.
        chunk: Tokens computed in a step at most.

    Returns:
        The largest difference of a layer's output, as a share of its largest number.
    """
    sequences = sequences_of(loaded)
    slots = _PlainSlots(loaded, len(sequences), sequences[0].num_tokens)
    judge = _Judge(executor, slots)
    as_it_was = executor.graphs, executor.pieces, executor.wrap
    executor.graphs, executor.pieces, executor.wrap = None, None, judge.watch
    try:
        with torch.inference_mode():
            through_slots(sequences, judge, space, chunk)
    finally:
        executor.graphs, executor.pieces, executor.wrap = as_it_was
    return judge.worst


class _Judge:
    """An executor's attention, computed in float32 too, and compared."""

    def __init__(self, executor: TorchExecutor, slots: _PlainSlots) -> None:
        self.worst = 0.0
        self._executor = executor
        self._views = slots.views
        self._backend = SDPA()
        self._segments: list[Segment] = []
        self._step: Step | None = None

    def logits(self, segments: Sequence[Segment]) -> torch.Tensor:
        """As the executor's."""
        rows = [s.sequence.request.row for s in segments]  # which are the slots here
        self._segments = [
            Segment(s.sequence, row, s.start, s.length, s.sampled)
            for s, row in zip(segments, rows, strict=True)
        ]
        return self._executor.logits(segments)

    def watch(self, step: Step) -> Step:
        """Stand between the model and a step."""
        self._step = step
        return self

    def attend(
        self,
        layer_index: int,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """See `Step.attend`."""
        assert self._step is not None
        out = self._step.attend(layer_index, layer, query, key, value)
        keys, values = self._views[layer_index]
        at = 0
        for s in self._segments:
            written, at = slice(at, at + s.length), at + s.length
            keys[s.slot, s.start : s.start + s.length] = key[written].float()
            values[s.slot, s.start : s.start + s.length] = value[written].float()
        self._backend.plan(self._segments)
        want = self._backend.run(layer, query.float(), keys, values)
        self.worst = max(self.worst, difference(out, want))
        return out
