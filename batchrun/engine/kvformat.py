"""How keys and values are stored in slots: what the executor writes and a kernel must read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Write = Callable[[torch.Tensor, torch.Tensor], None]
"""Writes new keys or values `[T, H, D]` to the tokens `rows` `[T]`, counted over all slots."""

_WORD = torch.complex128  # the widest dtype, which the GPU moves in one access


@dataclass(frozen=True, slots=True)
class KVFormat:
    """One way to store keys and values.

    Args:
        name: Its name in `AttentionBackend.kv_formats`.
        writer: Makes the `Write` for slots `[num_slots, slot_tokens, H, D]`, a view of their
            memory.
    """

    name: str
    writer: Callable[[torch.Tensor], Write]


def _write_plain(slots: torch.Tensor) -> Write:
    tokens = slots.view(-1, *slots.shape[2:])
    # A GPU's indexed write goes element by element: in half precision, wider ones are faster.
    words = as_words(slots) if slots.is_cuda else None

    def write(rows: torch.Tensor, new: torch.Tensor) -> None:
        wide = None if words is None else as_words(new)
        if words is None or wide is None:
            tokens[rows] = new
        else:
            words[rows] = wide

    return write


def as_words(tensor: torch.Tensor) -> torch.Tensor | None:
    """The same memory, `[..., H, D]`, viewed as 16-byte words `[tokens, H, words]`.

    None if rows do not consist of such words.
    """
    words = _WORD.itemsize // tensor.dtype.itemsize
    steps = (*tensor.shape[-1:], *tensor.stride()[:-1], tensor.storage_offset())
    if tensor.stride(-1) != 1 or any(step % words for step in steps):
        return None
    return tensor.view(-1, *tensor.shape[-2:]).view(_WORD)


PLAIN = KVFormat("plain", _write_plain)
"""Keys and values as the model computes them, in its dtype."""
