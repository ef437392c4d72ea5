"""Models in which a token's bits do not depend on the tokens beside it, on a GPU.

cuBLAS chooses a kernel, and with it the order of sums, by the number of rows (He et al. 2025,
"Defeating Nondeterminism in LLM Inference"). Here every linear layer has one tile for any number of
rows, and a model with other operators that choose by it is refused.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from batchrun.engine.model import int8
from batchrun.engine.model.int8 import Int8Linear, Tile
from batchrun.engine.model.operators import told, watched
from batchrun.errors import ModelError

# By bytes of an activation. Another tile would be another order of sums: these are for any number
# of tokens, so large enough for prompts.
TILES = {2: Tile(128, 128, 64, warps=8, stages=3), 4: Tile(64, 64, 32, stages=2)}


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Apply a linear layer, each row by itself.

    Args:
        x: `[..., k]`.
        weight: `[n, k]`, contiguous, in the dtype of `x`, or int8 with scales.
        scales: float32 `[n]`, or None.
        bias: `[n]`, or None.

    Returns:
        `[..., n]` in the dtype of `x`.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device_of(rows):
        out = int8.launch(rows, weight, scales, bias, TILES[x.dtype.itemsize])
    return out.view(*x.shape[:-1], len(weight))  # even of no rows


int8.register(
    "rowwise_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias) -> Tensor", linear
)


class RowwiseLinear(nn.Module):
    """Replaces a linear layer, and has its parameters.

    Args:
        linear: The layer.
    """

    def __init__(self, linear: nn.Linear | Int8Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.scales = linear.scales if isinstance(linear, Int8Linear) else None
        self.bias = linear.bias
        self.out_features, self.in_features = linear.weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        weights = self.weight, self.scales, self.bias
        return cast("torch.Tensor", torch.ops.batchrun.rowwise_linear(x, *weights))


def make_rowwise(model: PreTrainedModel) -> None:
    """Replace a model's linear layers, and check that nothing else mixes rows.

    Raises:
        ModelError: Some operator may compute a row differently beside other rows, or there is no
            Triton.
    """
    if find_spec("triton") is None:
        raise _refusal("triton is not installed")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Linear, Int8Linear)):
                setattr(parent, name, RowwiseLinear(child))
    reason = told(watched(model, mixes, _TOKENS))
    if reason:
        raise _refusal(reason)


def _refusal(reason: str) -> ModelError:
    message = f"--deterministic can't be guaranteed on this device: {reason}"
    return ModelError(message, hint="leave out --deterministic")


# --- which operators compute each row by itself, whatever the number of rows ---

# On CUDA, by their source (decision 29), beside pointwise operators and views. By name, without
# underscores at its ends. They make or move numbers, compute each by itself, or are exact in any
# order; norms have a block of threads for each row, whatever the number of rows.
_ROWWISE = """
    new_empty new_zeros empty_like zeros_like ones_like full_like detach dropout to_copy type_as
    embedding index index_select gather scatter cat stack clone copy repeat repeat_interleave
    unsafe_view constant_pad_nd flip roll tril triu one_hot nonzero
    floor_divide polar
    amax amin max min argmax argmin any all topk sort
    layer_norm rms_norm
"""
_PRODUCTS = {"mm", "bmm", "matmul", "linear"}
_SUMS = {"sum", "mean", "cumsum"}
_TOKENS = 251  # that operators are watched with: more than are few
_FEW = 32  # numbers: threads share a sum of at most so many in the same way, however many sums
_WARP = 1024  # numbers: a softmax of at most so many is one warp's


def mixes(func: Any, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator may compute a row differently beside other rows (`operators.Mixes`)."""
    if func.namespace == "batchrun" or torch.Tag.pointwise in func.tags or func.is_view:
        return False
    if not any(isinstance(arg, torch.Tensor) for arg in tree_leaves(args)):
        return False  # it makes numbers
    name, first, others = func.overloadpacket.__name__.strip("_"), args[0], args[1:]
    if name in _PRODUCTS:
        return bool(first.shape[-1] != 1)  # else there is nothing to add up
    if name == "softmax":
        return bool(others[0] % first.ndim != first.ndim - 1 or first.shape[-1] > _WARP)
    if name in _SUMS:
        dims = others[0] if others else range(first.ndim)
        sizes = [first.shape[d] for d in ([dims] if isinstance(dims, int) else dims)]
        return bool(first.is_floating_point()) and math.prod(sizes) > _FEW
    return name not in _ROWWISE.split()
