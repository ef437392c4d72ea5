"""The scheduler's view of KV memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from batchrun.allocator.sharing import MemoryCopy


class KVSpace(Protocol):
    """The scheduler's view of KV memory."""

    def open(self, num_tokens: int = 0) -> int | None:
        """Take a slot meant for about `num_tokens`; None while none is available."""

    def ensure(self, slot: int, num_tokens: int) -> bool:
        """Back tokens `[0, num_tokens)` of the slot with memory. False means no change."""

    def share(self, source: int, num_shared: int, num_tokens: int, step: int) -> int | None:
        """Take a slot that begins with the first tokens of another; None if there is none.

        `num_tokens` is as in `open`. The shared tokens count as ensured, and must have been written
        by steps before `step`.
        """

    def take_copies(self) -> tuple[MemoryCopy, ...]:
        """Copies that `share` ordered, to be made before the step's kernels."""

    def held_tokens(self, slot: int) -> int:
        """Leading tokens of a closed slot that still have memory."""

    def close(self, slot: int, step: int, keep: int = 0) -> None:
        """Give up the slot; `step` is the last one that may read it.

        With `keep`, its first tokens stay, for others to share, until `drop`.
        """

    def drop(self, slot: int) -> None:
        """Give up what a closed slot keeps."""

    def retire(self, step: int, coming: Iterable[tuple[int, int]] = (), others: int = 0) -> None:
        """Note that every step up to and including `step` has finished reading and writing.

        Memory may be prepared for tokens that will probably be ensured soon. `coming` gives open
        slots with their total tokens; `others` counts tokens of sequences that have no slot yet.
        """

    def trim(self) -> None:
        """Give back memory that holds no slot's tokens, as there is nothing to do for now."""

    def can_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of that length could ever be held, on its own."""

    @property
    def refusal(self) -> str:
        """Why the machine had no memory when tokens last got none; empty if the budget ran out."""

    def has_room(self, num_tokens: int, spare: float) -> bool:
        """Whether `num_tokens` more tokens fit now with a fraction `spare` of the budget left."""
