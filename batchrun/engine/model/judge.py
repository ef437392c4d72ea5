"""How far off results may be, and the smallest gate: kernels against float32. Needs only torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from batchrun.engine import attention
from batchrun.engine.attention import Geometry, LayerAttention, LayerSpec
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.core import Segment
from batchrun.engine.transfers import copied
from batchrun.errors import first_line


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far off results of one dtype may be, as a share of the largest number: see `difference`.

    Args:
        kernel: Attention, against float32 on the same rounded numbers.
        linear: A linear layer, which sums in another order.
        layer: A decoder layer, as a share of its change to each token.
        modules: Logits after modules were replaced.
        layers: Logits after every layer passed on its own: rounding adds up over the layers.
        slots: Logits and attention over slots.
    """

    kernel: float
    linear: float
    layer: float
    modules: float
    layers: float
    slots: float


_TOLERANCES = {
    torch.float32: Tolerance(3.4e-6, 1e-5, 1e-3, 1e-4, 1e-4, 2e-3),
    torch.float16: Tolerance(1.7e-3, 0.02, 0.05, 0.06, 0.25, 0.06),
    torch.bfloat16: Tolerance(0.01, 0.02, 0.05, 0.06, 0.25, 0.06),
}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """The tolerance for a dtype; bfloat16's for a dtype that has none of its own."""
    return _TOLERANCES.get(dtype, _TOLERANCES[torch.bfloat16])


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number in `want`; inf if not finite."""
    want = want.float()
    off = float((got.float() - want).abs().max() / want.abs().max().clamp_min(1e-6))
    return off if math.isfinite(off) else math.inf


# --- kernels ---

_PLAIN = LayerSpec(4, 2, 128, 128, 128**-0.5)  # the usual width: its kernels are compiled first
KINDS = {
    "grouped heads (llama, qwen3)": _PLAIN,
    "a sliding window (mistral, gemma3_text)": replace(_PLAIN, window=40),
    "soft caps (gemma2)": replace(_PLAIN, softcap=50.0),
    "sinks (gpt_oss)": replace(_PLAIN, k_dim=64, v_dim=64, window=40, sinks=True),
    "chunks (llama4_text)": replace(_PLAIN, chunk=64),
    "keys wider than values (deepseek_v3)": LayerSpec(4, 4, 192, 128, 192**-0.5),
}


def check_kinds(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[bool, str]]:
    """What `auto` picks for each kind of attention; the kinds name models that have them.

    Returns:
        By kind: whether it is a dedicated kernel and not `sdpa`, which serves everything but is
        slow on a GPU; and its name, with the verdict of `check_kernel`.
    """
    found = {}
    for kind, spec in KINDS.items():
        geometry = _geometry(spec, device, dtype)
        for name in (*attention.candidates(geometry), "sdpa"):
            works, what = check_kernel(name, device, dtype, spec)
            if works or name == "sdpa":
                found[kind] = (name != "sdpa", f"{name}, {what}")
                break
    return found


def check_kernel(
    name: str, device: torch.device, dtype: torch.dtype, spec: LayerSpec = _PLAIN
) -> tuple[bool, str]:
    """Run a backend over slots with decodes, a chunk and a whole prompt in one step.

    Kernels that would first have to be compiled for minutes are not run.

    Args:
        name: The backend's name.
        device: Where to run it.
        dtype: The dtype of queries, keys and values.
        spec: The layer.

    Returns:
        Whether it works, and the `difference` from float32, or why it does not work.
    """
    parts = (299, 1), (0, 1), (20, 100), (0, 70)  # the start and length of each
    segments = [Segment(slot, *part, sampled=True) for slot, part in enumerate(parts)]
    geometry = _geometry(spec, device, dtype)
    reason = attention.unsupported_reason(name, geometry, compiled=True)
    if reason is not None:
        return False, reason

    generator = torch.Generator().manual_seed(0)
    tokens = sum(segment.length for segment in segments)
    slots = len(segments), geometry.slot_tokens, spec.kv_heads
    shapes = (tokens, spec.q_heads, spec.k_dim), (*slots, spec.k_dim), (*slots, spec.v_dim)
    q, k, v = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    sinks = torch.randn(spec.q_heads, generator=generator).to(dtype) if spec.sinks else None
    layer = LayerAttention(spec.scale, spec.window, spec.softcap, sinks, spec.chunk)
    try:
        backend = attention.create(name, geometry, partial(copied, device=device))
        backend.plan(segments)
        there = replace(layer, sinks=None if sinks is None else sinks.to(device))
        got = backend.run(there, q, (k, v))
    except (ValueError, RuntimeError) as error:
        return False, f"it fails: {first_line(error)}"
    # In float32 on the same rounded numbers, so that only the kernel's own error is left.
    exact = SDPA()
    exact.plan(segments)
    q, k, v = (tensor.float().cpu() for tensor in (q, k, v))
    want = exact.run(layer, q, (k, v))
    off = difference(got.cpu(), want)
    if off > tolerance(dtype).kernel:
        return False, f"it is wrong: off by {off:.2g} from float32"
    return True, f"within {off:.1g} of float32 ({str(dtype)[6:]})"


def _geometry(spec: LayerSpec, device: torch.device, dtype: torch.dtype) -> Geometry:
    return Geometry((spec,), 320, 4, 4, 512, dtype, device)
