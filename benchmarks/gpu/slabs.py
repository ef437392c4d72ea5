"""How many layers should share a slab: what decode attention gains, what partly full pages lose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batchrun.allocator.layout import KVLayout
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import TOY_LOAD, Load
from benchmarks.gpu.slots import Slots, filled


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """One pass of decode attention over all layers, with 1, some and all of them to a slab."""
    shape = bench.shape("llama-3-8b")
    count, tokens = bench.size(256, 4), bench.size(1024, 100)
    found: list[dict[str, Any]] = []
    for layers_per_slab in (shape.layers, bench.size(8, 2), 1):
        with filled(bench, shape, count, tokens, layers_per_slab) as slots:
            found.append(
                {"layers_per_slab": layers_per_slab}
                | attend(bench, slots)
                | waste(bench, slots.layout, tokens)
            )
        yield {"shape": shape.name, "sequences": count, "tokens": tokens, "slabs": found}


def attend(bench: Bench, slots: Slots) -> dict[str, Any]:
    """Seconds of decode attention a layer, and the bytes a second of keys and values."""
    backend, query = slots.backend(bench.attention, 1), slots.query(1)

    def all_layers() -> None:
        for views in slots.views:
            backend.run(slots.layer, query, views)

    layers = len(slots.views)
    seconds = bench.timed(all_layers, repeat=10) / layers
    kv_bytes = slots.count * slots.tokens * slots.shape.kv_bytes_per_token / layers
    return {"attention": backend.name, "layer_s": seconds, "bandwidth": kv_bytes / seconds}


def waste(bench: Bench, layout: KVLayout, tokens: int) -> dict[str, float]:
    """The share of mapped bytes that hold no token: at that length, and over the job's lengths."""
    load = TOY_LOAD if bench.toy else Load()
    lengths = [min(sum(pair), layout.max_tokens) for pair in load.lengths()]

    def share(lengths: list[int]) -> float:
        mapped = sum(layout.total_pages_for(n) for n in lengths) * layout.page_size
        return sum(map(layout.waste_bytes, lengths)) / mapped

    return {"waste": share([tokens]), "waste_of_load": share(lengths)}
