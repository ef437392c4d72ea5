"""The kernel for 8-bit weights as far as a CPU can tell: its tiles, and its sums by interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product

import pytest
import torch

from batchrun.engine.model.int8_gpu import tile_for

INTERPRETED = """
import torch
from batchrun.engine.model.int8_gpu import Tile, launch

torch.manual_seed(0)
for t, n, k, tile in (
    (1, 40, 64, Tile(32, 16, 64)),
    (17, 64, 96, Tile(16, 32, 64)),
    (5, 33, 256, Tile(16, 16, 128)),
    (70, 130, 100, Tile(64, 64, 64)),
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


def test_tiles_fit_what_they_compute() -> None:
    for tokens, rows in product((1, 16, 17, 64, 65, 256, 257, 1024), (64, 1024, 4096, 128_256)):
        tile = tile_for(tokens, rows, 132)
        assert tile.t >= min(tokens, 64)
        # Weights of one byte and activations of two, for each stage: less than an A10's 99 KiB.
        assert tile.stages * tile.k * (tile.n + 2 * tile.t) <= 99 << 10


def test_few_tokens_occupy_every_multiprocessor() -> None:
    for rows in (4096, 14336, 128_256):
        assert -(-rows // tile_for(1, rows, 132).n) >= 132


def test_its_shape_is_known_without_computing() -> None:
    x, weight = torch.empty(1, 7, 64, device="meta"), torch.empty(40, 64, device="meta")
    got = torch.ops.batchrun.int8_linear(x, weight.char(), weight[:, 0], None)
    assert (got.shape, got.dtype) == ((1, 7, 40), x.dtype)
