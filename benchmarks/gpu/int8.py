"""Linear layers of 8-bit weights beside bfloat16's, and which tiles are best at which size.

python -m benchmarks.gpu.part int8 --out int8.json     about half a minute on an H100
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from batchrun.engine.model.int8 import Int8Linear, Tile, launch, widened
from benchmarks.gpu.bench import Bench

TOKENS = (1, 16, 64, 256, 1024, 8192)
SHAPES = ((14336, 4096), (4096, 14336))  # Llama 3 8B's MLP: rows and columns of weights
COPIES = 4  # of the weights, used in turn: no cache holds them all
TILES = {
    16: [Tile(n, 16, k, stages=s) for n in (16, 32) for k in (128, 256, 512) for s in (3, 4, 5)],
    64: [
        *(Tile(n, 64, 128, stages=s) for n in (16, 32, 64) for s in (3, 4)),
        *(Tile(n, 64, 256, stages=3) for n in (16, 32)),
    ],
    256: [
        *(Tile(n, 64, 128) for n in (32, 64)),
        *(Tile(64, 128, 64, stages=s) for s in (3, 4)),
        *(Tile(128, t, 64, stages=4) for t in (64, 128)),
        *(Tile(128, t, 64, warps=8, stages=3) for t in (128, 256)),
    ],
    1024: [
        *(Tile(128, t, 64, warps=8, stages=s) for t in (128, 256) for s in (3, 4)),
        Tile(128, 64, 64),
        Tile(64, 256, 64),
    ],
}
TILES[8192] = TILES[1024]


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Microseconds of each way, then of each tile, best first."""
    found: list[dict[str, Any]] = []
    for n, k in SHAPES:
        layers = Layers(bench, bench.size(n, 96), bench.size(k, 64))
        for tokens in TOKENS:
            found.append({"rows": n, "columns": k, "tokens": tokens} | layers.ways(tokens))
            yield {"int8": found}
    if bench.toy:
        return
    swept: list[dict[str, Any]] = []
    for n, k in SHAPES:
        layers = Layers(bench, n, k)
        for tokens in TILES:
            swept.append({"rows": n, "columns": k, "tokens": tokens} | layers.sweep(tokens))
            yield {"int8_tiles": swept}


class Layers:
    """Some layers alike, `[n, k]`, with weights of 8 bits and of 16."""

    def __init__(self, bench: Bench, n: int, k: int) -> None:
        self.bench = bench
        self.k = k
        linear = nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=bench.device)
        eight = [Int8Linear(linear) for _ in range(COPIES)]
        self.eight = [(layer.weight, layer.scales, None) for layer in eight]
        self.modules = eight
        self.sixteen = [linear.weight.data.clone() for _ in range(COPIES)]

    def ways(self, tokens: int) -> dict[str, float]:
        """Microseconds: of bfloat16, as the engine has it, and with weights widened in memory."""
        x = self.input(tokens)
        return {
            "bfloat16_us": self.timed(self.sixteen, lambda w: functional.linear(x, w)),
            "int8_us": self.timed(self.modules, lambda layer: layer(x)),
            "widened_us": self.timed(self.eight, lambda w: widened(x, *w)),
        }

    def sweep(self, tokens: int) -> dict[str, Any]:
        """Microseconds of each tile, the best first."""
        x, found = self.input(tokens), []
        for tile in TILES[tokens]:
            name = f"{tile.n}x{tile.t}x{tile.k} w{tile.warps} s{tile.stages}"
            try:
                found.append((self.timed(self.eight, lambda w, t=tile: launch(x, *w, t)), name))
            except RuntimeError as error:  # more shared memory than there is
                found.append((float("inf"), f"{name}: {type(error).__name__}"))
        return {"tiles": [f"{us:.1f} us {name}" for us, name in sorted(found)]}

    def input(self, tokens: int) -> torch.Tensor:
        """Activations, random."""
        return torch.randn(tokens, self.k, dtype=torch.bfloat16, device=self.bench.device)

    def timed(self, weights: list[Any], call: Callable[[Any], object]) -> float:
        """Microseconds a layer, in a CUDA graph where there is one, as in a decode step."""

        def all_of_them() -> None:
            for weight in weights:
                call(weight)

        replay = all_of_them if self.bench.toy else recorded(all_of_them)
        return self.bench.timed(replay, repeat=10) / len(weights) * 1e6


def recorded(call: Callable[[], None]) -> Callable[[], None]:
    """A graph of the call, so that the host's time is no part of it."""
    with torch.inference_mode():
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph.replay
