"""A whole job: nano-vllm's load through the engine, with overlap and without."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import TOY_LOAD, Load, Shape
from benchmarks.gpu.steps import add, assembled, drain


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """The measured job, then the same one with every mapping in the open."""
    shape, load = bench.shape("qwen3-0.6b"), TOY_LOAD if bench.toy else Load()
    settings = settings_of(bench, load)
    found = measure(bench, shape, load, settings)
    sizes = {k: settings[k] for k in ("max_num_seqs", "max_num_batched_tokens")}
    yield {"load": {"shape": shape.name, **asdict(load), **sizes}} | found
    gc.collect()
    if not bench.toy:
        torch.cuda.empty_cache()
    without = measure(bench, shape, load, settings | {"overlap": False})
    names = ("exposed", "hidden", "idle", "tokens_per_s")
    yield {f"{name}_without_overlap": without[name] for name in names}


def settings_of(bench: Bench, load: Load) -> dict[str, Any]:
    """The engine's settings for the load."""
    return {
        "max_num_seqs": bench.size(256, 8),
        "max_num_batched_tokens": bench.size(8192, 64),
        "max_model_len": 2 * load.longest,
    }


def measure(bench: Bench, shape: Shape, load: Load, settings: dict[str, Any]) -> dict[str, Any]:
    """One job through an engine of its own, after a small one that visits every batch size."""
    began = time.perf_counter()
    with assembled(bench, shape, **settings) as assembly:
        ready = time.perf_counter() - began
        seqs = settings["max_num_seqs"]
        add(assembly, shape, [(load.shortest, 1 + row // 4) for row in range(seqs)])
        drain(assembly)
        before = assembly.measurements()
        add(assembly, shape, load.lengths())
        bench.synchronise()
        began = time.perf_counter()
        tokens = drain(assembly)
        bench.synchronise()
        seconds = time.perf_counter() - began
        after = assembly.measurements()
        gone = {k: v - before[k] for k, v in after.items() if isinstance(v, float | int)}
        wanted = sum(out for _, out in load.lengths())
        if tokens != wanted:
            raise RuntimeError(f"{tokens} tokens came out, {wanted} were asked for")
        return {
            "ready_s": ready,
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "steps": gone["steps"],
            "exposed": gone["map_exposed_s"] / seconds,
            "hidden": gone["map_hidden_s"] / seconds,
            "stalls": gone["map_stalls"],
            "utilisation": gone["kv_live_s"] / gone["kv_mapped_s"],
            "idle": gone["idle_s"] / seconds,
            "device_s": gone["device_s"],
            "preemptions": gone["preemptions"],
            "recomputed": gone["recomputed_tokens"],
        }
