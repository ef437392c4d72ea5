"""Whether a row's logits depend on its batch: looked for in the operators of a forward.

Most of torch's operators compute a row alike wherever it is; `rows` repairs those that do not.
What neither is known for makes a model's answers vary.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from batchrun.engine.attention import QKV, LayerAttention
from batchrun.engine.cpu.layers import NativeLayer, NativeLinear, NativeStack, RotaryTable
from batchrun.engine.model.hook import attending
from batchrun.engine.model.rows import REPAIRING, by_rows

_TOKENS = 40
# Operators that compute a number from one place of each operand, or only move numbers: exactly,
# rounding as IEEE 754 says, or by one function for all of a loop (measured: see the tests).
_ALIKE = frozenset(
    """
    abs add add_ alias arange bitwise_and bitwise_not bitwise_or broadcast_to cat ceil chunk clamp
    clamp_ clamp_max clamp_min clone concat contiguous copy_ cos detach detach_ div div_ dropout
    embedding empty empty_like eq erf exp expand expand_as eye fill_ flatten floor floor_divide full
    full_like gather ge gt index index_select le lift_fresh log log1p logical_and logical_not
    logical_or lt masked_fill masked_fill_ maximum minimum movedim mul mul_ narrow ne neg neg_
    new_empty new_full new_ones new_zeros numpy_T one_hot ones ones_like permute polar reciprocal
    relu relu_ repeat repeat_interleave reshape round scatter scatter_ select sin slice split
    split_with_sizes sqrt square squeeze stack sub sub_ t tanh tanh_ tensor_split to transpose tril
    triu type_as unbind unflatten unsqueeze unsqueeze_ view view_as view_as_complex view_as_real
    where zero_ zeros zeros_like
    """.split()
)
# Operators that compute along a dimension: alike if it is the last one.
_ALONG = {"amax", "argmax", "log_softmax", "max", "mean", "norm", "softmax", "sum", "topk", "var"}
_NORMS = {"layer_norm", "rms_norm"}
_POWERS = (2, 3, 0.5, -1, -2)  # which torch computes by exact operators
_OURS = (NativeLayer, NativeStack, NativeLinear, RotaryTable)


def repair(model: PreTrainedModel) -> None:
    """Have modules compute each row alike that call operators which do not."""
    for module in _varying(model):
        module.forward = by_rows(module.forward)


def varying_operator(model: PreTrainedModel) -> str | None:
    """An operator whose results for a row depend on the batch, as a clause; None if there is none.

    Attention itself is not looked at.
    """
    for module, names in _varying(model).items():
        return f"{type(module).__name__} computes {min(names)} with torch"
    return None


@torch.inference_mode()
def _varying(model: PreTrainedModel) -> dict[nn.Module, set[str]]:
    """Modules that themselves call operators not known to compute each row alike; and which."""
    vocab = model.config.get_text_config().vocab_size
    positions = torch.arange(_TOKENS, device=model.device)[None]
    ids, keep = (positions + 3) * 7919 % vocab, positions[0, -2:]
    with attending(_Values()), _Trace(model) as trace:
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep)
    return trace.found


class _Values:
    """A step in which each token sees itself alone."""

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        query, key, value = new
        return value.repeat_interleave(query.shape[1] // key.shape[1], 1)


class _Trace(TorchDispatchMode):
    """Notes operators by the innermost module that calls them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
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
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
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
    if name in {"mul", "mul_", "div"}:
        return not any(tensor.is_complex() for tensor in tensors)
    if name in {"add", "add_", "sub", "sub_"}:
        return kwargs.get("alpha", 1) == 1
    if name in {"matmul", "bmm", "mm"}:  # one product alone is exact
        return tensors[0].shape[-1] == 1
    if name == "rsqrt":
        return tensors[0].itemsize >= 4
    if name == "pow":
        return len(tensors) == 1 and args[0] is tensors[0] and args[1] in _POWERS
    if name in _ALONG:
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if name == "topk":
            dims = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        dims = dims if isinstance(dims, (tuple, list)) else (dims,)
        return all(dim in {-1, tensors[0].ndim - 1} for dim in dims)
    return name in _ALIKE or name in _NORMS
