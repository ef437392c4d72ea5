"""FlashInfer's kernels (Ye et al. 2025, https://arxiv.org/abs/2501.01005) over slots.

They read keys and values in blocks through a table. A slot is a run of consecutive blocks, so its
part of the table is computed, not stored. `flashinfer-fa2` serves decodes and prefills;
`flashinfer-fa3` uses Hopper's own kernels for prefills and the same ones for decodes.

The library's wrapper classes would copy index arrays in ways that wait for the device, so this
calls the compiled modules beneath them, as of FlashInfer 0.7.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import gcd
from typing import Any

import numpy as np
import torch

from batchrun.engine.attention import (
    KV,
    AttentionBackend,
    Geometry,
    LayerAttention,
    LayerSpec,
    Upload,
)
from batchrun.engine.attention.batch import (
    Batch,
    Ints,
    Staging,
    cumulative,
    device_unsupported,
    geometry_unsupported,
    split,
)
from batchrun.engine.core import Segment
from batchrun.engine.cpu.compile import guard_caches

HEAD_DIMS = (64, 128, 256)
_BLOCK = 64  # Tokens per block; kernels split keys between multiprocessors at block boundaries.
_FLOATS = 128 << 20  # Bytes for partial results, as the library recommends.
_INTS = 8 << 20  # Bytes for one plan, as in the library's wrappers.
_NHD, _CAUSAL, _NOT_CAUSAL = 0, 1, 0


@dataclass(frozen=True, order=True)
class KernelKind:
    """What a compiled module is made for, besides the dtype."""

    library: str  # fa2 or fa3
    dim: int
    window: bool
    softcap: bool


Loader = Callable[[KernelKind], Any]
"""Loads the module of a kind, which has `plan` and `paged_run`."""


def unsupported_reason(geometry: Geometry, name: str, *, compiled: bool) -> str | None:
    """See `attention.unsupported_reason`."""
    reason = geometry_unsupported(geometry, HEAD_DIMS, softcap=True)
    reason = reason or _library_unsupported(geometry, name, compiled)
    return reason or device_unsupported(geometry, hopper=name == "flashinfer-fa3")


def _library_unsupported(geometry: Geometry, name: str, compiled: bool) -> str | None:
    guard_caches()
    try:
        version = import_module("flashinfer").__version__
    except (ImportError, OSError, RuntimeError) as error:
        return f"flashinfer-python can't be imported: {error}"
    if not version.startswith("0.7."):
        return f"flashinfer-python is {version}, and batchrun needs 0.7.x"
    missing = [
        kind
        for kind in kinds(geometry, name)
        if not compiled_from(geometry.dtype, kind).is_compiled
    ]
    if missing and compiled:
        return (
            f"its kernels are not compiled; --attention {name} compiles them, which takes minutes"
        )
    tools = [tool for tool in ("ninja", "nvcc") if shutil.which(tool) is None]
    return f"its kernels need {' and '.join(tools)} to be compiled" if missing and tools else None


def kinds(geometry: Geometry, name: str) -> list[KernelKind]:
    """The modules that a model's layers need."""
    libraries = "fa2", name.removeprefix("flashinfer-")
    return sorted(
        {KernelKind(lib, *_kind(layer)) for layer in geometry.layers for lib in libraries}
    )


def _kind(layer: LayerSpec) -> tuple[int, bool, bool]:
    return layer.k_dim, layer.window is not None, layer.softcap is not None


def _arguments(dtype: torch.dtype, kind: KernelKind) -> tuple[Any, ...]:
    """What identifies a module to the library: dtypes, widths, no positions, no fp16 reduction."""
    types = (dtype, dtype, dtype, torch.int32)
    return (kind.library, *types, kind.dim, kind.dim, 0, kind.window, kind.softcap, False)


def compiled_from(dtype: torch.dtype, kind: KernelKind) -> Any:
    """The spec of a module's compilation, chosen as in `get_batch_prefill_module`."""
    modules = import_module("flashinfer.jit.attention.modules")
    equal_strides = kind.library == "fa2"  # of keys and values, which ours always are
    make = "_gen_batch_prefill_primary_module" if equal_strides else "gen_batch_prefill_module"
    return getattr(modules, make)(*_arguments(dtype, kind))


def make(geometry: Geometry, upload: Upload, log: Callable[[str], None], name: str) -> FlashInfer:
    """See `attention.create`."""

    def load(kind: KernelKind) -> Any:
        if not compiled_from(geometry.dtype, kind).is_compiled:
            log(f"compiling FlashInfer's {kind.library} kernels, once; this takes minutes")
        get = import_module("flashinfer.prefill").get_batch_prefill_module
        try:
            return get(*_arguments(geometry.dtype, kind))
        except (RuntimeError, OSError) as error:
            lines = [line for line in str(error).splitlines() if "error" in line.lower()]
            first = (lines or [str(error)])[0].strip()
            raise ValueError(f"FlashInfer's {kind.library} kernels: {first}") from error

    return FlashInfer(geometry, upload, load, name)


class _Plan:
    """The plans for one kind of layer: where a module keeps what it worked out.

    The module writes to pinned memory and copies that to the device without an event, so steps
    alternate between two pinned buffers: the step before last was collected, so its buffer is free.
    """

    def __init__(self, module: Any, geometry: Geometry) -> None:
        self.module = module
        self.ints = torch.empty(_INTS, dtype=torch.uint8, device=geometry.device)
        pinned = geometry.device.type == "cuda"
        self._host = [torch.empty(_INTS, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self.info: Any = None
        self._key: Any = None
        self._fixed: dict[int, list[int]] = {}

    def plan(
        self,
        turn: int,
        floats: torch.Tensor,
        host: Sequence[torch.Tensor],
        numbers: Sequence[int | bool],
        fixed: int,
        *,
        key: object,
    ) -> None:
        """Plan a launch; `fixed` is the number of segments if it is for a graph, else 0.

        `key` is what the plan depends on: if it equals the last one, that plan is reused. None
        always plans anew.
        """
        if key is not None and key == self._key:
            return
        self._key = None  # until there is a plan
        self.info = self.module.plan(floats, self.ints, self._host[turn], *host, *numbers)
        if fixed and self._fixed.setdefault(fixed, list(self.info)) != list(self.info):
            raise RuntimeError(f"FlashInfer changed its plan for a graph of {fixed} decodes")
        self._key = key


@dataclass
class _Part:
    """The decodes or the prefills of a step: one launch per layer.

    Attributes:
        causal: Whether it has several tokens of a sequence.
        plans: For each kind of layer.
        arrays: The step's segments, on the device; empty if it has none of this part.
    """

    causal: bool
    plans: dict[LayerSpec, _Plan]
    arrays: list[torch.Tensor]


class FlashInfer(AttentionBackend):
    """One launch for the decodes of a step and one for its prefills.

    Args:
        geometry: What it is made for.
        upload: How arrays get to the device.
        load: Loads modules.
        name: `flashinfer-fa2` or `flashinfer-fa3`.
    """

    capturable = True

    def __init__(self, geometry: Geometry, upload: Upload, load: Loader, name: str) -> None:
        self.name = name
        self._block = gcd(geometry.slot_tokens, _BLOCK)
        self._blocks = geometry.slot_tokens // self._block  # of one slot
        capacity = 3 * (geometry.max_num_seqs + 1) + geometry.max_num_seqs * self._blocks
        self._staging = Staging(upload, capacity, geometry.device)
        self._floats = torch.zeros(_FLOATS, dtype=torch.uint8, device=geometry.device)
        self._ctas = 2  # thread blocks that the library runs at once, per multiprocessor
        if geometry.device.type == "cuda":
            found = torch.cuda.get_device_properties(geometry.device)
            self._ctas *= found.multi_processor_count
        self._turn = self._num_decodes = 0
        modules = {kind: load(kind) for kind in kinds(geometry, name)}
        self._parts = []
        for causal, library in ((False, "fa2"), (True, name.removeprefix("flashinfer-"))):
            shapes = {
                _shape(layer): KernelKind(library, *_kind(layer)) for layer in geometry.layers
            }
            plans = {shape: _Plan(modules[kind], geometry) for shape, kind in shapes.items()}
            self._parts.append(_Part(causal, plans, []))

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        """See `AttentionBackend.plan`."""
        batches = split(segments)
        if fixed and len(batches[1]):
            raise ValueError("a fixed plan takes single tokens only")
        self._num_decodes, self._turn = len(batches[0]), 1 - self._turn
        host = [self._arrays(batch) if len(batch) else () for batch in batches]
        sent = self._staging.put([array for arrays in host for array in arrays], fixed=fixed)
        for part, batch, arrays in zip(self._parts, batches, host, strict=True):
            part.arrays, sent = sent[: len(arrays)], sent[len(arrays) :]
            if arrays:
                self._make_plans(part, batch, arrays, fixed=fixed)

    def run(
        self, layer: LayerAttention, query: torch.Tensor, slots: KV, new: KV | None = None
    ) -> torch.Tensor:
        """See `AttentionBackend.run`."""
        keys, values = slots
        out = query.new_empty(*query.shape[:2], values.shape[-1])
        heads, dims = (query.shape[1], keys.shape[2]), (keys.shape[3], values.shape[3])
        shape = _shape(LayerSpec(*heads, *dims, layer.scale, layer.window, layer.softcap))
        k, v = (t.view(-1, self._block, *t.shape[2:]) for t in slots)
        at = self._num_decodes
        for part, tokens in zip(self._parts, (slice(at), slice(at, None)), strict=True):
            if part.arrays:
                self._launch(part, layer, part.plans[shape], (query[tokens], k, v, out[tokens]))
        return out

    def _arrays(self, batch: Batch) -> tuple[Ints, Ints, Ints, Ints]:
        """Query starts, block starts, tokens in each last block, and the blocks of each slot."""
        counts = -(-batch.ends // self._block)
        starts = cumulative(counts)
        blocks = np.arange(starts[-1], dtype=np.int32)
        blocks += np.repeat(batch.slots * np.int32(self._blocks) - starts[:-1], counts)
        return batch.starts, starts, batch.ends - (counts - 1) * self._block, blocks

    def _make_plans(
        self, part: _Part, batch: Batch, arrays: Sequence[Ints], *, fixed: bool
    ) -> None:
        host = [torch.from_numpy(array) for array in (*arrays[:2], batch.ends)]
        # A plan for single tokens depends on their numbers of blocks, if those may be split.
        blocks = b"" if part.causal else arrays[1].tobytes()
        for layer, plan in part.plans.items():
            heads, dims = (layer.q_heads, layer.kv_heads), (layer.k_dim, layer.v_dim)
            window = -1 if layer.window is None else layer.window - 1
            sizes = int(arrays[0][-1]), len(batch)
            numbers = [*sizes, *heads, self._block, fixed, *dims, part.causal, window]
            full = False
            if not part.causal or self.name == "flashinfer-fa2":
                # A graph merges partial results even if there are none, so they are disallowed when
                # the decodes alone fill the device. The other numbers: no fixed split, no other
                # kernels beside this one, and one token each.
                full = fixed and len(batch) * layer.kv_heads >= self._ctas
                numbers += [-1, full, 0, int(fixed)]
            key = None if part.causal else (len(batch), fixed, b"" if full else blocks)
            plan.plan(self._turn, self._floats, host, numbers, len(batch) * fixed, key=key)

    def _launch(
        self, part: _Part, layer: LayerAttention, plan: _Plan, tensors: Sequence[torch.Tensor]
    ) -> None:
        query, keys, values, out = tensors
        starts, block_starts, last, blocks = part.arrays
        plan.module.paged_run(
            self._floats,
            plan.ints,
            plan.info,
            query,
            keys,
            values,
            starts,
            block_starts,
            blocks,
            last,
            out,
            None,  # log-sum-exp
            _CAUSAL if part.causal else _NOT_CAUSAL,
            _NHD,
            -1 if layer.window is None else layer.window - 1,
            False,  # programmatic dependent launch
            *(None,) * 6,  # custom mask, ALiBi, multi-item scoring
            layer.softcap or 0.0,
            layer.scale,
            *(None,) * 3,  # fp8 scales
            1.0,  # rope scale
            1e4,  # rope theta
            0,  # multi-item scoring
            _FLOATS,
        )


def _shape(layer: LayerSpec) -> LayerSpec:
    """The layer without its scale and cap value; layers that differ only there share a plan."""
    softcap = None if layer.softcap is None else 0.0
    return LayerSpec(
        layer.q_heads, layer.kv_heads, layer.k_dim, layer.v_dim, 0.0, layer.window, softcap
    )
