"""Decodes on a CPU by a kernel of our own, native.cpp; longer segments by SDPA.

SDPA is called once a sequence, where waking the kernel costs more than reading the keys. The
library takes all sequences in one call. It needs neither torch's headers nor an OpenMP of its own:
it computes on the threads that torch has, whose OpenMP is in the process before it is loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from batchrun.engine import compiled
from batchrun.engine.attention import Geometry, LayerAttention, Upload
from batchrun.engine.attention.batch import split
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.compiled import CompileError
from batchrun.engine.core import Segment

SOURCE = Path(__file__).with_name("native.cpp")
_FUNCTIONS = {
    torch.float32: "batchrun_decode_float32",
    torch.bfloat16: "batchrun_decode_bfloat16",
}


def why_not(geometry: Geometry, name: str = "native", *, compiled: bool = False) -> str | None:
    """See `attention.why_not`. A compiler takes two seconds: having to is no reason."""
    if geometry.device.type != "cpu":
        return "it computes on a CPU"
    if geometry.dtype not in _FUNCTIONS:
        return f"it computes in float32 and bfloat16, not in {str(geometry.dtype)[6:]}"
    return None


def make(
    geometry: Geometry,
    upload: Upload | None,
    log: Callable[[str], None],
    name: str = "native",
) -> Native:
    """See `attention.create`; compiles at first use, and keeps the result in the user's cache."""
    try:
        library = compiled.load(SOURCE, log)
    except CompileError as error:
        raise ValueError(f"it can't be compiled: {error}") from error
    return Native(getattr(library, _FUNCTIONS[geometry.dtype]))


class _Call(ctypes.Structure):
    """As in native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out", "sinks")),
        *((name, ctypes.c_void_p) for name in ("slots", "ends")),
        *((name, ctypes.c_int64) for name in ("n", "q_heads", "kv_heads", "k_dim", "v_dim")),
        ("query_stride", ctypes.c_int64 * 2),
        ("key_stride", ctypes.c_int64 * 3),
        ("value_stride", ctypes.c_int64 * 3),
        ("window", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class Native:
    """One call for all decodes of a step, which reads each key and each value once.

    Args:
        decode: One of the library's functions, which takes a pointer to a `_Call`.
    """

    name = "native"
    capturable = False  # there are no graphs on a CPU

    def __init__(self, decode: Callable[..., object]) -> None:
        self._decode = decode
        self._prefills = SDPA()
        self._decodes, _ = split(())
        self._longer = False

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        """See `AttentionBackend.plan`."""
        if fixed:
            raise ValueError("native computes on a CPU, which records no graphs")
        self._decodes, _ = split(segments)
        longer = segments[len(self._decodes) :]
        self._longer = len(longer) > 0
        self._prefills.plan(longer)

    def run(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """See `AttentionBackend.run`."""
        at, batch = len(self._decodes), self._decodes
        if not at:
            return self._prefills.run(layer, query, keys, values)
        if query.stride(2) != 1:
            query = query.contiguous()
        sinks = None if layer.sinks is None else layer.sinks.float().contiguous()
        out = query.new_empty(*query.shape[:2], values.shape[3])
        call = _Call(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            batch.slots.ctypes.data,
            batch.ends.ctypes.data,
            at,
            query.shape[1],
            keys.shape[2],
            *(keys.shape[3], values.shape[3]),
            query.stride()[:2],
            keys.stride()[:3],
            values.stride()[:3],
            layer.window or 0,
            torch.get_num_threads(),
            layer.scale,
            layer.softcap or 0.0,
        )
        self._decode(ctypes.byref(call))
        if self._longer:
            out[at:] = self._prefills.run(layer, query[at:], keys, values)
        return out
