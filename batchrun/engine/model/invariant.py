"""Whether a row's logits depend on its batch: looked for in the operators of a forward.

Most of torch's operators compute a row alike wherever it is; `rows` repairs those that do not.
What neither is known for makes a model's answers vary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from batchrun.engine.attention import QKV, LayerAttention
from batchrun.engine.cpu.layers import NativeLayer, NativeStack, RotaryTable
from batchrun.engine.cpu.linear import NativeEmbedding, NativeLinear
from batchrun.engine.model.experts import use_experts
from batchrun.engine.model.hook import attending
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
    for module in _varying(model):
        module.forward = by_rows(module.forward)
    return True


def varying_operator(model: PreTrainedModel) -> str | None:
    """Which operator may make a row depend on its batch, in a clause; None if none does.

    Attention itself is not looked at.
    """
    for module, names in _varying(model).items():
        return f"torch's {min(names)} in {type(module).__name__} may depend on the batch"
    return None


@torch.inference_mode()
def _varying(model: PreTrainedModel) -> dict[nn.Module, set[str]]:
    """Modules that themselves call operators not known to compute each row alike; and which."""
    vocab = model.config.get_text_config().vocab_size
    positions = torch.arange(_TOKENS, device=model.device)[None]
    ids, keep = (positions + 3) * 7919 % vocab, positions[0, -2:]
    with attending(_Values()), _Trace(model) as trace:
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep)
    found: dict[nn.Module, set[str]] = trace.found
    return found


class _Values:
    """A step in which each token sees itself alone."""

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        query, key, value = new
        return value.repeat_interleave(query.shape[1] // key.shape[1], 1)


class _Trace(TorchDispatchMode):
    """Notes operators by the innermost module that calls them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[nn.Module, set[str]] = {}
        self._model = model
        self._running = [model]

    def __enter__(self) -> Any:
        with ExitStack() as hooks:
            for module in self._model.modules():
                entered = module.register_forward_pre_hook(self._enter)
                left = module.register_forward_hook(self._leave, always_call=True)
                hooks.callback(entered.remove)
                hooks.callback(left.remove)
            self._hooks = hooks.pop_all()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        module = self._running[-1]
        if not REPAIRING.get() and not isinstance(module, _OURS):
            name = func.overloadpacket.__name__
            if not _is_alike(name, args, kwargs or {}):
                self.found.setdefault(module, set()).add(name)
        return func(*args, **(kwargs or {}))


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
