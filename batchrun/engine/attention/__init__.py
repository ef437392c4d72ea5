"""Attention over contiguous slots: one small file for each kernel library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from batchrun.engine.core import Segment

_MODULES = {
    "sdpa": "attention.sdpa",
    "native": "cpu.attention",
    "torch-flash": "attention.torch_flash",
    "flashinfer-fa2": "attention.flashinfer",
    "flashinfer-fa3": "attention.flashinfer",
}
NAMES = tuple(_MODULES)
_BEST_FIRST = ("flashinfer-fa3", "flashinfer-fa2", "torch-flash")


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer asks of attention.

    Args:
        scale: Factor on the scores.
        window: Keys a query sees, itself included; None sees all before it.
        softcap: Scores become `softcap * tanh(scores / softcap)`; None leaves them.
        sinks: One extra logit a query head that takes part in the softmax only, `[Hq]`.
        chunk: A query at position p sees keys from `p - p % chunk` on; None sees all before it.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    chunk: int | None = None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer of the model asks of attention, known before any step."""

    q_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    chunk: int | None = None


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a backend is made for.

    Args:
        layers: Each layer of the model.
        slot_tokens: Tokens of address space of one slot, a multiple of 16.
        num_slots: Slots, the scratch slots of the caller included.
        max_num_seqs: Segments of one step at most.
        max_num_batched_tokens: Tokens of one step at most.
        dtype: Of queries, keys and values.
        device: That all of them are on.
    """

    layers: tuple[LayerSpec, ...]
    slot_tokens: int
    num_slots: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: torch.dtype
    device: torch.device


class Upload(Protocol):
    """How arrays reach the device."""

    def __call__(self, array: np.ndarray[Any, Any], to: torch.Tensor | None = None) -> torch.Tensor:
        """See `Transfers.upload`."""


KV = tuple["torch.Tensor", "torch.Tensor"]
"""Keys `[..., Hkv, Dk]` and values `[..., Hkv, Dv]`."""

QKV = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""Queries `[T, Hq, Dk]`, keys `[T, Hkv, Dk]` and values `[T, Hkv, Dv]` of a step's tokens."""

Attention = Callable[["LayerAttention", "torch.Tensor", KV], "torch.Tensor"]
"""What `AttentionBackend.run` is, of keys and values that are in their slots."""


class AttentionBackend(Protocol):
    """A kernel library over slots that are contiguous in virtual memory.

    Attributes:
        name: One of `NAMES`.
        capturable: Whether `plan` can be `fixed`.
        writes_kv: Whether `run` takes the step's new keys and values, and puts them in their slots.
        max_query: Tokens of each sequence that one call computes with those of others at most;
            None for any. More are a call for each sequence.
        kv_formats: Names of the `KVFormat`s that it reads.
    """

    name: str
    capturable: bool = False
    writes_kv: bool = False
    max_query: int | None = None
    kv_formats: tuple[str, ...] = ("plain",)

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        """Prepare a step: its segments lie one behind the other, single-token ones first.

        Steps are pipelined: this may be called while the step before is still computing; the one
        before that has been collected. The compute stream is the current one, and not capturing.

        Args:
            segments: What `run` will be called for.
            fixed: `run` is being captured in, or replayed by, a CUDA graph. All segments are
                single tokens then, and whatever `run` reads lies at the same addresses in each
                fixed plan of as many segments.
        """

    def run(
        self, layer: LayerAttention, query: torch.Tensor, slots: KV, new: KV | None = None
    ) -> torch.Tensor:
        """Attend causally, each segment over its own slot.

        Args:
            layer: Scale, window and the like.
            query: `[T, Hq, Dk]`, the planned segments' tokens packed.
            slots: `[num_slots, slot_tokens, Hkv, D]` each, strided views; only tokens up to a
                segment's end may be touched, beyond them there is no memory.
            new: `[T, Hkv, D]` each, what is to be put into the slots first, where the backend
                `writes_kv`.

        Returns:
            `[T, Hq, Dv]`.
        """


def unsupported_reason(name: str, geometry: Geometry, *, compiled: bool = False) -> str | None:
    """Why the backend of that name can't serve a model here; None where it can.

    With `compiled`, kernels that would first have to be compiled for minutes are a reason too.
    """
    reason: str | None = _library(name).unsupported_reason(geometry, name, compiled=compiled)
    return reason


def create(
    name: str,
    geometry: Geometry,
    upload: Upload | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> AttentionBackend:
    """Make the backend of that name; `auto` takes the best one for this model and machine.

    `auto` is `native` on a CPU, and `sdpa` where that can't be compiled and for float32 on a GPU.
    Kernels that take minutes to compile it leaves alone: the user asks for them by name.

    Args:
        name: One of `NAMES`, or `auto`.
        geometry: What it is made for.
        upload: How its arrays reach the device; None on a CPU.
        log: Told, in one line, what `auto` could not use and what it uses instead.

    Raises:
        ValueError: There is no such backend, or it can't serve this model here; says why.
    """
    if name == "auto":
        return _best(geometry, upload, log)
    _refuse_unsupported(name, geometry)
    made: AttentionBackend = _library(name).make(geometry, upload, log, name)
    return made


def check(name: str, geometry: Geometry) -> None:
    """Do all of `create` but compile what takes minutes.

    Raises:
        ValueError: As `create`.
    """
    if name == "native":  # compiled in seconds, once
        create(name, geometry)
    elif name != "auto":
        _refuse_unsupported(name, geometry)


def _refuse_unsupported(name: str, geometry: Geometry) -> None:
    reason = unsupported_reason(name, geometry)
    if reason is not None:
        raise ValueError(f"the attention backend {name} can't be used: {reason}")


def candidates(geometry: Geometry) -> tuple[str, ...]:
    """The kernels that `auto` tries before it takes `sdpa`, the best one first."""
    if geometry.device.type == "cpu":
        return ("native",)
    return _BEST_FIRST if geometry.dtype.itemsize < 4 else ()


def _best(
    geometry: Geometry, upload: Upload | None, log: Callable[[str], None]
) -> AttentionBackend:
    found: AttentionBackend | None = None
    skipped = []
    for name in (*candidates(geometry), "sdpa"):  # which serves everything
        try:
            reason = unsupported_reason(name, geometry, compiled=True)
            found = None if reason else _library(name).make(geometry, upload, log, name)
        except ValueError as error:
            reason = str(error)
        if found is not None:
            break
        skipped.append(f"{name}: {reason}")
    assert found is not None
    if skipped:
        log(f"attention by {found.name} ({'; '.join(skipped)})")
    return found


def _library(name: str) -> Any:
    """The module of a kernel library, which has two functions; `name` is one that it serves.

    `unsupported_reason(geometry, name, *, compiled)` is as the one here. `make(geometry,
    upload, log, name)` makes the backend, compiling kernels if need be; ValueError says why that
    fails.
    """
    if name not in _MODULES:
        raise ValueError(f"no attention backend {name!r}; there are auto, {', '.join(NAMES)}")
    # Imported when wanted: each needs torch, and some need libraries that may be missing.
    return import_module(f"batchrun.engine.{_MODULES[name]}")
