"""Whether a row's logits depend on its batch: looked for in the operators of a forward.

Most of torch's operators compute a row alike wherever it is; `rows` repairs those that do not.
What neither is known for makes a model's answers vary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from batchrun.engine.cpu.layers import NativeLayer, NativeStack, RotaryTable
from batchrun.engine.cpu.linear import NativeEmbedding, NativeLinear
from batchrun.engine.model.experts import use_experts
from batchrun.engine.model.operators import told, watched
from batchrun.engine.model.rows import REPAIRING, by_rows

_TOKENS = 5
# Operators that only move numbers, or compute each from one place of every operand: exactly,
# rounded as IEEE 754 says, or by one function in a whole loop (tests try those). And norms.
_MOVES = """
    alias arange as_strided broadcast_to cat chunk clone concat contiguous copy_ detach detach_
    dropout embedding empty empty_like expand expand_as eye fill_ flatten full full_like gather
    index index_select lift_fresh masked_fill masked_fill_ movedim narrow new_empty new_full
    new_ones new_zeros numpy_T one_hot ones ones_like permute repeat repeat_interleave reshape
    scatter scatter_ select slice split split_with_sizes squeeze stack t tensor_split to
    transpose tril triu type_as unbind unflatten unsqueeze unsqueeze_ view view_as
    view_as_complex view_as_real where zero_ zeros zeros_like
"""
_EACH = """
    abs bitwise_and bitwise_not bitwise_or ceil clamp clamp_ clamp_max clamp_min cos eq erf exp
    floor floor_divide ge gt layer_norm le log log1p logical_and logical_not logical_or lt
    maximum minimum ne neg neg_ polar reciprocal relu relu_ rms_norm round sin sqrt square tanh
    tanh_
"""
_ALIKE = frozenset((_MOVES + _EACH).split())
# Operators that compute along a dimension: alike if it is the last one.
_ALONG = {"amax", "argmax", "log_softmax", "max", "mean", "norm", "softmax", "sum", "var"}
_POWERS = (2, 3, 0.5, -1, -2)  # which torch computes by exact operators
_OURS = (NativeLayer, NativeStack, NativeLinear, NativeEmbedding, RotaryTable)


def repair(model: PreTrainedModel, *, slowly: bool) -> bool:
    """Have modules on a CPU compute each row alike that call operators which do not.

    Args:
        model: Changed in place.
        slowly: Whether to do so even if torch computes its large products, in tiles then. Where
            native code does, what is left costs little.

    Returns:
        Whether that was done.
    """
    if not slowly and not any(isinstance(m, (NativeLinear, NativeStack)) for m in model.modules()):
        return False
    use_experts(model)
    for module in watched(model, _mixes, _TOKENS):
        module.forward = by_rows(module.forward)
    return True


def varying_operator(model: PreTrainedModel) -> str | None:
    """Which operator may make a row depend on its batch, in a clause; None if none does.

    Attention itself is not looked at.
    """
    return told(watched(model, _mixes, _TOKENS))


def _mixes(func: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator may, unless it is ours or part of a repair."""
    ours = REPAIRING.get() or isinstance(module, _OURS)
    return not ours and not _is_alike(func.overloadpacket.__name__, args, kwargs)


def _is_alike(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator is known to compute each row alike."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if name in _UNDER:
        return _UNDER[name](tensors, args, kwargs)
    if name in _ALONG:
        dims = kwargs.get("dim", (args[1:] or (None,))[0])
        dims = dims if isinstance(dims, (tuple, list)) else (dims,)
        return {*dims} <= {-1, tensors[0].ndim - 1}
    return name in _ALIKE


def _exact(tensors: list[torch.Tensor], *_: Any) -> bool:
    return not any(tensor.is_complex() for tensor in tensors)


def _plain(tensors: list[torch.Tensor], args: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("alpha", 1) == 1)


def _single(tensors: list[torch.Tensor], *_: Any) -> bool:
    """Whether nothing is added up."""
    return tensors[0].shape[-1] == 1


# Operators that compute each row alike under a condition on their arguments.
_UNDER: dict[str, Callable[[list[torch.Tensor], Any, dict[str, Any]], bool]] = {
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _exact),
    **dict.fromkeys(("add", "add_", "sub", "sub_"), _plain),
    **dict.fromkeys(("matmul", "bmm", "mm"), _single),
    "rsqrt": lambda tensors, args, kwargs: tensors[0].itemsize >= 4,
    "pow": lambda tensors, args, kwargs: (
        len(tensors) == 1 and args[0] is tensors[0] and args[1] in _POWERS
    ),
    "topk": lambda tensors, args, kwargs: (
        kwargs.get("dim", (args[2:] or (-1,))[0]) in {-1, tensors[0].ndim - 1}
    ),
}
