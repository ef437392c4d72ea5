"""Sums over a vocabulary, of integers: exact, so the same in any order.

How torch divides a sum between threads, on a GPU or a CPU, depends on the number of rows.
"""

from __future__ import annotations

import torch

_BITS = 42  # the highest logit weighs 2^42
_FRACTION = 2.0**40


def weights(logits: torch.Tensor) -> torch.Tensor:
    """The tokens' probabilities `[N, V]`, as int64 multiples of the highest's 2^-42."""
    below = (logits - logits.amax(dim=-1, keepdim=True)).double()
    return below.exp_().mul_(2.0**_BITS).round_().long()


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """`[N]` float32."""
    sums = weights(logits).sum(dim=-1).double() / 2.0**_BITS
    return (logits.amax(dim=-1).double() + sums.log()).float()


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """`[N, V]`; a CPU's is torch's own, which adds up each row by itself."""
    on_cpu = logits.device.type == "cpu"
    return logits.log_softmax(-1) if on_cpu else logits - logsumexp(logits)[:, None]


def fixed_point(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers below a million as int64 multiples of 2^-40."""
    return (numbers.double() * _FRACTION).round_().long()


def total(numbers: torch.Tensor) -> torch.Tensor:
    """Their sum over the last dimension, `[N, 1]`, in their dtype."""
    exact = fixed_point(numbers).sum(-1, keepdim=True)
    return (exact.double() / _FRACTION).to(numbers.dtype)
