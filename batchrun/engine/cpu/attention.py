"""Attention on a CPU by our own kernels: attention_bf16.cpp, or attention.cpp where that can't run.

SDPA is called once per sequence, and each call costs more than reading the keys. The libraries
take all sequences in one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from batchrun.engine import cpu
from batchrun.engine.attention import KV, AttentionBackend, Geometry, LayerAttention, Upload
from batchrun.engine.attention.batch import shared_parts, together
from batchrun.engine.core import Segment
from batchrun.engine.cpu import Level
from batchrun.engine.cpu import compile as compiled
from batchrun.engine.cpu.compile import CompileError

SOURCE = Path(__file__).with_name("attention.cpp")
SOURCE_BF16 = Path(__file__).with_name("attention_bf16.cpp")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(geometry: Geometry, name: str, *, compiled: bool) -> str | None:
    """See `attention.unsupported_reason`. Compiling takes seconds, so it is never a reason."""
    if geometry.device.type != "cpu":
        return "it computes on a CPU"
    if geometry.dtype not in _DTYPES:
        return f"it computes in float32 and narrower, not in {str(geometry.dtype)[6:]}"
    return None


def make(
    geometry: Geometry,
    upload: Upload | None,
    log: Callable[[str], None],
    name: str = "native",
    level: Level = Level.TILES,
) -> AttentionBackend:
    """See `attention.create`. Compiles on first use and keeps the result in the user's cache.

    `level` is the highest level of instructions to use for bfloat16.
    """
    level = min(level, cpu.level()) if geometry.dtype == torch.bfloat16 else Level.NOTHING
    if level:
        with suppress(CompileError):  # the compiler may be older than the CPU
            return Native(compiled.load(SOURCE_BF16, log, [Call]), geometry.dtype, level)
    dtype = str(geometry.dtype)[6:]
    try:
        return Native(compiled.load(SOURCE, log, [Call], dtype), geometry.dtype)
    except CompileError as error:
        raise ValueError(f"it can't be compiled: {error}") from error
    except AttributeError as error:
        raise ValueError(f"this compiler does not support {dtype}") from error


class Call(ctypes.Structure):
    """The struct of that name in common.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out", "sinks")),
        *((name, ctypes.c_void_p) for name in ("slots", "ends", "starts")),
        *((name, ctypes.c_int64) for name in ("n", "q_heads", "kv_heads", "k_dim", "v_dim")),
        ("query_stride", ctypes.c_int64 * 2),
        ("key_stride", ctypes.c_int64 * 3),
        ("value_stride", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("window", "chunk", "threads", "level")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("new_keys", "new_values")),
        ("new_key_stride", ctypes.c_int64 * 2),
        ("new_value_stride", ctypes.c_int64 * 2),
        ("n_shared", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("shared_part", "shared_starts", "shared_members")),
        ("own_part", ctypes.c_void_p),
    )

    def attend(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        slots: KV,
        *,
        by: Callable[..., object],
        new: KV | None = None,
    ) -> torch.Tensor:
        """Attend for the batch by a library's function; the batch's queries come first."""
        if query.stride(2) != 1:
            query = query.contiguous()
        sinks = None if layer.sinks is None else layer.sinks.float().contiguous()
        keys, values = slots
        _, _, self.kv_heads, self.k_dim = keys.shape
        self.q_heads, self.v_dim = query.shape[1], values.shape[3]
        out = query.new_empty(*query.shape[:2], values.shape[3])
        self.query, self.out = query.data_ptr(), out.data_ptr()
        self.keys, self.values = keys.data_ptr(), values.data_ptr()
        self.sinks = None if sinks is None else sinks.data_ptr()
        self.query_stride = query.stride()[:2]
        self.key_stride, self.value_stride = keys.stride()[:3], values.stride()[:3]
        self.window, self.chunk, self.scale = layer.window or 0, layer.chunk or 0, layer.scale
        self.softcap = layer.softcap or 0.0
        self.new_keys = None
        if new is not None:
            new_keys, new_values = (t if t.stride(2) == 1 else t.contiguous() for t in new)
            self.new_keys, self.new_values = new_keys.data_ptr(), new_values.data_ptr()
            self.new_key_stride = new_keys.stride()[:2]
            self.new_value_stride = new_values.stride()[:2]
        by(ctypes.byref(self))
        return out


class Native(AttentionBackend):
    """One call per step. A query's result depends on its own sequence alone, bit for bit.

    Tokens that several sequences of a step share are read once for all of them.

    Args:
        library: The compiled library.
        dtype: The dtype of queries, keys and values.
        level: The instructions that multiply bfloat16.
    """

    name = "native"
    writes_kv = True
    invariant = True

    def __init__(
        self, library: ctypes.CDLL, dtype: torch.dtype, level: Level = Level.NOTHING
    ) -> None:
        self._function = getattr(library, f"batchrun_attend_{str(dtype)[6:]}")
        self._part: int = library.batchrun_part()  # tokens: the unit of sharing
        self.level = level
        self.plan(())

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        """See `AttentionBackend.plan`."""
        if fixed:
            raise ValueError("native computes on a CPU, which records no graphs")
        batch, shared = together(segments), shared_parts(segments, self._part)
        starts = batch.starts
        call = Call(n=len(batch), threads=torch.get_num_threads(), level=self.level)
        call.slots, call.ends = batch.slots.ctypes.data, batch.ends.ctypes.data
        call.starts = starts.ctypes.data
        if shared is not None:
            call.n_shared, call.own_part = len(shared.part), shared.own.ctypes.data
            call.shared_part, call.shared_starts, call.shared_members = (
                array.ctypes.data for array in (shared.part, shared.starts, shared.members)
            )
        self._call, self._held = call, (batch, starts, shared)

    def run(
        self, layer: LayerAttention, query: torch.Tensor, slots: KV, new: KV | None = None
    ) -> torch.Tensor:
        """See `AttentionBackend.run`."""
        return self._call.attend(layer, query, slots, by=self._function, new=new)
