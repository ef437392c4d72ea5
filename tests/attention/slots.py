"""Real slots over the host's memory, and the kernels' documented meaning in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from batchrun.allocator.arena import KVArena
from batchrun.allocator.host import HostMemory
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.tensor import layer_views
from batchrun.engine.attention import Geometry, LayerAttention, LayerSpec
from batchrun.engine.attention.flashinfer import KernelKind
from batchrun.engine.core import Segment
from batchrun.engine.transfers import copied

DIM = 64
TOKENS = (300, 1, 64, 129, 17, 200)  # that slot 0, 1, ... has memory for


@dataclass(frozen=True)
class Slots:
    layers: tuple[LayerSpec, ...]
    views: list[tuple[torch.Tensor, torch.Tensor]] = field(repr=False)  # most is no memory
    geometry: Geometry

    def attention(self, index: int) -> LayerAttention:
        layer = self.layers[index]
        return LayerAttention(layer.scale, layer.window, layer.softcap)

    def query(self, segments: Sequence[Segment], index: int) -> torch.Tensor:
        """Random queries, strided as a model hands them over: heads before tokens."""
        tokens = sum(segment.length for segment in segments)
        made = torch.randn(self.layers[index].q_heads, tokens, DIM)
        return made.transpose(0, 1)


@contextmanager
def slots(layers: tuple[LayerSpec, ...], max_tokens: int = 300) -> Iterator[Slots]:
    """Slots with random keys and values as far as their tokens go; beyond is no memory."""
    memory = HostMemory(4096)
    kv = tuple(LayerKV(layer.kv_heads, layer.k_dim, layer.v_dim) for layer in layers)
    layout = KVLayout(kv, 4, 4096, max_tokens, len(layers))
    arena = KVArena(memory, layout, num_slots=len(TOKENS))
    try:
        views = [layer_views(arena, i, torch.float32) for i in range(len(layers))]
        generator = torch.Generator().manual_seed(0)
        for _ in TOKENS:
            slot = arena.open()
            assert slot is not None
            assert arena.ensure(slot, TOKENS[slot])
            for pair in views:
                for view in pair:
                    view[slot, : TOKENS[slot]].normal_(generator=generator)
        geometry = Geometry(
            layers,
            layout.slot_tokens,
            len(TOKENS),
            len(TOKENS),
            1000,
            torch.float32,
            torch.device("cpu"),
        )
        yield Slots(layers, views, geometry)
    finally:
        arena.release()
        memory.close()


def segment(slot: int, start: int, length: int) -> Segment:
    return Segment(slot, start, length, sampled=True)


def upload(array: np.ndarray[Any, Any], to: torch.Tensor | None = None) -> torch.Tensor:
    assert array.dtype == np.int32
    return copied(array, to)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    left: int,
    right: int,
    softcap: float = 0.0,
) -> torch.Tensor:
    """q `[t, Hq, D]`, k and v `[s, Hkv, D]`; the last query stands at the last key.

    A query sees `left` keys before its own position and `right` after it; -1 is all of them.
    """
    length, total, group = len(query), len(keys), query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    scores = torch.einsum("thd,shd->hts", query, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    offset = torch.arange(total) - (torch.arange(length) + total - length)[:, None]
    hidden = torch.zeros(length, total, dtype=torch.bool)
    if left >= 0:
        hidden |= offset < -left
    if right >= 0:
        hidden |= offset > right
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    return torch.einsum("hts,shd->thd", weights, values)


def flash_attention_forward(  # noqa: PLR0917 - the operator's own signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    seqused_k: torch.Tensor,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """What `mha_varlen_fwd` in torch's flash_api.cpp makes of its arguments."""
    assert (dropout_p, return_debug_mask) == (0.0, False)
    count = len(seqused_k)
    for array, length in ((cum_seq_q, count + 1), (cum_seq_k, count + 1), (seqused_k, count)):
        assert array.dtype == torch.int32
        assert array.is_contiguous()
        assert array.shape == (length,)
    assert all(tensor.stride(-1) == 1 and tensor.dim() == 3 for tensor in (query, key, value))
    left = -1 if window_size_left is None else window_size_left
    right = -1 if window_size_right is None else window_size_right
    if max_q == 1:
        is_causal = False  # one query, which stands at the end, sees everything anyway
    right = 0 if is_causal else right
    left = -1 if left >= max_k else left
    out = torch.empty_like(query)
    for i in range(count):
        begin, end = cum_seq_q[i : i + 2].tolist()
        first, used = int(cum_seq_k[i]), int(seqused_k[i])
        assert end - begin <= max_q
        assert used <= max_k
        keys, values = key[first : first + used], value[first : first + used]
        out[begin:end] = attend(query[begin:end], keys, values, scale, left=left, right=right)
    return (out,)


class PrefillModule:
    """What a compiled FlashInfer prefill module makes of its arguments, by its C++ sources."""

    def __init__(self, kind: KernelKind) -> None:
        self.kind = kind
        self.plans: list[dict[str, Any]] = []

    def plan(self, *arguments: Any) -> list[int]:
        buffers, arrays, numbers = arguments[:3], arguments[3:6], arguments[6:]
        assert len(numbers) == (14 if self.kind.library == "fa2" else 10)
        assert all(b.is_contiguous() and b.dtype == torch.uint8 for b in buffers)
        assert all(a.is_contiguous() and a.dtype == torch.int32 for a in arrays)
        rows, batch, *_, block, graph, k_dim, v_dim, causal, window = numbers[:10]
        starts, block_starts, lengths = (array.clone() for array in arrays)
        assert len(starts) == len(block_starts) == batch + 1
        assert int(starts[-1]) == rows
        assert (k_dim, v_dim) == (self.kind.dim, self.kind.dim)
        assert self.kind.window == (window >= 0)
        made = {"starts": starts, "block_starts": block_starts, "lengths": lengths}
        made |= {"block": block, "causal": causal, "window": window, "graph": graph}
        made["whole"] = self.kind.library == "fa2" and bool(numbers[11])
        made |= {"buffers": [buffer.data_ptr() for buffer in buffers], "numbers": numbers}
        made["info"] = [batch, rows, *numbers]
        self.plans.append(made)
        return list(made["info"])

    def paged_run(self, floats: Any, ints: Any, info: Any, *arguments: Any) -> None:
        query, keys, values, starts, block_starts, blocks, last, out, lse = arguments[:9]
        mask, layout, window, _, *extra = arguments[9:]
        assert (len(extra), lse, layout, out.is_contiguous()) == (15, None, 0, True)
        softcap, scale = extra[6], extra[7]
        found = [plan for plan in self.plans if plan["buffers"][1] == ints.data_ptr()]
        made = found[-1]  # what the plan left in the workspace
        assert made["buffers"][0] == floats.data_ptr()
        assert made["info"] == info
        assert made["window"] == window
        assert made["causal"] == (mask == 1)
        assert self.kind.softcap == (softcap > 0)
        assert keys.shape[1] == made["block"]
        assert keys.stride() == values.stride()
        assert torch.equal(made["starts"], starts)
        # fa2's plan does not look at the lengths, and at the blocks only if it may split them.
        if not made["whole"]:
            assert torch.equal(made["block_starts"], block_starts)
        for i in range(len(starts) - 1):
            begin, end = starts[i : i + 2].tolist()
            first, final = block_starts[i : i + 2].tolist()
            length = (final - first - 1) * made["block"] + int(last[i])
            assert self.kind.library == "fa2" or length == int(made["lengths"][i])
            table = blocks[first:final].tolist()
            k, v = (rows_of(pages, table, length) for pages in (keys, values))
            right = 0 if mask else -1
            out[begin:end] = attend(
                query[begin:end], k, v, scale, left=window, right=right, softcap=softcap
            )


def rows_of(pages: torch.Tensor, table: Sequence[int], length: int) -> torch.Tensor:
    """The first `length` tokens of some blocks; no token beyond them is touched."""
    block = pages.shape[1]
    parts = [pages[page, : length - i * block] for i, page in enumerate(table)]
    return torch.cat(parts)
