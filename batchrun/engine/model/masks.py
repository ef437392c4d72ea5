"""Reads from transformers' mask functions which keys a layer's own mask lets a query see.

Not every model tells its attention function about a window: some put it only into the mask, which
is never made for attention that needs none. So one forward makes all masks, and they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AttentionMaskInterface

PROBE = "batchrun-probe"
_SEEN = "batchrun_seen"  # on a mask: which keys it lets queries see
_MOST = 1 << 22  # tokens of context to look at: no window or chunk is longer


@dataclass(frozen=True)
class Seen:
    """Which keys a query at position p sees: all up to p, the last `window`, or its own chunk's.

    A chunk is the positions `[i * chunk, (i + 1) * chunk)`.
    """

    window: int | None = None
    chunk: int | None = None

    def first(self, position: int) -> int:
        """The first key that the query at a position sees; the last is its own."""
        if self.chunk is not None:
            return position - position % self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)

    def within(self, context: int) -> Seen:
        """The same for sequences of so many tokens; windows and chunks that long are dropped."""
        window, chunk = (n if n and n < context else None for n in (self.window, self.chunk))
        return Seen(window, chunk)


def make_masks(context: int) -> None:
    """Have a forward with the attention `PROBE` make and read all its masks: see `seen_by`.

    Args:
        context: Maximum tokens of a sequence.
    """
    context = min(context, _MOST)

    def make(
        q_length: int,
        kv_length: int,
        mask_function: Callable[..., Any],
        device: torch.device | str = "cpu",
        **_: Any,
    ) -> torch.Tensor:
        """A mask as transformers asks for it, `[1, 1, q_length, kv_length]`."""
        mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
        keys = torch.arange(context, device="cpu" if mask.is_meta else mask.device)
        none = keys.new_zeros(1)

        def row(position: int) -> torch.Tensor:
            got = mask_function(none, none, none + position, keys)
            return torch.as_tensor(got).expand(context).cpu()

        # A mask function made for this batch alone can't be read.
        with NoNumbers(filling=True), suppress(TypeError, ValueError, IndexError, RuntimeError):
            setattr(mask, _SEEN, _read(row, context))
        return mask

    AttentionMaskInterface.register(PROBE, make)


def seen_by(mask: torch.Tensor | None) -> Seen | None:
    """Which keys a mask made by `make_masks` lets queries see; None if that is unknown."""
    return getattr(mask, _SEEN, None)


class NoNumbers(TorchFunctionMode):
    """Gives tensors on torch's meta device values, to probe a model before it has weights.

    In a mask function such tensors mean padding, and there is none. Models test positions only to
    learn whether they are one sequence, and they are: such a test is true.

    Args:
        filling: Whether every call gets zeros in place of such tensors.
    """

    def __init__(self, *, filling: bool = False) -> None:
        super().__init__()
        self._filling = filling

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        """See `TorchFunctionMode`."""

        def filled(value: Any) -> Any:
            is_meta = isinstance(value, torch.Tensor) and value.is_meta
            return torch.zeros(value.shape, dtype=value.dtype) if is_meta else value

        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if self._filling:
            args = tuple(map(filled, args))
        return func(*args, **(kwargs or {}))


def _read(row: Callable[[int], torch.Tensor], context: int) -> Seen | None:
    """What explains the rows `[context]` of a mask; None if nothing known does."""
    last = context - 1
    first = int(row(last).nonzero()[0])
    guesses = [Seen(), Seen(window=last - first + 1)]
    if first:
        guesses.append(Seen(chunk=first - int(row(first - 1).nonzero()[0])))
    for guess in guesses:
        size = guess.window or guess.chunk or 1
        looked_at = {0, 1, size - 1, size, size + 1, first, first - 1, last // 2, last - 1, last}
        if all(
            torch.equal(row(p).nonzero()[:, 0], torch.arange(guess.first(p), p + 1))
            for p in sorted(looked_at)
            if 0 <= p < context
        ):
            return guess
    return None


def named_windows(config: Any) -> Iterable[int]:
    """Attention windows and chunks, in tokens, that a model's config names anywhere."""
    values = config.to_dict()
    for key, value in values.items():
        if key == "sliding_window" and values.get("use_sliding_window") is False:
            continue
        is_size = ("window" in key and "layer" not in key) or key == "attention_chunk_size"
        if is_size or key == "local_attention":
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, int) and not isinstance(each, bool) and each > 0:
                    yield each
