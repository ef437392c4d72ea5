"""Which operators may mix the rows of a step, and models that are refused for one."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from batchrun.engine.model import rowwise
from batchrun.engine.model.fused import fuse_norms
from batchrun.engine.model.operators import Watch
from batchrun.engine.model.prepare import prepare
from batchrun.engine.model.rowwise import make_rowwise, mixes
from batchrun.errors import ModelError
from tests.parity import models

X, WIDE = torch.randn(40, 64), torch.randn(3, 4096)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: X @ X.T, {"matmul"}),
        (lambda: X[:, :1] @ X[:1], set()),  # one product each
        (lambda: functional.linear(X, X), {"linear"}),
        (lambda: X.mean(-1), {"mean"}),
        (lambda: X[:, :8].sum(-1, keepdim=True), set()),
        (lambda: X.long().cumsum(0), set()),
        (X.sum, {"sum"}),
        (lambda: X.softmax(-1), set()),
        (lambda: X.softmax(0), {"softmax"}),
        (lambda: WIDE.softmax(-1), {"softmax"}),
        (lambda: WIDE.logsumexp(-1), {"logsumexp"}),
        (lambda: functional.layer_norm(X, (64,)), set()),
        (lambda: torch.zeros(40, 64).index_add_(0, torch.arange(40), X), {"index_add"}),
        (lambda: functional.silu(X[None].transpose(0, 1)) * torch.cat([X, X])[:40, None], set()),
    ],
)
@torch.inference_mode()
def test_operators_that_may_mix_rows_are_noted(call: Callable[[], Any], found: set[str]) -> None:
    module = nn.Module()
    module.forward = call
    with Watch(module, mixes) as watch:
        X @ X.T
        module()
    assert watch.found.get(module, set()) == found


@pytest.fixture
def products() -> Any:
    """The rowwise product by torch's, which is as good for operators that are only watched."""
    if find_spec("triton") is None:
        pytest.skip("no triton")
    library = torch.library.Library("batchrun", "FRAGMENT")
    library.impl("rowwise_linear", lambda x, w, s, b: functional.linear(x, w, b), "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize(
    ("name", "fused", "reason"),
    [
        ("mixtral-moe", True, "torch's .* in Mixtral.* may depend on the batch"),
        ("llama", False, "torch's mean in LlamaRMSNorm may depend on the batch"),
    ],
)
@pytest.mark.usefixtures("products")
def test_a_model_that_mixes_rows_is_refused(name: str, fused: bool, reason: str) -> None:
    model = prepare(models.build(name)).model
    if fused:
        fuse_norms(model, [])
    with pytest.raises(ModelError, match=reason):
        make_rowwise(model)


def test_without_triton_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="triton is not installed"):
        make_rowwise(prepare(models.build("llama")).model)


def test_its_shape_is_known_without_computing() -> None:
    x, weight = torch.empty(1, 7, 64, device="meta"), torch.empty(40, 64, device="meta")
    got = torch.ops.batchrun.rowwise_linear(x, weight, None, None)
    assert (got.shape, got.dtype) == ((1, 7, 40), x.dtype)
