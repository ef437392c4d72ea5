"""A row's bits are its own: in one product, and through a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from batchrun.engine.attention import QKV, LayerAttention
from batchrun.engine.model import rowwise
from batchrun.engine.model.fused import fuse_norms, merge_projections
from batchrun.engine.model.hook import attending
from batchrun.engine.model.int8 import Int8Linear, int8_weights
from batchrun.engine.model.layers import logits_of
from batchrun.engine.model.prepare import prepare
from tests.parity import models

TOLERANCE = {torch.bfloat16: 0.01, torch.float16: 2e-3, torch.float32: 1e-6}  # of the largest


def made(n: int, k: int, dtype: torch.dtype, *, bias: bool) -> nn.Linear:
    torch.manual_seed(n)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "k", "bias"), [(40, 96, True), (130, 100, False)])
@torch.inference_mode()
def test_a_rows_bits_are_its_own(
    n: int, k: int, bias: bool, dtype: torch.dtype, int8: bool
) -> None:
    if int8 and dtype == torch.bfloat16:
        return  # the interpreter can't make it of integers
    plain = made(n, k, dtype, bias=bias)
    layer = Int8Linear(plain) if int8 else plain
    own = rowwise.RowwiseLinear(layer)
    x = torch.randn(200, k, dtype=dtype)
    whole = own(x)
    weight = layer.weight.double()
    if isinstance(layer, Int8Linear):
        weight = weight * layer.scales.double()[:, None]
    want = nn.functional.linear(x.double(), weight, plain.bias.double() if bias else None)
    assert float((whole - want).abs().max() / want.abs().max()) <= TOLERANCE[dtype]
    for begin, end in ((0, 1), (5, 6), (60, 200), (199, 200), (3, 140)):
        assert torch.equal(own(x[begin:end]), whole[begin:end])
    assert torch.equal(own(x.flip(0)).flip(0), whole)
    assert torch.equal(own(x[None, None, 7:9])[0, 0], whole[7:9])


@torch.inference_mode()
def test_inputs_may_be_views() -> None:
    own = rowwise.RowwiseLinear(made(33, 64, torch.float16, bias=True))
    wide = torch.randn(2, 7, 3 * 64).half()
    for x in (wide[..., 64:128], wide[..., 5:69], wide[..., ::3], wide[0, 3, :64]):
        assert torch.equal(own(x), own(x.contiguous()))


class Alone:
    """Attention in which every query sees itself only."""

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        query, _, value = new
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1)


@torch.inference_mode()
def states(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    with attending(Alone()):
        out = model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    return out.logits[0]


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt-neox", "falcon"])
@pytest.mark.parametrize("int8", [False, True])
def test_a_model_computes_the_same_and_each_token_by_itself(name: str, int8: bool) -> None:
    model = prepare(models.build(name)).model
    if int8:
        int8_weights(model)
    fuse_norms(model, [])
    merge_projections(model, lambda: logits_of(model), [])
    want, names = logits_of(model), set(dict(model.named_parameters()))
    rowwise.make_rowwise(model)
    torch.testing.assert_close(logits_of(model), want, rtol=1e-4, atol=1e-4)
    assert set(dict(model.named_parameters())) == names
    assert not [m for m in model.modules() if isinstance(m, (nn.Linear, Int8Linear))]

    ids, positions = torch.arange(30) * 7 % 199, torch.arange(30)
    whole = states(model, ids, positions)
    for begin, end in ((0, 30), (3, 4), (11, 28)):
        part = slice(begin, end)
        assert torch.equal(states(model, ids[part], positions[part]), whole[part])
