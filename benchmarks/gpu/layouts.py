"""Contiguous slots against 16-token pages, with the same kernels: vAttention's central claim.

The same keys and values, attended through batchrun's backends over slots and through FlashInfer
over pages of its own that lie scattered (https://arxiv.org/abs/2405.04437, section 7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.bench import Bench, Unavailable
from benchmarks.gpu.slots import Slots, filled

PAGE = 16
LAYERS = 4  # attended in turn, so that no layer's keys and values stay in the cache
Attend = Callable[[int], torch.Tensor]  # layer -> [T, Hq, D]

PREFILLS = ("torch-flash", "flashinfer-fa2", "flashinfer-fa3")
DECODES = PREFILLS[:2]  # the third shares the second's
WORKLOADS = (  # sequences, tokens of each, queries of each
    (256, 1024, 1),
    (16, 16384, 1),
    (1, 2048, 2048),
    (1, 8192, 8192),
    (1, 32768, 32768),
    (1, 131072, 131072),
)
TOY_WORKLOADS = ((3, 100, 1), (1, 64, 64))


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Seconds a layer for each workload, backend and layout."""
    shape = bench.shape("llama-3-8b")
    found: list[dict[str, Any]] = []
    for count, tokens, queries in TOY_WORKLOADS if bench.toy else WORKLOADS:
        with filled(bench, shape, count, tokens, shape.layers) as slots:
            # Neighbouring tokens' pages lie anywhere, as in a cache that has been used a while.
            pages = Pages(slots)
            kernels = DECODES if queries == 1 else PREFILLS
            for name in ("sdpa",) if bench.toy else kernels:
                case = {"sequences": count, "tokens": tokens, "queries": queries, "backend": name}
                found.append(case | attempt(bench, slots, pages, name, queries))
            yield {"shape": shape.name, "page_tokens": PAGE, "layouts": found}
            del pages


class Pages:
    """The tokens of the slots again, in scattered pages of `PAGE` tokens.

    `pools` are a layer's K and V, `[pages, PAGE, Hkv, D]`; `table[i]` the pages of slot i in order.
    """

    def __init__(self, slots: Slots) -> None:
        device, count, tokens = slots.bench.device, slots.count, slots.tokens
        each = -(-tokens // PAGE)
        order = torch.randperm(count * each, device=device)
        self.table = order.view(count, each).to(torch.int32)
        self.pools: list[tuple[torch.Tensor, torch.Tensor]] = []
        for pair in slots.views[:LAYERS]:
            made = []
            for view in pair:
                padded = view.new_zeros(count, each * PAGE, *view.shape[2:])
                padded[:, :tokens] = view[:, :tokens]
                pool = torch.empty_like(padded).view(count * each, PAGE, *view.shape[2:])
                pool[order] = padded.view_as(pool)
                made.append(pool)
            self.pools.append((made[0], made[1]))
        self.last = tokens - (each - 1) * PAGE  # tokens in each slot's last page


def attempt(
    bench: Bench, slots: Slots, pages: Pages, name: str, queries: int
) -> dict[str, float | str]:
    """As `compare`, or why it can't be had: one library's failure costs the others nothing."""
    try:
        return compare(bench, slots, pages, name, queries)
    except (Unavailable, RuntimeError, ValueError, TypeError) as error:
        return {"reason": (str(error).strip() or repr(error)).splitlines()[0]}


def compare(
    bench: Bench, slots: Slots, pages: Pages, name: str, queries: int
) -> dict[str, float | str]:
    """Seconds a layer in both layouts, and how far apart their results are."""
    query = slots.query(queries)
    layers = range(min(LAYERS, len(slots.views)))
    backend = slots.backend(name, queries)

    def contiguous(layer: int) -> torch.Tensor:
        return backend.run(slots.layer, query, slots.views[layer])

    def timed(attend: Attend) -> float:
        calls = bench.timed(lambda: [attend(layer) for layer in layers], repeat=5, warmup=1)
        return calls / len(layers)

    found: dict[str, float | str] = {"contiguous_s": timed(contiguous)}
    if name in PAGED:
        paged = PAGED[name](slots, pages, query, queries)
        found["paged_s"] = timed(paged)
        left, right = contiguous(0).float(), paged(0).float()
        found["difference"] = float((left - right).norm() / right.norm())
    return found


def gathered(slots: Slots, pages: Pages, query: torch.Tensor, queries: int) -> Attend:
    """Pages in plain torch, for the rehearsal: what the table says, copied together."""

    def attend(layer: int) -> torch.Tensor:
        outputs = []
        for i, table in enumerate(pages.table):
            k, v = (
                pool[table.long()].flatten(0, 1)[: slots.tokens].transpose(0, 1)
                for pool in pages.pools[layer]
            )
            q = query[i * queries : (i + 1) * queries].transpose(0, 1)
            got = scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=queries > 1, enable_gqa=True
            )
            outputs.append(got[0].transpose(0, 1))
        return torch.cat(outputs)

    return attend


def flashinfer(kind: str) -> Callable[[Slots, Pages, torch.Tensor, int], Attend]:
    """FlashInfer over its own paged layout, with the kernels of that kind."""

    def make(slots: Slots, pages: Pages, query: torch.Tensor, queries: int) -> Attend:
        from flashinfer import (  # noqa: PLC0415 - only where its backend is there
            BatchDecodeWithPagedKVCacheWrapper,
            BatchPrefillWithPagedKVCacheWrapper,
        )

        count, each = pages.table.shape
        workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=query.device)
        indptr = torch.arange(count + 1, dtype=torch.int32) * each
        last = torch.full((count,), pages.last, dtype=torch.int32)
        table = pages.table.flatten()
        heads, kv_heads, dim = query.shape[1], pages.pools[0][0].shape[2], query.shape[2]
        types = {"q_data_type": query.dtype, "kv_data_type": query.dtype}
        if queries == 1:
            decode = BatchDecodeWithPagedKVCacheWrapper(
                workspace, use_tensor_cores=True, backend=kind
            )
            decode.plan(indptr, table, last, heads, kv_heads, dim, PAGE, **types)
            return lambda layer: decode.run(query, pages.pools[layer])
        prefill = BatchPrefillWithPagedKVCacheWrapper(workspace, backend=kind)
        rows = torch.arange(count + 1, dtype=torch.int32) * queries
        prefill.plan(rows, indptr, table, last, heads, kv_heads, dim, PAGE, causal=True, **types)
        return lambda layer: prefill.run(query, pages.pools[layer])

    return make


PAGED = {
    "sdpa": gathered,
    "flashinfer-fa2": flashinfer("fa2"),
    "flashinfer-fa3": flashinfer("fa3"),
}
