"""torch's scaled_dot_product_attention: portable, and the reference.

One call per sequence on a CPU; on a GPU, where calls are expensive, one for many decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from batchrun.engine.attention import (
    KV,
    AttentionBackend,
    Geometry,
    LayerAttention,
    Upload,
    explicit,
)
from batchrun.engine.attention.explicit import Problem, blocks, mask
from batchrun.engine.attention.gathered import Decodes
from batchrun.engine.core import Segment
from batchrun.engine.transfers import copied


def unsupported_reason(geometry: Geometry, name: str, *, compiled: bool) -> str | None:
    """None: it serves every model everywhere."""
    return None


def make(geometry: Geometry, upload: Upload | None, log: Callable[[str], None], name: str) -> SDPA:
    """See `attention.create`."""
    return SDPA(upload)


class SDPA(AttentionBackend):
    """Reads each slot in place through a strided view, except for decodes that it batches.

    Its allocations are bounded whatever the lengths: see `explicit.SCORES`, `gathered.NUMBERS`.

    Args:
        upload: How arrays get to the device; by default a synchronous copy.
        batched: Whether many decodes are one call, over gathered keys and values, so that the last
            bits depend on the batch; by default only on a GPU.
    """

    name = "sdpa"
    max_query = 1  # on a CPU, even single tokens are a call each

    def __init__(self, upload: Upload | None = None, *, batched: bool | None = None) -> None:
        self._upload = upload
        self._batched = batched
        self.plan(())

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        """Remember the step's segments."""
        if fixed:
            raise ValueError("sdpa takes lengths as shapes, which a CUDA graph would freeze")
        self._segments = segments
        self._decodes: Decodes | None = None

    def run(
        self, layer: LayerAttention, query: torch.Tensor, slots: KV, new: KV | None = None
    ) -> torch.Tensor:
        """See `AttentionBackend.run`."""
        keys, values = slots
        out = query.new_empty(*query.shape[:2], values.shape[-1])
        on_cpu = query.device.type == "cpu"
        batched = not on_cpu if self._batched is None else self._batched
        done = self._run_batched(layer, query, slots, out) if batched else frozenset()
        attend = partial(_attend, by_group=batched) if _plain(layer) else explicit.attend
        decodes = sum(s.length == 1 for s in self._segments)
        offset = 0
        with _one_thread(on_cpu and decodes > 1) as all_threads:
            for i, segment in enumerate(self._segments):
                if i == decodes:
                    all_threads()
                if i not in done:
                    for first, begin, end in _parts(layer, segment):
                        k, v = keys[segment.slot, first:end], values[segment.slot, first:end]
                        part = slice(offset + begin - segment.start, offset + end - segment.start)
                        attend(layer, (query[part], k, v, out[part]))
                offset += segment.length
        return out

    def _run_batched(
        self, layer: LayerAttention, query: torch.Tensor, slots: KV, out: torch.Tensor
    ) -> frozenset[int]:
        """Compute the decodes that can be batched; returns the indices of these segments."""
        if self._decodes is None:
            self._decodes = Decodes(
                self._segments, self._upload or partial(copied, device=query.device)
            )
        keys, values = slots
        numbers = keys.shape[2] * (keys.shape[3] + values.shape[3])
        buckets, done = self._decodes.buckets(layer, keys.shape[1], numbers)
        for bucket in buckets:
            k, v = bucket.gather(keys), bucket.gather(values)
            q = query[bucket.members].unflatten(1, (k.shape[1], -1))  # [n, Hkv, G, D]
            seen = bucket.seen[:, None, None]
            if _plain(layer):
                got = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=layer.scale)
            else:
                hidden = ~seen[:, :, None]
                got = explicit.weighed(layer, q[:, :, :, None], k, v, hidden)[:, :, :, 0]
            out[bucket.members] = got.flatten(1, 2)
        return done


def _parts(layer: LayerAttention, segment: Segment) -> Iterator[tuple[int, int, int]]:
    """A segment's tokens `[begin, end)` and the first key that they see, chunk by chunk."""
    begin, last = segment.start, segment.start + segment.length
    if layer.chunk is None:
        yield 0 if layer.window is None else max(0, begin - layer.window + 1), begin, last
        return
    while begin < last:
        first = begin - begin % layer.chunk
        end = min(last, first + layer.chunk)
        yield first, begin, end
        begin = end


def _plain(layer: LayerAttention) -> bool:
    return layer.softcap is None and layer.sinks is None


@contextmanager
def _one_thread(wanted: bool) -> Iterator[Callable[[], None]]:
    """Compute on one thread until the yielded function is called or the block ends.

    A decode is a few microseconds of work: waking and joining threads for each costs more than it
    gains, and a hundred times more if other processes want the cores too.
    """
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield lambda: torch.set_num_threads(threads)
    finally:
        torch.set_num_threads(threads)


def _attend(layer: LayerAttention, problem: Problem, *, by_group: bool) -> None:
    """Compute one segment with torch's kernels.

    A CPU's fused kernel supports grouped heads of equal widths. On a GPU only flash attention does,
    so with `by_group` the query heads that share a key head are separate entries of the batch, over
    one view of the keys with stride 0. Heads must not be such a view: for a single query the
    memory-efficient kernel would take the heads for queries, and read the wrong row of the mask.
    """
    widths = [tensor.shape[-1] for tensor in problem[1:3]]
    # Otherwise no tiled kernel fits.
    tiled = all(n % 8 == 0 for n in widths) if by_group else widths[0] == widths[1]
    if tiled and len(problem[0]) == 1:
        _single(layer, *problem)
        return
    for q, k, v, out in _calls(layer, problem, tiled=tiled):
        if len(q) == 1:
            _single(layer, q, k, v, out)
            continue
        keys, values = (tensor.transpose(0, 1)[None] for tensor in (k, v))
        if by_group:
            folded = q.unflatten(1, (k.shape[1], -1)).permute(2, 1, 0, 3)  # [G, Hkv, t, Dk]
            shared = (tensor.expand(len(folded), -1, -1, -1) for tensor in (keys, values))
            got = _of_queries(layer, folded, *shared)
            out.copy_(got.permute(2, 1, 0, 3).flatten(1, 2))
        else:
            gqa = q.shape[1] != k.shape[1]
            got = _of_queries(layer, q.transpose(0, 1)[None], keys, values, enable_gqa=gqa)
            out.copy_(got[0].transpose(0, 1))


def _single(
    layer: LayerAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
) -> None:
    """Compute a problem of one query.

    Query heads that share a key head become its queries: nothing to repeat, no mask.
    """
    _, num_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    folded = q.view(1, num_kv_heads, num_heads // num_kv_heads, dim)
    keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    got = scaled_dot_product_attention(folded, keys, values, scale=layer.scale)
    out.copy_(got.reshape(1, num_heads, -1))


def _of_queries(
    layer: LayerAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: bool
) -> torch.Tensor:
    """Attention for the last `t` tokens of sequences: `[n, H, t, D]` over `[n, Hkv, s, D]`."""
    length, total = q.shape[2], k.shape[2]
    causal = _is_causal(layer, length, total)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if causal else mask(layer, length, total, q.device),
        is_causal=causal,
        scale=layer.scale,
        **options,
    )


def _calls(layer: LayerAttention, problem: Problem, *, tiled: bool) -> Iterator[Problem]:
    """Split a segment into calls with bounded allocations; none if this already computed it.

    A `tiled` kernel allocates only its mask, if it needs one. The fallback kernel stores all scores
    and repeats the keys for each query head, so it only takes small segments.
    """
    q, k = problem[:2]
    heads, length, total = q.shape[1], len(q), len(k)
    if tiled and _is_causal(layer, length, total):
        yield problem
    elif tiled or heads * total * max(length, q.shape[2]) <= explicit.SCORES:
        yield from blocks(layer, problem, 1)
    else:
        explicit.attend(layer, problem)


def _is_causal(layer: LayerAttention, length: int, total: int) -> bool:
    """Whether the kernels' own mask, aligned to the top left, is the right one."""
    return length == total and (layer.window is None or total <= layer.window)
