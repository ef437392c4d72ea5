"""Whether a row's answer depends on the rows beside it, and what computes the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from batchrun.engine import cpu
from batchrun.engine.cpu.layers import NativeStack
from batchrun.engine.model.int8 import Int8Linear

if TYPE_CHECKING:
    from batchrun.engine.attention import AttentionBackend
    from batchrun.engine.model.prepare import LoadedModel

_INSTRUCTIONS = {cpu.Level.TILES: "amx", cpu.Level.VECTORS: "avx512"}


def varies(loaded: LoadedModel, backend: AttentionBackend) -> str | None:
    """Why answers may depend on the batch, in one clause; None if they don't."""
    if loaded.device.type != "cpu" or not _is_native(loaded):
        return "torch's matrix products depend on the batch"
    if not backend.invariant:
        return f"the attention kernel {backend.name} depends on the batch"
    return None


def arithmetic(loaded: LoadedModel) -> str:
    """The dtype, and whose instructions compute."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    if loaded.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(loaded.device)
        return f"{dtype} cuda sm_{major}{minor}"
    return f"{dtype} {_INSTRUCTIONS[cpu.level()] if _is_native(loaded) else 'torch'}"


def _is_native(loaded: LoadedModel) -> bool:
    """Whether native code computes every layer, and every matrix outside of them."""
    kinds = {type(module) for module in loaded.model.modules()}
    return NativeStack in kinds and not kinds & {nn.Linear, Int8Linear}
