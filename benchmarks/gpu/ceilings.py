"""What the device can do: bytes copied a second, bf16 operations a second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.part import query


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Both ceilings, and the clocks just after the heavier one."""
    yield {"bandwidth": bandwidth(bench)}
    yield {"matrix": matrix_rate(bench)}
    if not bench.toy:
        yield {"after": query("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")}


def bandwidth(bench: Bench) -> float:
    """Bytes a second of a large copy on the device, bytes read and bytes written both counted."""
    size = bench.size(8 << 30, 16 << 20)
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * size / bench.timed(lambda: target.copy_(source), repeat=20)


def matrix_rate(bench: Bench) -> float:
    """Operations a second of a square bf16 product of random matrices; zeros would be faster."""
    side = bench.size(8192, 256)
    left, right = (
        torch.randn(side, side, dtype=torch.bfloat16, device=bench.device) for _ in range(2)
    )
    return 2 * side**3 / bench.timed(lambda: left @ right, repeat=30, warmup=10)
