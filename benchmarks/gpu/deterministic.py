"""What --deterministic costs, and whether a row's bits are the same beside other rows.

A quarter of Llama-3-8B's layers, so that two engines fit into the part's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from batchrun.engine.build import Assembly
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.model import rowwise
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import Shape, prompt
from benchmarks.gpu.steps import assembled, decode, prefill

TOKENS = (1, 16, 64, 256, 1024, 8192)
SHAPES = ((14336, 4096), (4096, 14336))  # rows and columns of weights

Answer = tuple[tuple[int, ...], tuple[Any, ...]]  # tokens, and their log-probabilities


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Linear layers by themselves; then an engine without, and one with `deterministic`."""
    if not bench.toy:  # a CPU has no such product
        yield {"linear": [linear(bench, *size, n) for size in SHAPES for n in TOKENS]}
    shape = bench.shape("llama-3-8b")
    shape = replace(shape, layers=max(2, shape.layers // 4))
    chunk, size = bench.size(8192, 64), bench.size(1024, 32)
    found: list[dict[str, Any]] = []
    for wanted in (False, True):
        with assembled(
            bench,
            shape,
            max_num_seqs=bench.size(256, 8),
            max_num_batched_tokens=chunk,
            max_model_len=bench.size(4096, 128),
            deterministic=wanted and not bench.toy,
        ) as assembly:
            row: dict[str, Any] = {"deterministic": wanted, "kernels": assembly.kernels}
            row |= prefill(bench, assembly, shape, chunk, size)
            row |= decode(bench, assembly, shape, size)
            found.append(row | differing(bench, assembly, shape))
        yield {"shape": shape.name, "layers": shape.layers, "steps": found}
    if found[-1]["differ"] and not bench.toy:
        raise RuntimeError(f"{found[-1]['differ']} rows came out otherwise in another batch")


def linear(bench: Bench, n: int, k: int, tokens: int) -> dict[str, Any]:
    """Microseconds of a layer by torch and row by row, and whether the bits are a row's own."""
    draw = partial(torch.randn, dtype=torch.bfloat16, device=bench.device)
    x, weight = draw(tokens, k), draw(n, k)
    own = partial(rowwise.linear, x, weight, None, None)
    some = slice(tokens // 3, tokens // 3 + 5)
    return {
        "rows": n,
        "columns": k,
        "tokens": tokens,
        "torch_us": 1e6 * bench.timed(lambda: functional.linear(x, weight)),
        "rowwise_us": 1e6 * bench.timed(own),
        "same": torch.equal(rowwise.linear(x[some], weight, None, None), own()[some]),
    }


def differing(bench: Bench, assembly: Assembly, shape: Shape) -> dict[str, int]:
    """How many rows have other bits when few run at a time, in small chunks, in reverse."""
    scheduler = assembly.scheduler
    usual = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    rows = range(bench.size(48, 6))
    together = answers(bench, assembly, shape, list(rows))
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 3, bench.size(300, 16)
    apart = answers(bench, assembly, shape, list(reversed(rows)))
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = usual
    return {"compared": len(rows), "differ": sum(together[row] != apart[row] for row in rows)}


def answers(bench: Bench, assembly: Assembly, shape: Shape, rows: list[int]) -> dict[int, Answer]:
    """What rows of all lengths come out as; a third of them begin alike."""
    longest, out = bench.size(2500, 60), bench.size(32, 4)
    found: dict[int, Answer] = {}
    for row in rows:
        own = prompt(1 + row * (longest // 2) // len(rows), shape.vocab, row)
        common = prompt(longest // 2, shape.vocab, 0) if row % 3 == 0 else ()
        params = SamplingParams(max_tokens=out, ignore_eos=True, temperature=0.8, logprobs=0)
        assembly.engine.add(Request(row, 0, (*common, *own), params, 1))
    while assembly.engine.has_work:
        for done in assembly.engine.step():
            found[done.request.row] = done.token_ids, done.logprobs
    return found
