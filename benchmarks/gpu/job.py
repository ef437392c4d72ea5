"""A whole job: nano-vllm's load through the engine, with overlap and without."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import TOY_LOAD, Load, Shape
from benchmarks.gpu.steps import add, assembled, drain, measured

if TYPE_CHECKING:
    from batchrun.engine.build import Assembly


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """The measured job, each choice the other way, and the job with every mapping in the open."""
    shape, load = bench.shape("qwen3-0.6b"), TOY_LOAD if bench.toy else Load()
    settings = settings_of(bench, load)
    with ready(bench, shape, load, settings) as (assembly, seconds):
        found = {"ready_s": seconds} | measured(bench, assembly, shape, load.lengths())
        sizes = {k: settings[k] for k in ("max_num_seqs", "max_num_batched_tokens")}
        yield {"load": {"shape": shape.name, **asdict(load), **sizes}} | found
        choices: list[dict[str, Any]] = []
        for name, choice in others(assembly):
            with choice:
                choices.append({"choice": name} | measured(bench, assembly, shape, load.lengths()))
            yield {"choices": choices}
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


def others(assembly: Assembly) -> Iterator[tuple[str, Any]]:
    """What the engine was made to do, each the other way."""
    arena, executor = assembly.arena, assembly.executor
    yield "no pages created ahead", patch.object(arena.pool, "stock")
    yield "no unused pages kept", patch.object(arena, "slack", 0.0)
    yield "decode steps recorded in pieces only", patch.object(executor, "graphs", None)


@contextmanager
def ready(
    bench: Bench, shape: Shape, load: Load, settings: dict[str, Any]
) -> Iterator[tuple[Assembly, float]]:
    """An engine that has done a small job, which visits every batch size; and when it was made."""
    began = time.perf_counter()
    with assembled(bench, shape, **settings) as assembly:
        seconds = time.perf_counter() - began
        seqs = settings["max_num_seqs"]
        add(assembly, shape, [(load.shortest, 1 + row // 4) for row in range(seqs)])
        drain(assembly)
        yield assembly, seconds


def measure(bench: Bench, shape: Shape, load: Load, settings: dict[str, Any]) -> dict[str, Any]:
    """One job through an engine of its own."""
    with ready(bench, shape, load, settings) as (assembly, seconds):
        return {"ready_s": seconds} | measured(bench, assembly, shape, load.lengths())
