"""Of pytest (`-p`), with TRITON_INTERPRET=1: kernels compute on the CPU.

numpy's product of matrices adds up in an order that depends on where a row lies in its tile, and
knows no bfloat16. A GPU's does neither, nor does the one here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from batchrun.engine.model import rowwise


def _numbers(tensor: Any) -> Any:
    if tensor.dtype.name == "bf16":
        return (tensor.data.astype(np.uint32) << 16).view(np.float32)
    return tensor.data.astype(np.float32)


def create_dot(_: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    sums = np.einsum("mk,kn->mn", _numbers(a), _numbers(b), dtype=np.float32)
    return interpreter.TensorHandle(sums + d.data, d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = create_dot
LIBRARY = torch.library.Library("batchrun", "FRAGMENT")
LIBRARY.impl("rowwise_linear", rowwise.linear, "CPU")
# It would copy arguments back to where they never left, and slots are mostly no memory.
interpreter.GridExecutor._restore_args_dev = lambda *_: None

_patch_tensor = interpreter._patch_lang_tensor


def patch_tensor(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes ends of loops of arrays, which numpy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patch_tensor
