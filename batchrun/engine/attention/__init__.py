"""Attention over contiguous slots, with one small file per kernel library."""

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
    "triton": "attention.triton_attention",
    "tiled": "attention.tiled",
}
NAMES = tuple(_MODULES)
_BEST_FIRST = ("flashinfer-fa3", "flashinfer-fa2", "torch-flash")
_INVARIANT = ("triton",)  # on a GPU


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """A layer's attention parameters.

    Args:
        scale: Factor on the scores.
        window: Keys that a query sees, its own included; None for all before it.
        softcap: Scores become `softcap * tanh(scores / softcap)`; None leaves them.
        sinks: One extra logit per query head, which only takes part in the softmax, `[Hq]`.
        chunk: A query at position p sees keys from `p - p % chunk` on; None for all before it.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    chunk: int | None = None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A layer's attention shape and parameters, known before any step."""

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
        slot_tokens: Tokens of address space per slot, a multiple of 16.
        num_slots: Number of slots, including the caller's scratch slots.
        max_num_seqs: Maximum number of segments in one step.
        max_num_batched_tokens: Maximum number of tokens in one step.
        dtype: Dtype of queries, keys and values.
        device: Device that all of them are on.
        deterministic: Whether the backend should be `invariant`; on a GPU it must.
    """

    layers: tuple[LayerSpec, ...]
    slot_tokens: int
    num_slots: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: torch.dtype
    device: torch.device
    deterministic: bool = False


class Upload(Protocol):
    """How arrays reach the device."""

    def __call__(self, array: np.ndarray[Any, Any], to: torch.Tensor | None = None) -> torch.Tensor:
        """See `Transfers.upload`."""


KV = tuple["torch.Tensor", "torch.Tensor"]
"""Keys `[..., Hkv, Dk]` and values `[..., Hkv, Dv]`."""

QKV = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""Queries `[T, Hq, Dk]`, keys `[T, Hkv, Dk]` and values `[T, Hkv, Dv]` of a step's tokens."""

Attention = Callable[["LayerAttention", "torch.Tensor", KV], "torch.Tensor"]
"""`AttentionBackend.run` for keys and values that are already in their slots."""


class AttentionBackend(Protocol):
    """A kernel library over slots that are contiguous in virtual memory.

    Attributes:
        name: One of `NAMES`.
        capturable: Whether `plan` can be `fixed`.
        writes_kv: Whether `run` takes the step's new keys and values and writes them to the slots.
        max_query: Maximum tokens per sequence that one call computes together with other sequences;
            with more, each sequence is a call of its own. None for no limit.
        kv_formats: Names of the `KVFormat`s that it reads.
        invariant: Whether a query's bits depend on its own sequence alone.
    """

    name: str
    capturable: bool = False
    writes_kv: bool = False
    max_query: int | None = None
    kv_formats: tuple[str, ...] = ("plain",)
    invariant: bool = False

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        """Prepare a step. Its segments are packed in order, single-token ones first.

        Steps are pipelined: this may be called while the previous step is still computing; the one
        before that has been collected. The compute stream is current, and not capturing.

        Args:
            segments: The segments that `run` will be called for.
            fixed: `run` is being captured in, or replayed by, a CUDA graph. All segments are then
                single tokens, and whatever `run` reads lies at the same addresses in each fixed
                plan with as many segments.
        """

    def run(
        self, layer: LayerAttention, query: torch.Tensor, slots: KV, new: KV | None = None
    ) -> torch.Tensor:
        """Attend causally, each segment over its own slot.

        Args:
            layer: Scale, window and the like.
            query: `[T, Hq, Dk]`, the planned segments' tokens packed.
            slots: `[num_slots, slot_tokens, Hkv, D]` each, strided views; only tokens up to a
                segment's end may be touched, as there may be no memory past it.
            new: `[T, Hkv, D]` each, to be written to the slots first, if the backend `writes_kv`.

        Returns:
            `[T, Hq, Dv]`.
        """


def unsupported_reason(name: str, geometry: Geometry, *, compiled: bool = False) -> str | None:
    """Why the backend of that name can't serve a model here; None if it can.

    With `compiled`, kernels that would first need minutes of compilation are a reason too.
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

    `auto` is `native` on a CPU, or `sdpa` if that can't be compiled, or `tiled` for deterministic
    steps; on a GPU, `sdpa` for float32, and `triton` for deterministic steps. It never picks
    kernels that take minutes to compile: the user must ask for those by name.

    Args:
        name: One of `NAMES`, or `auto`.
        geometry: What it is made for.
        upload: How its arrays get to the device; None on a CPU.
        log: Called with one line that says what `auto` could not use and what it uses instead.

    Raises:
        ValueError: There is no such backend, or it can't serve this model here; says why.
    """
    if name == "auto":
        return _best(geometry, upload, log)
    _refuse_unsupported(name, geometry)
    made: AttentionBackend = _library(name).make(geometry, upload, log, name)
    return made


def check(name: str, geometry: Geometry) -> None:
    """Do everything that `create` does, except for compilations that take minutes.

    Raises:
        ValueError: See `create`.
    """
    if name == "native":  # compiled in seconds, once
        create(name, geometry)
    elif name != "auto":
        _refuse_unsupported(name, geometry)


def _refuse_unsupported(name: str, geometry: Geometry) -> None:
    reason = unsupported_reason(name, geometry)
    if reason is None and _must_be_invariant(geometry) and name not in _INVARIANT:
        reason = f"it depends on the batch; with --deterministic use {', '.join(_INVARIANT)}"
    if reason is not None:
        raise ValueError(f"the attention backend {name} can't be used: {reason}")


def _must_be_invariant(geometry: Geometry) -> bool:
    return geometry.deterministic and geometry.device.type != "cpu"


def candidates(geometry: Geometry) -> tuple[str, ...]:
    """The backends that `auto` tries before `sdpa`, the best one first."""
    if geometry.device.type == "cpu":
        return ("native", "tiled") if geometry.deterministic else ("native",)
    if geometry.deterministic:
        return _INVARIANT
    return _BEST_FIRST if geometry.dtype.itemsize < 4 else ()


def _best(
    geometry: Geometry, upload: Upload | None, log: Callable[[str], None]
) -> AttentionBackend:
    found: AttentionBackend | None = None
    skipped = []
    last = () if _must_be_invariant(geometry) else ("sdpa",)  # which serves everything
    for name in (*candidates(geometry), *last):
        try:
            reason = unsupported_reason(name, geometry, compiled=True)
            found = None if reason else _library(name).make(geometry, upload, log, name)
        except ValueError as error:
            reason = str(error)
        if found is not None:
            break
        skipped.append(f"{name}: {reason}")
    if found is None:
        raise ValueError(f"--deterministic can't be guaranteed ({'; '.join(skipped)})")
    if skipped:
        log(f"using {found.name} attention ({'; '.join(skipped)})")
    return found


def _library(name: str) -> Any:
    """The module of the kernel library that serves `name`. It has two functions.

    `unsupported_reason(geometry, name, *, compiled)` is like the one here.
    `make(geometry, upload, log, name)` makes the backend and compiles kernels if needed; it raises
    ValueError, with the reason, if that fails.
    """
    if name not in _MODULES:
        raise ValueError(f"no attention backend {name!r}; use auto or one of {', '.join(NAMES)}")
    # Imported on demand: each needs torch, and some need libraries that may be missing.
    return import_module(f"batchrun.engine.{_MODULES[name]}")
