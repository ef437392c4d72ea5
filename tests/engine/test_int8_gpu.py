"""The kernel for 8-bit weights as far as a CPU can tell: its tiles, and its sums by interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product

import pytest
import torch

from batchrun.engine.model.int8 import tile_for

INTERPRETED = """
import torch
from batchrun.engine.model.int8 import Tile, launch

torch.manual_seed(0)
for t, n, k, tile in (
    (1, 40, 64, Tile(32, 16, 64)),
    (17, 64, 96, Tile(16, 32, 64)),
    (5, 33, 256, Tile(16, 16, 128)),
    (70, 130, 100, Tile(64, 64, 64)),
    (300, 140, 64, Tile(128, 256, 64)),
):
    for bias in (None, torch.randn(n).half()):
        x = torch.randn(t, k + 8).half()[:, :k]
        weight, scales = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) / 50
        want = x.double() @ (weight.double() * scales.double()[:, None]).T
        want = want if bias is None else want + bias.double()
        got = launch(x, weight, scales, bias, tile)
        assert float((got - want).abs().max()) <= 1e-3 * float(want.abs().max())
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
def test_the_kernel_is_right_when_interpreted() -> None:
    """In float16: the interpreter knows no products of bfloat16."""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=env)


H100, A10 = (132, 227 << 10), (72, 99 << 10)  # multiprocessors, and shared memory of each


@pytest.mark.parametrize("device", [H100, A10])
def test_tiles_fit_what_they_compute(device: tuple[int, int]) -> None:
    for tokens, rows in product((1, 16, 17, 64, 65, 256, 257, 1024), (64, 1024, 4096, 128_256)):
        tile = tile_for(tokens, rows, *device)
        assert tile.t >= min(tokens, 64)
        assert tile.shared <= device[1]


def test_tiles_are_those_that_were_fastest() -> None:
    """On an H100, of the tiles that were tried (benchmarks/results/gpu-*.json, `also`)."""
    for tokens, rows, fastest in (
        (16, 14336, (32, 16, 256)),
        (64, 14336, (64, 64, 128)),
        (256, 14336, (128, 256, 64)),
        (1024, 14336, (128, 256, 64)),
        (16, 4096, (32, 16, 256)),
        (256, 4096, (64, 128, 64)),
        (1024, 4096, (128, 256, 64)),
    ):
        tile = tile_for(tokens, rows, *H100)
        assert (tile.n, tile.t, tile.k) == fastest, (tokens, rows)


def test_its_shape_is_known_without_computing() -> None:
    x, weight = torch.empty(1, 7, 64, device="meta"), torch.empty(40, 64, device="meta")
    got = torch.ops.batchrun.int8_linear(x, weight.char(), weight[:, 0], None)
    assert (got.shape, got.dtype) == ((1, 7, 40), x.dtype)
