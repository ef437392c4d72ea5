"""Which of torch's operators a model calls that may compute a row differently beside other rows.

`invariant` knows what computes each row alike on a CPU, `rowwise` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from batchrun.engine.attention import QKV, LayerAttention
from batchrun.engine.model.layers import logits_of

Mixes = Callable[[Any, nn.Module, tuple[Any, ...], dict[str, Any]], bool]
"""Whether an operator may, called by this module, with these arguments."""


@torch.inference_mode()
def watched(model: PreTrainedModel, mixes: Mixes, tokens: int) -> dict[nn.Module, set[str]]:
    """Compute a made-up sequence of so many tokens, without attention, and note operators.

    Returns:
        Names of operators that may mix rows, by the module that itself calls them.
    """
    with Watch(model, mixes) as watch:
        logits_of(model, tokens, _Nothing())
    found: dict[nn.Module, set[str]] = watch.found
    return found


def told(found: Mapping[nn.Module, set[str]]) -> str | None:
    """The first operator and its module in a clause; None if there is none."""
    for module, names in found.items():
        return f"torch's {min(names)} in {type(module).__name__} may depend on the batch"
    return None


class Watch(TorchDispatchMode):
    """Notes operators that may mix rows, by the innermost module that calls them.

    Args:
        model: What no module of it calls is not looked at.
        mixes: Tells operators apart.

    Attributes:
        found: Names of operators by module.
    """

    def __init__(self, model: nn.Module, mixes: Mixes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[nn.Module, set[str]] = {}
        self._model, self._mixes = model, mixes
        self._running: list[nn.Module] = []

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator."""
        module = self._running[-1] if self._running else None
        if module is not None and self._mixes(func, module, args, kwargs or {}):
            self.found.setdefault(module, set()).add(func.overloadpacket.__name__.strip("_"))
        return func(*args, **(kwargs or {}))


class _Nothing:
    """A step without attention, which is a kernel of its own."""

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        query, _, value = new
        return value.new_zeros(*query.shape[:2], value.shape[2])
