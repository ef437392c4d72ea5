"""torch's scaled_dot_product_attention, one call a sequence: portable, and the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.functional import scaled_dot_product_attention

from batchrun.engine.attention import Geometry, LayerAttention, Upload
from batchrun.engine.core import Segment


def why_not(geometry: Geometry, name: str = "sdpa", *, compiled: bool = False) -> str | None:
    """It serves every model everywhere."""
    return None


def make(
    geometry: Geometry | None,
    upload: Upload | None,
    log: Callable[[str], None],
    name: str = "sdpa",
) -> SDPA:
    """It needs to know nothing beforehand."""
    return SDPA()


class SDPA:
    """Reads each slot in place through a strided view; nothing is gathered or padded."""

    name = "sdpa"
    capturable = False  # lengths are shapes here

    def __init__(self) -> None:
        self._segments: Sequence[Segment] = ()

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        """Remember the step's segments."""
        if fixed:
            raise ValueError("sdpa takes lengths as shapes, which a CUDA graph would freeze")
        self._segments = segments

    def run(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """See `AttentionBackend.run`."""
        out = query.new_empty(*query.shape[:2], values.shape[-1])
        plain = layer.softcap is None and layer.sinks is None
        attend = _fused if plain else _explicit
        decodes = sum(s.length == 1 for s in self._segments)
        offset = 0
        with _one_thread(query.device.type == "cpu" and decodes > 1) as all_threads:
            for i, segment in enumerate(self._segments):
                if i == decodes:
                    all_threads()
                end = segment.start + segment.length
                first = 0 if layer.window is None else max(0, segment.start - layer.window + 1)
                q = query[offset : offset + segment.length]
                k, v = keys[segment.slot, first:end], values[segment.slot, first:end]
                attend(layer, q, k, v, out[offset : offset + segment.length])
                offset += segment.length
        return out


@contextmanager
def _one_thread(wanted: bool) -> Iterator[Callable[[], None]]:
    """Compute on one thread, until the yielded function is called or the block ends.

    A decode is a few microseconds of work: waking and joining threads for each costs more than
    they gain, and a hundred times more where other processes want the cores too.
    """
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield lambda: torch.set_num_threads(threads)
    finally:
        torch.set_num_threads(threads)


def _fused(
    layer: LayerAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
) -> None:
    """One segment by the fused kernel: q `[t, Hq, D]`, k and v `[s, Hkv, D]`, out `[t, Hq, Dv]`."""
    length, num_heads, dim = q.shape
    total, num_kv_heads = k.shape[:2]
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if length == 1:
        # Query heads that share a key head become queries of it: nothing to repeat, no mask.
        folded = q.view(1, num_kv_heads, num_heads // num_kv_heads, dim)
        got = scaled_dot_product_attention(folded, k, v, scale=layer.scale)
        out.copy_(got.reshape(1, num_heads, -1))
        return
    causal = length == total and (layer.window is None or total <= layer.window)
    got = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k,
        v,
        attn_mask=None if causal else _mask(layer, length, total, q.device),
        is_causal=causal,
        scale=layer.scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    out.copy_(got[0].transpose(0, 1))


def _explicit(
    layer: LayerAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
) -> None:
    """The same with a score cap (Gemma 2) or attention sinks (Xiao et al. 2023), in plain torch."""
    length, num_heads, dim = q.shape
    total, num_kv_heads = k.shape[:2]
    q = q.view(length, num_kv_heads, num_heads // num_kv_heads, dim).permute(1, 2, 0, 3)
    scores = torch.matmul(q, k.permute(1, 2, 0)[:, None]) * layer.scale  # [Hkv, G, t, s]
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    scores = scores.float().masked_fill(~_mask(layer, length, total, q.device), -torch.inf)
    if layer.sinks is not None:
        sinks = layer.sinks.float().view(num_kv_heads, -1, 1, 1).expand(-1, -1, length, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :total].to(v.dtype)
    got = torch.matmul(weights, v.transpose(0, 1)[:, None])  # [Hkv, G, t, Dv]
    out.copy_(got.permute(2, 0, 1, 3).reshape(length, num_heads, -1))


def _mask(layer: LayerAttention, length: int, total: int, device: torch.device) -> torch.Tensor:
    """Which of `total` keys each of the last `length` positions sees, bool `[length, total]`."""
    mask = torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
    if layer.window is not None:
        mask = mask.triu(total - length - layer.window + 1)
    return mask
