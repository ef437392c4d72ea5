"""Attention in plain torch, for scores that are capped (Gemma 2) or softmaxed with a sink."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from batchrun.engine.attention import LayerAttention

# Maximum number of scores, or mask entries, that exist at a time, unless one query has more. Scores
# exist in at most two float32 copies, 128 MiB.
SCORES = 1 << 24

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""q `[t, Hq, Dk]`, k `[s, Hkv, Dk]`, v `[s, Hkv, Dv]`, out `[t, Hq, Dv]`: the last query is at the
position of the last key."""


def blocks(layer: LayerAttention, problem: Problem, heads: int) -> Iterator[Problem]:
    """Split a problem into blocks of queries, each with the keys that they see.

    Args:
        layer: Its window limits the keys.
        problem: What to split; one block if it is small enough.
        heads: Scores that exist for each query and key.
    """
    q, k, v, out = problem
    length, total, most = len(q), len(k), SCORES // heads
    behind = total - length if layer.window is None else layer.window - 1  # keys before a query's
    rows = max(1, most // total)
    if layer.window is not None:  # a block sees `behind + rows` keys
        rows = max(rows, int(math.sqrt(behind * behind / 4 + most) - behind / 2))
    for begin in range(0, length, rows):
        end = min(begin + rows, length)
        first = 0 if layer.window is None else max(0, total - length + begin - behind)
        seen = slice(first, total - length + end)
        yield q[begin:end], k[seen], v[seen], out[begin:end]


def attend(layer: LayerAttention, problem: Problem) -> None:
    """Compute one segment, block by block: writes `out`."""
    for q, k, v, out in blocks(layer, problem, problem[0].shape[1]):
        folded = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)[None]  # [1, Hkv, G, t, Dk]
        hidden = ~mask(layer, len(q), len(k), q.device)
        got = weighed(layer, folded, k.transpose(0, 1)[None], v.transpose(0, 1)[None], hidden)
        out.copy_(got[0].permute(2, 0, 1, 3).flatten(1, 2))


def weighed(
    layer: LayerAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Attention for a batch of sequences.

    Args:
        layer: Scale, cap and sinks.
        q: `[n, Hkv, G, t, Dk]`.
        k: `[n, Hkv, s, Dk]`.
        v: `[n, Hkv, s, Dv]`.
        hidden: Which keys each query does not see, bool, broadcast to the scores
            `[n, Hkv, G, t, s]`.

    Returns:
        `[n, Hkv, G, t, Dv]`.
    """
    scores = _product(q, k.transpose(-1, -2)).mul_(layer.scale)
    if layer.softcap is not None:
        scores.div_(layer.softcap).tanh_().mul_(layer.softcap)
    scores = scores.float().masked_fill_(hidden, -torch.inf)
    if layer.sinks is not None:  # one more logit a head (Xiao et al. 2023)
        sinks = layer.sinks.float().view(q.shape[1], -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]].to(v.dtype)
    del scores
    return _product(weights, v)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`[n, Hkv, G, t, x]` times `[n, Hkv, x, y]`.

    Heads that share `b` become rows of one product. On a CPU they stay separate if `b` is small
    enough to be repeated for each.
    """
    if a.device.type == "cpu" and b.numel() * a.shape[2] <= SCORES:
        return torch.matmul(a, b[:, :, None])
    product = torch.matmul(a.flatten(2, 3), b)
    return product.view(*a.shape[:-1], b.shape[-1])


def mask(layer: LayerAttention, length: int, total: int, device: torch.device) -> torch.Tensor:
    """Which of `total` keys each of the last `length` positions sees, bool `[length, total]`."""
    seen = torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
    if layer.window is not None:
        seen = seen.triu(total - length - layer.window + 1)
    return seen
