"""Slots full of random keys and values, for timing attention without a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from batchrun.allocator.arena import KVArena
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.tensor import layer_views
from batchrun.engine import attention
from batchrun.engine.attention import AttentionBackend, Geometry, LayerAttention, LayerSpec
from batchrun.engine.core import Segment
from batchrun.engine.transfers import copied
from benchmarks.gpu.bench import Bench, Unavailable
from benchmarks.gpu.shapes import Shape, dtype_of
from benchmarks.gpu.vmm import open_memory


@dataclass(frozen=True)
class Slots:
    """Slots of equal length. `views` are each layer's K and V, `[slots, slot_tokens, Hkv, D]`."""

    bench: Bench
    shape: Shape
    layout: KVLayout
    tokens: int
    views: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def count(self) -> int:
        """Number of slots."""
        return int(self.views[0][0].shape[0])

    @property
    def layer(self) -> LayerAttention:
        """What a layer asks of attention."""
        return LayerAttention(self.shape.head_dim**-0.5)

    def segments(self, length: int) -> list[Segment]:
        """The last `length` tokens of each slot."""
        start = self.tokens - length
        return [Segment(slot, start, length, sampled=True) for slot in range(self.count)]

    def query(self, length: int) -> torch.Tensor:
        """Random queries for the last `length` tokens of each slot, `[count * length, Hq, D]`."""
        return torch.randn(
            self.count * length,
            self.shape.q_heads,
            self.shape.head_dim,
            dtype=dtype_of(self.shape),
            device=self.bench.device,
        )

    def backend(self, name: str, length: int) -> AttentionBackend:
        """The backend of that name, planned for the last `length` tokens of each slot.

        Raises:
            Unavailable: it can't be had here, or its kernels are not compiled.
        """
        shape, heads = self.shape, self.views[0][0].shape[2]
        spec = LayerSpec(shape.q_heads, heads, shape.head_dim, shape.head_dim, shape.head_dim**-0.5)
        geometry = Geometry(
            layers=(spec,) * len(self.views),
            slot_tokens=self.layout.slot_tokens,
            num_slots=self.count,
            max_num_seqs=self.count,
            max_num_batched_tokens=self.count * length,
            dtype=dtype_of(shape),
            device=torch.device(self.bench.device),
        )
        # Compiling would take the minutes that there are.
        reason = (
            None if name == "auto" else attention.unsupported_reason(name, geometry, compiled=True)
        )
        if reason is not None:
            raise Unavailable(reason)
        made = attention.create(name, geometry, partial(copied, device=self.bench.device), print)
        made.plan(self.segments(length))
        return made


@contextmanager
def filled(
    bench: Bench, shape: Shape, count: int, tokens: int, layers_per_slab: int
) -> Iterator[Slots]:
    """`count` slots that hold `tokens` random tokens each, in all layers of the shape."""
    with ExitStack() as resources:
        memory = open_memory(bench)
        resources.callback(memory.close)
        layer = LayerKV(shape.kv_heads, shape.head_dim, shape.head_dim)
        layout = KVLayout(
            (layer,) * shape.layers, shape.dtype_bytes, memory.granularity, tokens, layers_per_slab
        )
        arena = KVArena(memory, layout, num_slots=count)
        resources.callback(arena.release)
        resources.callback(bench.synchronise)
        for _ in range(count):
            slot = arena.open(tokens)
            if slot is None or not arena.ensure(slot, tokens):
                raise Unavailable(f"no memory for {count} slots of {tokens} tokens")
        views = [layer_views(arena, i, dtype_of(shape), bench.device) for i in range(shape.layers)]
        for view in (view for pair in views for view in pair):
            view[:, :tokens].normal_()
        yield Slots(bench, shape, layout, tokens, views)
