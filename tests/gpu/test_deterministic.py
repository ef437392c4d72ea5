"""Bits on a GPU: a row's are its own in a product, in attention, and through the whole engine."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from batchrun.engine import attention
from batchrun.engine.attention import Geometry, LayerAttention, LayerSpec
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.model import rowwise
from batchrun.engine.model.int8 import int8_weights
from batchrun.engine.model.judge import KINDS, check_kernel
from batchrun.engine.transfers import copied
from benchmarks.gpu import deterministic as benchmark
from benchmarks.gpu.bench import Bench
from tests.attention.slots import segment
from tests.gpu import test_parity as parity
from tests.gpu.conftest import CUDA

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 0.01, torch.float16: 2e-3, torch.float32: 1e-5}  # of the largest

pytestmark = CUDA.marks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1000, 512), (33, 100), (4096, 4096)])
@torch.inference_mode()
def test_a_rows_bits_are_its_own(n: int, k: int, dtype: torch.dtype) -> None:
    draw = partial(torch.randn, dtype=dtype, device="cuda")
    x, weight, bias = draw(2000, k), draw(n, k), draw(n)
    whole = rowwise.linear(x, weight, None, bias)
    want = x.double() @ weight.double().T + bias.double()
    assert float((whole - want).abs().max() / want.abs().max()) <= TOLERANCE[dtype]
    for begin, end in ((0, 1), (5, 6), (60, 200), (1999, 2000), (0, 256), (129, 1500)):
        assert torch.equal(rowwise.linear(x[begin:end], weight, None, bias), whole[begin:end])
    assert torch.equal(rowwise.linear(x.flip(0), weight, None, bias).flip(0), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_right(kind: str, dtype: torch.dtype) -> None:
    works, what = check_kernel("triton", torch.device("cuda", 0), dtype, KINDS[kind])
    assert works, what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_querys_bits_are_its_own(kind: str, dtype: torch.dtype) -> None:
    spec: LayerSpec = KINDS[kind]
    device, tokens = torch.device("cuda", 0), 2900
    draw = partial(torch.randn, dtype=dtype, device=device)
    slots = draw(3, 3072, spec.kv_heads, spec.k_dim), draw(3, 3072, spec.kv_heads, spec.v_dim)
    query = draw(tokens, spec.q_heads, spec.k_dim)
    sinks = draw(spec.q_heads) if spec.sinks else None
    layer = LayerAttention(spec.scale, spec.window, spec.softcap, sinks, spec.chunk)
    geometry = Geometry((spec,), 3072, 3, 8, 4096, dtype, device)
    backend = attention.create("triton", geometry, partial(copied, device=device))
    backend.plan([segment(1, 0, tokens)])
    whole = backend.run(layer, query, slots)
    for start, length in ((0, 700), (700, 1), (701, 1500), (511, 1), (512, 1), (2899, 1)):
        for beside in (0, 6):
            segments = [*[segment(2, 900, 1)] * beside, segment(1, start, length)]
            backend.plan(segments)
            part = query[start : start + length]
            got = backend.run(layer, torch.cat([query[:beside], part]), slots)[beside:]
            assert torch.equal(got, whole[start : start + length]), (start, length, beside)


def answers(made: Any, given: list[list[int]]) -> dict[int, tuple[Any, ...]]:
    """Of each row: its tokens, and the bits of their log-probabilities."""
    for row, ids in enumerate(given):
        params = SamplingParams(
            max_tokens=12, ignore_eos=True, temperature=0.8, top_p=0.9, logprobs=2
        )
        made.engine.add(Request(row, 0, tuple(ids), params, 5))
    done = {}
    while made.engine.has_work:
        for each in made.engine.step():
            assert each.error is None
            done[each.request.row] = each.token_ids, each.logprobs
    return done


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("model", "dtype"),
    [("llama", "bfloat16"), ("window", "bfloat16"), ("softcap", "float32"), ("qwen3", "float16")],
)
def test_answers_do_not_depend_on_the_batch(
    model: str, dtype: str, int8: bool, tmp_path: Path
) -> None:
    loaded, _ = parity.build.__wrapped__(model, dtype, "cuda")  # whose modules will change
    if int8:
        int8_weights(loaded.model)
    given = parity.prompts(loaded.model.config.vocab_size)
    found = []
    for shape in ({}, *parity.SHAPES.values()):
        settings = {"optimize": True, "deterministic": True} | shape
        with parity.engine(copy.copy(loaded), "auto", tmp_path, log := [], **settings) as made:
            assert {"triton", "rowwise layers"} <= set(made.kernels)
            assert "compiled layers" not in made.kernels
            found.append(answers(made, given))
        assert not [line for line in log if "no CUDA graph" in line], log
    assert all(each == found[0] for each in found[1:])


def test_the_benchmark_is_ready() -> None:
    rows = [benchmark.linear(Bench(False, "auto", 60), 256, 128, tokens) for tokens in (1, 300)]
    assert all(row["same"] for row in rows)
