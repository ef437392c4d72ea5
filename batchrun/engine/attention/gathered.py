"""Decodes of many sequences as one padded batch, for devices where every call is expensive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from batchrun.engine.attention import LayerAttention, Upload
from batchrun.engine.attention.batch import Batch, Ints, split
from batchrun.engine.core import Segment

NUMBERS = 1 << 26  # elements of keys and values gathered at a time: 256 MiB in float32
_ALIGNED = 16  # the memory-efficient kernel would copy masks of other lengths
_SHORT = 256  # tokens; shorter sequences are padded rather than computed in separate calls


@dataclass(frozen=True)
class Bucket:
    """Decodes of similar lengths.

    Args:
        members: Indices of the segments, int64 `[n]`.
        rows: Their tokens, as indices over all slots, int64 `[n, s]`. Past the end of a sequence,
            where there is no memory, its last token is repeated.
        seen: Which of these are tokens of the sequence, bool `[n, s]`.
    """

    members: torch.Tensor
    rows: torch.Tensor
    seen: torch.Tensor

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """Gather keys or values `[num_slots, slot_tokens, Hkv, D]` into `[n, Hkv, s, D]`."""
        tokens = slots.view(-1, *slots.shape[2:])
        heads = torch.arange(tokens.shape[1], device=slots.device)[:, None]
        return tokens[self.rows[:, None], heads]


class Decodes:
    """The leading single-token segments of a step, grouped by length.

    Args:
        segments: All segments of the step.
        upload: How arrays get to the device.
    """

    def __init__(self, segments: Sequence[Segment], upload: Upload) -> None:
        self._batch, _ = split(segments)
        self._upload = upload
        self._found: dict[tuple[int, int, int], tuple[list[Bucket], frozenset[int]]] = {}

    def buckets(
        self, layer: LayerAttention, slot_tokens: int, numbers: int
    ) -> tuple[list[Bucket], frozenset[int]]:
        """Buckets for layers like this one, and the segments that are in one.

        A segment that would be alone in its bucket is in none, so nothing is gathered for it.

        Args:
            layer: Its window or chunk limits the keys that a query sees.
            slot_tokens: Tokens of address space per slot.
            numbers: Elements of a token's keys and values.
        """
        key = (layer.window or 0, layer.chunk or 0, numbers)
        if key not in self._found:
            used = np.minimum(self._batch.ends, layer.window or slot_tokens)
            if layer.chunk is not None:
                used = (self._batch.ends - 1) % layer.chunk + 1
            groups = _groups(used, NUMBERS // numbers)
            made = [self._bucket(group, used[group], slot_tokens) for group in groups]
            self._found[key] = made, frozenset(int(i) for group in groups for i in group)
        return self._found[key]

    def _bucket(self, group: Ints, used: Ints, slot_tokens: int) -> Bucket:
        batch: Batch = self._batch
        firsts = batch.ends[group] - used
        sent = self._upload(np.concatenate([group, batch.slots[group], firsts, used]))
        members, slots, first, length = sent.long().view(4, -1)
        tokens = torch.arange(_padded(int(used.max())), device=sent.device)
        rows = torch.minimum(tokens, length[:, None] - 1) + (slots * slot_tokens + first)[:, None]
        return Bucket(members, rows, tokens < length[:, None])


def _groups(used: Ints, tokens: int) -> list[Ints]:
    """Indices of sequences to pad to the same length, in groups of at least two.

    Args:
        used: Tokens of each sequence.
        tokens: Maximum number of padded tokens in a group.
    """
    order = np.argsort(-used, kind="stable").astype(np.int32)
    groups = []
    while len(order):
        longest = _padded(int(used[order[0]]))
        # For long sequences, at most half of what is gathered is padding.
        close = used[order] >= (longest // 2 if longest > _SHORT else 0)
        count = max(1, min(tokens // longest, int(close.sum())))
        if count > 1:
            groups.append(order[:count])
        order = order[count:]
    return groups


def _padded(length: int) -> int:
    return -(-length // _ALIGNED) * _ALIGNED
