"""Linear layers of 8-bit weights: right at every size, in a graph, compiled, and in a model."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from batchrun.engine.model import int8
from batchrun.engine.model.int8 import WIDEN_ABOVE, Int8Linear, int8_weights, unsupported_reason
from benchmarks.gpu import int8 as benchmark
from benchmarks.gpu.bench import Bench
from tests.gpu import test_parity as parity
from tests.gpu.conftest import CUDA

TOLERANCE = {torch.bfloat16: 0.01, torch.float16: 2e-3, torch.float32: 1e-5}  # of the largest


def made(n: int, k: int, dtype: torch.dtype, device: str, *, bias: bool = True) -> Int8Linear:
    torch.manual_seed(n + k)
    return Int8Linear(nn.Linear(k, n, bias=bias, dtype=dtype)).to(device)


def check(layer: Int8Linear, x: torch.Tensor, got: torch.Tensor) -> None:
    """Compare with the same weights in float64."""
    want = x.double() @ (layer.weight.double() * layer.scales.double()[:, None]).T
    if layer.bias is not None:
        want += layer.bias.double()
    assert got.dtype == x.dtype
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= TOLERANCE[x.dtype] * float(want.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "k"), [(40, 96), (33, 100), (1000, 512), (2304, 1024)])
@torch.inference_mode()
def test_any_number_of_tokens_is_right(device: str, n: int, k: int, dtype: torch.dtype) -> None:
    for bias in (True, False):
        layer = made(n, k, dtype, device, bias=bias)
        for tokens in (1, 5, 16, 17, 33, 64, 65, 200, 257, WIDEN_ABOVE, WIDEN_ABOVE + 1):
            x = torch.randn(1, tokens, k, dtype=dtype, device=device)
            check(layer, x, layer(x))


@torch.inference_mode()
def test_inputs_may_be_views(device: str) -> None:
    layer = made(64, 96, torch.bfloat16, device)
    wide = torch.randn(2, 7, 3 * 96, dtype=torch.bfloat16, device=device)
    for x in (wide[..., 96:192], wide[..., 5:101], wide[..., ::3], wide[0, 3, :96]):
        check(layer, x, layer(x))


@pytest.mark.parametrize("device", [CUDA])
@torch.inference_mode()
def test_few_tokens_widen_no_weights(device: str) -> None:
    layer = made(4096, 4096, torch.bfloat16, device, bias=False)
    assert unsupported_reason(layer.weight.device, torch.bfloat16) is None
    x = torch.randn(64, 4096, dtype=torch.bfloat16, device=device)
    check(layer, x, out := layer(x))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x)
    assert torch.cuda.max_memory_allocated() - before <= 2 * out.nbytes


@pytest.mark.parametrize("device", [CUDA])
@torch.inference_mode()
def test_a_graph_replays_it(device: str) -> None:
    layer = made(512, 256, torch.bfloat16, device)
    for tokens in (1, 24, 300, WIDEN_ABOVE + 5):
        x = torch.randn(tokens, 256, dtype=torch.bfloat16, device=device)
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        x.normal_()
        graph.replay()
        check(layer, x, out)


@pytest.mark.parametrize("device", [CUDA])
@torch.inference_mode()
def test_compiled_neighbours_take_it_whole(device: str) -> None:
    layers = nn.Sequential(made(96, 64, torch.bfloat16, device), nn.SiLU())
    compiled = torch.compile(layers, fullgraph=True, dynamic=True)
    for tokens in (7, 40, 2000):
        x = torch.randn(1, tokens, 64, dtype=torch.bfloat16, device=device)
        torch.testing.assert_close(compiled(x), layers(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("optimize", [False, True])
def test_every_token_is_the_models_own_choice(device: str, optimize: bool, tmp_path: Path) -> None:
    if optimize and device == "cpu":
        pytest.skip("nothing is compiled on a CPU")
    loaded, reference = parity.build.__wrapped__("llama", "bfloat16", device)
    int8_weights(loaded.model)
    named = dict(reference.named_modules())
    for name, layer in loaded.model.named_modules():
        if isinstance(layer, Int8Linear):
            named[name].weight.data = layer.weight * layer.scales[:, None]
    given = parity.prompts(loaded.model.config.vocab_size)
    with parity.engine(copy.copy(loaded), "auto", tmp_path, log := [], optimize=optimize) as run:
        got = parity.outputs(run, given)
    parity.check(reference, "bfloat16", given, got)
    assert not [line for line in log if "no CUDA graph" in line or "uncompiled" in line], log


def test_the_benchmark_is_rehearsed() -> None:
    (*_, last) = benchmark.run(Bench(toy=True, attention="auto", limit=60))
    assert [row["tokens"] for row in last["int8"]] == [*benchmark.TOKENS, *benchmark.TOKENS]
    assert all(row["int8_us"] > 0 for row in last["int8"])


def test_reasons_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    assert int8.unsupported_reason.__wrapped__(device, torch.float32) == (
        "the kernel computes in bfloat16 and float16, not in float32"
    )
    monkeypatch.setattr(int8, "find_spec", lambda _: None)
    assert int8.unsupported_reason.__wrapped__(device, torch.bfloat16) == "triton is not installed"
    monkeypatch.setattr(int8, "find_spec", lambda _: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert int8.unsupported_reason.__wrapped__(device, torch.float16) == (
        "it needs compute capability 8.0, and this device has 7.5"
    )
