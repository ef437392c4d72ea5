"""A small case for each backend, against SDPA in float32: what works on this machine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from batchrun.engine import attention
from batchrun.engine.attention import Geometry, LayerAttention, LayerSpec
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.core import Request, SamplingParams, Segment, Sequence
from batchrun.engine.transfers import copied

_PLAIN = LayerSpec(4, 2, 128, 128, 128**-0.5)  # the usual width: its kernels are compiled first
KINDS = {
    "grouped heads (llama, qwen3)": _PLAIN,
    "a sliding window (mistral, gemma3_text)": replace(_PLAIN, window=40),
    "soft caps (gemma2)": replace(_PLAIN, softcap=50.0),
    "sinks (gpt_oss)": replace(_PLAIN, k_dim=64, v_dim=64, window=40, sinks=True),
    "chunks (llama4_text)": replace(_PLAIN, chunk=64),
    "keys wider than values (deepseek_v3)": LayerSpec(4, 4, 192, 128, 192**-0.5),
}
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def check_kinds(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[bool, str]]:
    """What `auto` takes for each kind of attention, by the models that have it.

    Returns:
        Whether that is a kernel made for it, and not `sdpa`, which serves everything and is slow
        on a GPU; and what it is, with what `check` says of it.
    """
    found = {}
    for kind, spec in KINDS.items():
        geometry = _geometry(spec, device, dtype)
        for name in (*attention.candidates(geometry), "sdpa"):
            works, what = check(name, device, dtype, spec)
            if works or name == "sdpa":
                found[kind] = (name != "sdpa", f"{name}, {what}")
                break
    return found


def check(
    name: str, device: torch.device, dtype: torch.dtype, spec: LayerSpec = _PLAIN
) -> tuple[bool, str]:
    """Run a backend over slots with decodes, a chunk and a whole prompt in one step.

    Kernels that would have to be compiled are not.

    Args:
        name: The backend's.
        device: Where it is to run.
        dtype: Of queries, keys and values.
        spec: The layer.

    Returns:
        Whether it works, and the largest difference from float32, or why it does not work.
    """
    segments = [_segment(0, 299, 1), _segment(1, 0, 1), _segment(2, 20, 100), _segment(3, 0, 70)]
    geometry = _geometry(spec, device, dtype)
    reason = attention.unsupported_reason(name, geometry, compiled=True)
    if reason is not None:
        return False, reason

    generator = torch.Generator().manual_seed(0)
    tokens = sum(segment.length for segment in segments)
    slots = len(segments), geometry.slot_tokens, spec.kv_heads
    shapes = (tokens, spec.q_heads, spec.k_dim), (*slots, spec.k_dim), (*slots, spec.v_dim)
    tensors = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    sinks = torch.randn(spec.q_heads, generator=generator).to(dtype) if spec.sinks else None
    layer = LayerAttention(spec.scale, spec.window, spec.softcap, sinks, spec.chunk)
    try:
        backend = attention.create(name, geometry, partial(copied, device=device))
        there = replace(layer, sinks=None if sinks is None else sinks.to(device))
        got = _run(backend, segments, there, tensors)
    except (ValueError, RuntimeError) as error:
        return False, f"it fails: {str(error).strip().splitlines()[0]}"
    # float32 of the same rounded numbers, so that only the kernel's own error is left.
    expected = _run(SDPA(), segments, layer, [tensor.float().cpu() for tensor in tensors])
    difference = float((got.float().cpu() - expected).abs().max())
    if not difference <= _TOLERANCE[dtype]:
        return False, f"it is wrong: {difference:.2g} from float32"
    return True, f"{difference:.1g} from float32, in {str(dtype)[6:]}"


def _geometry(spec: LayerSpec, device: torch.device, dtype: torch.dtype) -> Geometry:
    return Geometry((spec,), 320, 4, 4, 512, dtype, device)


def _run(
    backend: attention.AttentionBackend,
    segments: list[Segment],
    layer: LayerAttention,
    tensors: list[torch.Tensor],
) -> torch.Tensor:
    backend.plan(segments)
    return backend.run(layer, *tensors)


def _segment(slot: int, start: int, length: int) -> Segment:
    request = Request(slot, 0, (0,), SamplingParams(), 0)
    return Segment(Sequence(request), slot, start, length, sampled=True)
