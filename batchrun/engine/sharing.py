"""Who shares whose memory: what slots have of the tokens that rows need, now or later."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import pairwise

from batchrun.engine.core import Sequence
from batchrun.engine.kvspace import KVSpace
from batchrun.engine.prefixes import BLOCK, Match, PrefixIndex, blocks_of

KEPT = 32  # slots at most that keep a prefix for rows to come, beside those of running sequences


class SharedPrefixes:
    """What running sequences compute and closed slots still have, and what waiting ones need of it.

    Args:
        space: Where keys and values live.
        active: Whether anything is shared; else nothing is ever found.
    """

    def __init__(self, space: KVSpace, active: bool) -> None:
        self._space = space
        self._active = active
        self._owners: dict[int, Sequence] = {}  # slot -> the running sequence
        self._origins: dict[int, tuple[tuple[int, int], ...]] = {}  # of a slot's tokens, up to ends
        self._stays = 0
        self._kept: dict[int, None] = {}  # slots, the oldest first
        self._wanted = Counter[int]()  # blocks of waiting sequences
        self._index = PrefixIndex(self._ready)

    def read(self, sequence: Sequence) -> None:
        """Take the blocks of the tokens that a sequence has now; to be called before it waits."""
        if self._active and sequence.shares:
            namespace = sequence.request.namespace
            sequence.blocks = blocks_of(sequence.known_ids, namespace=namespace)

    def want(self, sequence: Sequence) -> None:
        """A sequence begins to wait."""
        self._wanted.update(sequence.blocks)

    def unwant(self, sequence: Sequence) -> None:
        """A sequence waits no longer."""
        self._wanted.subtract(sequence.blocks)
        for block in sequence.blocks:  # a job has more blocks than memory is for
            if not self._wanted[block]:
                del self._wanted[block]

    def place(self, sequence: Sequence, waiting: Seq[Sequence]) -> int:
        """Where in the queue: behind those that it has most in common with, or at the end."""
        for depth in range(len(sequence.blocks), 0, -1):
            block = sequence.blocks[depth - 1]
            if block in self._wanted:
                for i in range(len(waiting), 0, -1):
                    if block in waiting[i - 1].blocks[depth - 1 : depth]:
                        return i
        return len(waiting)

    def match(self, sequence: Sequence) -> tuple[Match, int]:
        """Where most of a sequence's tokens are by now, and how many a running one will have.

        Its last token is computed in any case: its logits are wanted.
        """
        best, coming = Match(-1, 0, 0), 0
        if not sequence.blocks:
            return best, coming
        most = sequence.num_tokens - 1
        for match in self._index.matches(
            sequence.known_ids, sequence.blocks, sequence.request.namespace
        ):
            if match.num_ready > best.num_ready:
                best = replace(match, num_ready=min(most, match.num_ready))
            if match.num_ready == match.num_tokens:
                break  # others have less in common
            if match.slot in self._owners:
                coming = max(coming, min(most, match.num_tokens))
        return best, coming

    def begin(self, sequence: Sequence, slot: int, source: int, shared: int) -> None:
        """A sequence runs in a slot from now on; what that had is gone.

        Its first `shared` tokens are those of slot `source`, which may be the same one.
        """
        sequence.inherited = tuple(
            (min(end, shared), origin)
            for (begin, _), (end, origin) in pairwise(((0, 0), *self._origins.get(source, ())))
            if begin < shared
        )
        self._stays += 1
        sequence.key = self._stays
        self._origins[slot] = (*sequence.inherited, (sys.maxsize, sequence.key))
        self._index.remove(slot)
        self._owners[slot] = sequence

    def expect(self, sequence: Sequence) -> None:
        """A sequence that waited until now will have all its known tokens in its slot."""
        assert sequence.slot is not None
        namespace = sequence.request.namespace
        self._index.put(sequence.slot, sequence.known_ids, sequence.blocks, namespace)

    def leave(self, slot: int, keep: int) -> None:
        """A sequence has left its slot, which keeps some tokens, or else is any closed one."""
        del self._owners[slot]
        if keep:
            self._kept[slot] = None
        if len(self._kept) > KEPT:
            self.drop_oldest()

    def note(self, slot: int, sequence: Sequence, num_tokens: int) -> None:
        """A slot has so many tokens of a sequence computed, and no more."""
        if self._active:
            ids, namespace = sequence.known_ids[:num_tokens], sequence.request.namespace
            self._index.put(slot, ids, blocks_of(ids, namespace=namespace), namespace)

    def forget(self, slot: int) -> None:
        """Nobody knows what a slot has."""
        self._index.remove(slot)

    def worth_keeping(self, slot: int) -> int:
        """Leading tokens of a slot that waiting sequences need and no other slot has."""
        blocks = self._index.blocks(slot)
        for depth in range(len(blocks), 0, -1):
            if blocks[depth - 1] in self._wanted:
                held = any(
                    other != slot
                    and (other in self._owners or other in self._kept)
                    and self._ready(other) >= depth * BLOCK
                    for other in self._index.holders(blocks[depth - 1])
                )
                return 0 if held else self._index.length(slot, depth)
        return 0

    def drop_unwanted(self) -> None:
        """Give up kept prefixes that no waiting sequence needs, or that others have too."""
        for slot in [s for s in self._kept if not self.worth_keeping(s)]:
            self._drop(slot)

    def drop_oldest(self) -> bool:
        """Give up a kept prefix, for want of memory; False where there is none."""
        slot = next(iter(self._kept), None)
        if slot is not None:
            self._drop(slot)
        return slot is not None

    def _ready(self, slot: int) -> int:
        """Tokens of a slot that launched steps have computed."""
        owner = self._owners.get(slot)
        return self._space.held_tokens(slot) if owner is None else owner.num_computed_tokens

    def _drop(self, slot: int) -> None:
        del self._kept[slot]
        self._space.drop(slot)
