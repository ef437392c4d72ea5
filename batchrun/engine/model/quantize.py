"""Weights of 8 bits: half the memory and half the bytes to read, for little that is lost."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

import batchrun.engine.model.int8_gpu  # noqa: F401 - defines the operator


class Int8Linear(nn.Module):
    """A linear layer whose weights are whole numbers from -127 to 127, times a scale a row.

    Activations stay as they are (weight-only, symmetric, one scale an output feature: as in
    LLM.int8(), arXiv 2208.07339, without its outliers, which activations have).

    Args:
        linear: What it is made from.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data.float()
        scales = weight.abs().amax(1).clamp_min(1e-20) / 127
        self.weight = nn.Buffer((weight / scales[:, None]).round().to(torch.int8))
        self.scales = nn.Buffer(scales)
        self.bias = linear.bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        if x.is_cuda:
            weights = self.weight, self.scales, self.bias
            return cast("torch.Tensor", torch.ops.batchrun.int8_linear(x, *weights))
        # A power of two changes no digit, and keeps sums of whole weights within float16. In this
        # order: `linear * scales` is a pattern of inductor, which fails on a GPU.
        product = functional.linear(x / 128, self.weight.to(x.dtype))
        product = (self.scales * 128).to(x.dtype) * product
        return product if self.bias is None else product + self.bias


def int8_weights(model: nn.Module) -> None:
    """Give each linear layer weights of 8 bits. Peak memory is the model and one layer more."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))
