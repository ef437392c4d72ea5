"""The job with far less KV memory than it would take: sequences must give way, and come back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.job import measure, settings_of
from benchmarks.gpu.shapes import Load


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """All tokens must come out, and some of them be computed twice."""
    shape, load = bench.shape("qwen3-0.6b"), Load(8, 30, 60) if bench.toy else Load()
    budget = bench.size(8 << 30, 160 << 10)
    small = {"kv_budget": budget, "page_size": 4096 if bench.toy else None}
    found = measure(bench, shape, load, settings_of(bench, load) | small)
    yield {"shape": shape.name, **asdict(load), "kv_budget": budget} | found
    if not found["preemptions"]:
        raise RuntimeError(f"no sequence gave way with {budget:,} bytes of KV memory")
