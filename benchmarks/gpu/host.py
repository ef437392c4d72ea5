"""What a step costs the host: small steps, which the device ends before the host has the next."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.steps import add, assembled, drain

if TYPE_CHECKING:
    from batchrun.engine.build import Assembly

_SHOWN = 15  # functions


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Decode steps of several sizes, then the functions that most of their time is spent in."""
    shape = bench.shape("qwen3-0.6b")
    count, prompt = bench.size(100, 4), bench.size(100, 8)
    sizes = (1, 4, 8) if bench.toy else (1, 16, 64, 256)
    with assembled(
        bench,
        shape,
        max_num_seqs=sizes[-1],
        max_num_batched_tokens=bench.size(8192, 64),
        max_model_len=bench.size(2048, 128),
    ) as assembly:
        found: list[dict[str, Any]] = []
        for seqs in sizes:
            add(assembly, shape, [(prompt, 3 * count + 24)] * seqs)
            while len(assembly.scheduler.running) < seqs or not _all_decode(assembly):
                assembly.engine.step()
            _steps(assembly, count // 2)
            found.append({"sequences": seqs} | _timed(assembly, count))
            yield {"shape": shape.name, "host": found}
            if seqs == sizes[-1]:
                yield {"functions": profiled(lambda: _steps(assembly, count), count)}
            drain(assembly)


def _all_decode(assembly: Assembly) -> bool:
    return all(s.num_computed_tokens >= s.num_prompt_tokens for s in assembly.scheduler.running)


def _steps(assembly: Assembly, count: int) -> None:
    for _ in range(count):
        assembly.engine.step()


def _timed(assembly: Assembly, count: int) -> dict[str, float]:
    """Seconds of one step by the clock, in the device, and between two of them."""
    stats = assembly.engine.stats
    before = time.perf_counter(), stats.device_s, stats.idle_s
    _steps(assembly, count)
    after = time.perf_counter(), stats.device_s, stats.idle_s
    wall, device, idle = ((b - a) / count for a, b in zip(before, after, strict=True))
    return {"step_s": wall, "device_s": device, "idle_s": idle}


def profiled(call: Callable[[], object], steps: int) -> list[dict[str, Any]]:
    """Functions by their own time, in microseconds a step; profiling itself slows them down."""
    profile = cProfile.Profile()
    profile.runcall(call)
    rows = [
        {"function": f"{Path(file).name}:{name}", "calls": calls / steps, "us": 1e6 * own / steps}
        for (file, _, name), (_, calls, own, _, _) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    ]
    return sorted(rows, key=lambda row: -row["us"])[:_SHOWN]
