"""All that the scheduler sees of KV memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from batchrun.allocator.sharing import MemoryCopy


class KVSpace(Protocol):
    """All that the scheduler sees of KV memory."""

    def open(self, num_tokens: int = 0) -> int | None:
        """Take a slot meant for about `num_tokens`; None while all are taken."""

    def ensure(self, slot: int, num_tokens: int) -> bool:
        """Back tokens `[0, num_tokens)` of the slot with memory: all of them, or no change."""

    def share(self, source: int, num_shared: int, num_tokens: int, step: int) -> int | None:
        """Take a slot that begins with the first tokens of another; None while there is none.

        `num_tokens` is meant as in `open`. The shared tokens count as ensured, and must have been
        written by steps before `step`.
        """

    def take_copies(self) -> tuple[MemoryCopy, ...]:
        """Copies that `share` has ordered, to be made before the step's kernels."""

    def held_tokens(self, slot: int) -> int:
        """Leading tokens of a closed slot that still have their memory."""

    def close(self, slot: int, step: int, keep: int = 0) -> None:
        """Give the slot up; `step` is the last one that may read it.

        With `keep` its first tokens stay, for others to share, until `drop`.
        """

    def drop(self, slot: int) -> None:
        """Give up what a closed slot keeps."""

    def retire(self, step: int, coming: Iterable[tuple[int, int]] = (), others: int = 0) -> None:
        """Every step up to and including `step` has finished reading and writing.

        Memory may be prepared for tokens that are likely to be ensured soon: in open slots so many
        in all, and of sequences that have none yet some `others`.
        """

    def trim(self) -> None:
        """Give back what no slot holds tokens in: nothing is to do for now."""

    def can_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of that length could ever be held, were it alone."""

    @property
    def refusal(self) -> str:
        """Why the machine had no memory when tokens last got none; empty where a budget ended."""

    def has_room(self, num_tokens: int, spare: float) -> bool:
        """Whether so many tokens more could be held now with a part of the budget to spare."""
