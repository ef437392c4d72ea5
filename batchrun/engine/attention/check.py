"""A small case for each backend, against SDPA in float32: what works on this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from batchrun.engine import attention
from batchrun.engine.attention import Geometry, LayerAttention, LayerSpec
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.core import Request, SamplingParams, Segment, Sequence

_HEADS, _KV_HEADS, _DIM = 4, 2, 128  # the usual width: its kernels are compiled first
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def check(name: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Run a backend over slots with decodes, a chunk and a whole prompt in one step.

    Kernels that would have to be compiled are not.

    Returns:
        Whether it works, and the largest difference from float32, or why it does not work.
    """
    spec = LayerSpec(_HEADS, _KV_HEADS, _DIM, _DIM, _DIM**-0.5)
    segments = [_segment(0, 299, 1), _segment(1, 0, 1), _segment(2, 20, 100), _segment(3, 0, 70)]
    geometry = Geometry((spec,), 320, len(segments), len(segments), 512, dtype, device)
    reason = attention.why_not(name, geometry, compiled=True)
    if reason is not None:
        return False, reason

    def upload(array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(device)

    generator = torch.Generator().manual_seed(0)
    tokens = sum(segment.length for segment in segments)
    query = torch.randn(tokens, _HEADS, _DIM, generator=generator)
    keys, values = torch.randn(2, len(segments), 320, _KV_HEADS, _DIM, generator=generator)
    tensors = [tensor.to(device, dtype) for tensor in (query, keys, values)]
    layer = LayerAttention(spec.scale)
    try:
        backend = attention.create(name, geometry, upload)
        got = _run(backend, segments, layer, tensors)
    except (ValueError, RuntimeError) as error:
        return False, f"it fails: {str(error).strip().splitlines()[0]}"
    # float32 of the same rounded numbers, so that only the kernel's own error is left.
    expected = _run(SDPA(), segments, layer, [tensor.float().cpu() for tensor in tensors])
    difference = float((got.float().cpu() - expected).abs().max())
    if not difference <= _TOLERANCE[dtype]:
        return False, f"it is wrong: {difference:.2g} from float32"
    return True, f"{difference:.1g} from float32, in {str(dtype)[6:]}"


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
