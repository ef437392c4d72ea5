"""Attention in which a query's bits depend on its own sequence alone, for any model and dtype.

One launch computes a step's decodes and prompts; a second one adds up the parts of decodes that
are so long that several programs share each (Flash-Decoding, https://crfm.stanford.edu/2023/10/12,
with parts at fixed positions instead of a number of splits chosen by the batch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from batchrun.engine.attention import KV, AttentionBackend, Geometry, LayerAttention, Upload
from batchrun.engine.attention.batch import Batch, Ints, Staging, device_unsupported, together
from batchrun.engine.core import Segment

PART = 512  # tokens: another number would be another order of sums
_WORKSPACE = 64 << 20  # bytes for parts that are not added up yet
_PROGRAMS = 4  # per multiprocessor: more would not make up for the parts' way through memory
_LOG2E = math.log2(math.e)


def unsupported_reason(geometry: Geometry, name: str, *, compiled: bool) -> str | None:
    """See `attention.unsupported_reason`."""
    if geometry.device.type != "cuda":
        return "it needs a CUDA device"
    if find_spec("triton") is None:
        return "triton is not installed"
    if geometry.dtype.itemsize not in {2, 4}:
        return f"it does not compute in {str(geometry.dtype)[6:]}"
    return device_unsupported(geometry)


def make(
    geometry: Geometry, upload: Upload, log: Callable[[str], None], name: str
) -> TritonAttention:
    """See `attention.create`."""
    properties = torch.cuda.get_device_properties(geometry.device)
    return TritonAttention(geometry, upload, _PROGRAMS * properties.multi_processor_count)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The shape of a program: `m` pairs of a query and a head, `n` keys at a time."""

    m: int
    n: int
    warps: int
    stages: int


def blocks_for(itemsize: int, k_dim: int, v_dim: int) -> Blocks:
    """The blocks for keys and values of these widths: the same for decodes and prompts."""
    wide = max(k_dim, v_dim)
    if wide > 256:
        return Blocks(16, 16, 4, 1)
    if itemsize == 4:
        return Blocks(32, 32, 8, 1)
    return Blocks(64, 64, 4, 2) if wide <= 128 else Blocks(64, 32, 8, 2)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What layers have in common whose work is divided alike: the queries of a tile, and heads."""

    m: int
    group: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class _Launch:
    """On the device: `items` `[n, 5]` and `segments` `[N, 6]`; whether parts are to be added up."""

    items: torch.Tensor
    segments: torch.Tensor
    splits: bool


class TritonAttention(AttentionBackend):
    """See the module.

    Args:
        geometry: What it is made for.
        upload: How arrays get to the device.
        programs: How many are worth launching, if the work can be divided among so many.
    """

    name = "triton"
    capturable = True
    invariant = True

    def __init__(self, geometry: Geometry, upload: Upload, programs: int) -> None:
        self._programs = programs
        self._itemsize = geometry.dtype.itemsize
        kinds = {
            _Kind(
                blocks_for(self._itemsize, layer.k_dim, layer.v_dim).m,
                layer.q_heads // layer.kv_heads,
                layer.kv_heads,
            )
            for layer in geometry.layers
        }
        self._kinds = sorted(kinds, key=repr)
        widest = max(layer.q_heads * (layer.v_dim + 2) for layer in geometry.layers)
        most = geometry.max_num_seqs * -(-geometry.slot_tokens // PART)
        self._places = min(most, _WORKSPACE // (4 * widest))
        self._partial = torch.empty(
            self._places * widest, dtype=torch.float32, device=geometry.device
        )
        capacity = sum(
            6 * geometry.max_num_seqs + 5 * self._most_items(kind, geometry.max_num_seqs)
            for kind in self._kinds
        )
        self._staging = Staging(upload, capacity, geometry.device)
        self._launches: dict[_Kind, _Launch] = {}

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        """See `AttentionBackend.plan`."""
        batch = together(segments)
        if fixed and (batch.lengths > 1).any():
            raise ValueError("a fixed plan takes single tokens only")
        arrays, splits = [], []
        for kind in self._kinds:
            items, about = self._divide(batch, kind)
            if fixed:  # the rest is no item
                missing = self._most_items(kind, len(batch)) - len(items)
                items = np.pad(items, ((0, missing), (0, 0)), constant_values=-1)
            arrays += [items.ravel(), about.ravel()]
            splits.append(fixed or bool((about[:, 4] >= 0).any()))
        sent = self._staging.put(arrays, fixed=fixed)
        for i, kind in enumerate(self._kinds):
            items_there, about_there = sent[2 * i].view(-1, 5), sent[2 * i + 1].view(-1, 6)
            self._launches[kind] = _Launch(items_there, about_there, splits[i])

    def run(
        self, layer: LayerAttention, query: torch.Tensor, slots: KV, new: KV | None = None
    ) -> torch.Tensor:
        """See `AttentionBackend.run`."""
        from batchrun.engine.attention import (  # noqa: PLC0415  (there may be no Triton)
            triton_kernels as kernels,
        )

        keys, values = slots
        (_, heads, k_dim), kv_heads, v_dim = query.shape, keys.shape[2], values.shape[3]
        blocks = blocks_for(self._itemsize, k_dim, v_dim)
        group = heads // kv_heads
        launch = self._launches[_Kind(blocks.m, group, kv_heads)]
        query = query if query.stride(2) == 1 else query.contiguous()
        out = query.new_empty(len(query), heads, v_dim)
        sinks = out if layer.sinks is None else layer.sinks
        cap = layer.softcap
        unit = _LOG2E * (layer.scale if cap is None else 1.0)
        units = unit, _LOG2E / unit
        capped = (0.0, 0.0) if cap is None else (cap, 2 * _LOG2E * layer.scale / cap)
        strides = *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3]
        block_v = _block(v_dim)
        seen = {"PART": PART, "WINDOW": layer.window or 0, "CHUNK": layer.chunk or 0}
        shape = {"HEADS": heads, "GROUP": group, "V_DIM": v_dim, "BLOCK_V": block_v, **seen}
        shape["HAS_SINKS"] = layer.sinks is not None
        attend: Any = kernels.attend[(len(launch.items), kv_heads)]
        attend(
            *(query, keys, values, out, self._partial, sinks, launch.items, launch.segments),
            *(*units, *capped, *strides),
            **shape,
            K_DIM=k_dim,
            BLOCK_K=_block(k_dim),
            BLOCK_M=blocks.m,
            BLOCK_N=blocks.n,
            CAPPED=cap is not None,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        if launch.splits:
            combine: Any = kernels.combine[(len(launch.segments), kv_heads)]
            of_parts = out, self._partial, sinks, launch.segments
            combine(*of_parts, *units, **shape, BLOCK_G=1 << (group - 1).bit_length())
        return out

    def _most_items(self, kind: _Kind, decodes: int) -> int:
        """How many items that many decodes have at most."""
        return decodes * -(-kind.group // kind.m) + self._programs // kind.kv_heads

    def _divide(self, batch: Batch, kind: _Kind) -> tuple[Ints, Ints]:
        """Divide a step's work for one kind of layer.

        Returns:
            Items `[n, 5]`: segment, tile, first part, parts, and where these go, or -1 if the item
            has all of the tile. Segments `[N, 6]`: slot, position of the first query, queries,
            row of the first, and where the parts of a divided one begin, or -1; its parts.
        """
        tiles = -(-batch.lengths * kind.group // kind.m)
        parts = (batch.ends - 1) // PART + 1
        # What one program has to do if all have the same: only decodes longer than that are
        # divided, the longest ones first, as far as there is room for their parts.
        run = max(1, -(-int((tiles * parts).sum()) * kind.kv_heads // self._programs))
        may = np.flatnonzero((batch.lengths == 1) & (parts > run))
        may = may[np.argsort(-parts[may], kind="stable")]
        ends = np.cumsum(parts[may])
        may, ends = may[ends <= self._places], ends[ends <= self._places]
        places = np.full(len(batch), -1, np.int32)
        places[may] = ends - parts[may]
        runs = np.where(places < 0, 1, -(-parts // run))
        counts = tiles * runs
        segment = np.repeat(np.arange(len(batch), dtype=np.int32), counts)
        index = np.arange(len(segment), dtype=np.int32) - np.repeat(
            np.cumsum(counts) - counts, counts
        )
        first = index % runs[segment] * run
        whole = places[segment] < 0
        items = np.stack(
            [
                segment,
                index // runs[segment],
                first,
                np.where(whole, parts[segment], run),
                np.where(whole, -1, places[segment] + first),
            ],
            axis=1,
        )
        starts = batch.starts[:-1]
        about = [batch.slots, batch.ends - batch.lengths, batch.lengths, starts, places, parts]
        return items.astype(np.int32), np.stack(about, axis=1).astype(np.int32)


def _block(width: int) -> int:
    """A power of two that holds the width; a product needs 16."""
    return max(16, 1 << (width - 1).bit_length())
