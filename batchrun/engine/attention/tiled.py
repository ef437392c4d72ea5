"""Attention in plain torch whose results for a query depend on its own sequence alone.

Keys are divided into parts that begin at multiples of `_PART` from the sequence's start, each with
a softmax of its own, in float32; parts are added in order, and a key that a query does not see adds
an exact 0. Products are those of `rows`. So a query gets the same bits in a prompt, a piece of one,
or a decode. Slow: for machines without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.functional import pad

from batchrun.engine.attention import KV, AttentionBackend, Geometry, LayerAttention, Upload
from batchrun.engine.attention.explicit import SCORES
from batchrun.engine.core import Segment
from batchrun.engine.model import rows

_PART = 128  # tokens


def unsupported_reason(geometry: Geometry, name: str, *, compiled: bool) -> str | None:
    """See `attention.unsupported_reason`."""
    return None if geometry.device.type == "cpu" else "it computes on a CPU"


def make(geometry: Geometry, upload: Upload | None, log: Callable[[str], None], name: str) -> Tiled:
    """See `attention.create`."""
    return Tiled()


class Tiled(AttentionBackend):
    """Computes one sequence after the other."""

    name = "tiled"
    invariant = True

    def __init__(self) -> None:
        self.plan(())

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        """Remember the step's segments."""
        if fixed:
            raise ValueError("tiled computes on a CPU, which records no graphs")
        self._segments = segments

    def run(
        self, layer: LayerAttention, query: torch.Tensor, slots: KV, new: KV | None = None
    ) -> torch.Tensor:
        """See `AttentionBackend.run`."""
        keys, values = slots
        out = query.new_empty(*query.shape[:2], values.shape[-1])
        at = 0
        with rows.repairing():
            for segment in self._segments:
                for begin, end in _blocks(segment, query.shape[1]):
                    part = slice(at, at + end - begin)
                    kv = keys[segment.slot, :end], values[segment.slot, :end]
                    out[part] = _attend(layer, query[part], begin, kv)
                    at = part.stop
        return out


def _blocks(segment: Segment, heads: int) -> Iterator[tuple[int, int]]:
    """A segment's tokens in blocks, so that not too many scores exist at a time."""
    most = max(1, SCORES // (heads * (segment.end + _PART)))
    for begin in range(segment.start, segment.end, most):
        yield begin, min(begin + most, segment.end)


def _attend(layer: LayerAttention, query: torch.Tensor, start: int, slot: KV) -> torch.Tensor:
    """Attend from the queries `[t, Hq, Dk]` at positions from `start` on to a slot up to the last.

    Shapes within: n parts of p keys; h key heads; r rows, a token's queries of one key head each.
    """
    tokens, q_heads, width = query.shape
    heads = slot[0].shape[1]
    positions = torch.arange(start, start + tokens)
    first = _first_seen(layer, positions)
    begin = int(first[0]) // _PART
    keys, values = (_in_parts(tensor[begin * _PART :]) for tensor in slot)  # [n, h, p, D]
    group = q_heads // heads
    q = query.float().view(tokens, heads, group, width).transpose(0, 1).reshape(heads, -1, width)
    scores = _products(q.expand(len(keys), -1, -1, -1), keys.mT).mul_(layer.scale)  # [n, h, r, p]
    if layer.softcap is not None:
        scores.div_(layer.softcap).tanh_().mul_(layer.softcap)
    at = torch.arange(begin * _PART, (begin + len(keys)) * _PART).view(-1, 1, 1, _PART)
    last, first = (t.repeat_interleave(group).view(-1, 1) for t in (positions, first))
    scores.masked_fill_((at > last) | (at < first), -torch.inf)
    highest = scores.amax(-1, keepdim=True)  # [n, h, r, 1]
    weights = scores.sub_(_finite(highest)).exp_()
    sums, outs = weights.sum(-1, keepdim=True), _products(weights, values)
    if layer.sinks is not None:  # a part that is one key without a value
        sinks = layer.sinks.float().view(1, heads, 1, group, 1).expand(1, heads, tokens, group, 1)
        highest = torch.cat([highest, sinks.reshape(1, heads, -1, 1)])
        sums = torch.cat([sums, torch.ones_like(sums[:1])])
        outs = torch.cat([outs, torch.zeros_like(outs[:1])])
    out = _added(highest, sums, outs).view(heads, tokens, group, -1)
    return out.transpose(0, 1).reshape(tokens, q_heads, -1)


def _first_seen(layer: LayerAttention, positions: torch.Tensor) -> torch.Tensor:
    """The first key that the query at each position sees."""
    if layer.chunk is not None:
        return positions - positions % layer.chunk
    if layer.window is not None:
        return (positions - layer.window + 1).clamp_min(0)
    return torch.zeros_like(positions)


def _in_parts(tensor: torch.Tensor) -> torch.Tensor:
    """Keys or values `[s, h, D]` as parts `[n, h, p, D]` in float32, with zeros behind the end."""
    whole = pad(tensor.float(), (0, 0, 0, 0, 0, -len(tensor) % _PART))
    return whole.view(-1, _PART, *tensor.shape[1:]).transpose(1, 2).contiguous()


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`[n, h, r, x]` times `[n, h, x, y]`."""
    out = a.new_empty(*a.shape[:-1], b.shape[-1])
    for i, part in enumerate(out):
        for head, result in enumerate(part):
            result.copy_(rows.product(a[i, head], b[i, head]))
    return out


def _finite(highest: torch.Tensor) -> torch.Tensor:
    """What to subtract from scores: 0 where none is seen."""
    return highest.masked_fill(highest == -torch.inf, 0)


def _added(highest: torch.Tensor, sums: torch.Tensor, outs: torch.Tensor) -> torch.Tensor:
    """Add up the parts' softmaxes in order: `[n, h, r, D]` to `[h, r, D]` (Milakov 2018)."""
    most = torch.full_like(highest[0], -torch.inf)
    total, out = torch.zeros_like(sums[0]), torch.zeros_like(outs[0])
    for its_highest, its_sum, its_out in zip(highest, sums, outs, strict=True):
        higher = torch.maximum(most, its_highest)
        before, now = (most - _finite(higher)).exp_(), (its_highest - _finite(higher)).exp_()
        total, out, most = total * before + its_sum * now, out * before + its_out * now, higher
    return out / total
