"""Which slots hold which tokens, so that a prefix that rows have in common is computed once.

Tokens are known by blocks, each by a hash of itself and all before it, as in vLLM's automatic
prefix caching; but a slot is contiguous, so a match need not end where a block does.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import pairwise

from batchrun.engine.core import Sequence
from batchrun.engine.kvspace import KVSpace

BLOCK = 16  # tokens: no shorter prefix is shared
KEPT = 32  # slots at most that keep a prefix for rows to come, beside those of running sequences
Ids = tuple[int, ...]


def blocks_of(ids: Ids | bytes, size: int = BLOCK, *, namespace: bytes) -> tuple[int, ...]:
    """A hash of each whole block and all before it.

    Args:
        ids: Tokens.
        size: Of a block; that of packed tokens, if they are.
        namespace: Of the request: what is before the first block.
    """
    found: list[int] = []
    value = hash(namespace)
    for begin in range(0, len(ids) - size + 1, size):
        value = hash((value, ids[begin : begin + size]))
        found.append(value)
    return tuple(found)


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
        # What slots have, or will have once their sequence has been computed: tokens, their blocks,
        # and the namespace of both.
        self._tokens: dict[int, tuple[Ids, tuple[int, ...], bytes]] = {}
        self._slots: dict[int, dict[int, None]] = {}  # block -> slots, in the order of `_put`

    def read(self, sequence: Sequence) -> None:
        """Take the blocks of the tokens that a sequence has now; to be called before it waits."""
        if self._active and sequence.shares:
            namespace = sequence.request.namespace
            sequence.blocks = blocks_of(sequence.known_ids, namespace=namespace)

    def want(self, sequence: Sequence) -> None:
        """A sequence begins to wait."""
        self._wanted.update(sequence.blocks)

    def unwant(self, sequence: Sequence) -> None:
        """A sequence no longer waits."""
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

    def match(self, sequence: Sequence) -> tuple[int, int, int]:
        """The slot that has most of a sequence's tokens by now.

        Its last token is computed in any case: its logits are wanted.

        Returns:
            The slot, -1 for none; the tokens that it has; and those that a running sequence will.
        """
        best, ready, coming = -1, 0, 0
        most = sequence.num_tokens - 1
        for slot, equal in self._matches(sequence) if sequence.blocks else ():
            common = min(most, equal)
            now = min(common, self._ready(slot))
            if now > ready:
                best, ready = slot, now
            if now == common:
                break  # others have less in common
            if slot in self._owners:
                coming = max(coming, common)
        return best, ready, coming

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
        self.forget(slot)
        self._owners[slot] = sequence

    def expect(self, sequence: Sequence) -> None:
        """A sequence that waited until now will have all its known tokens in its slot."""
        assert sequence.slot is not None
        self._put(sequence.slot, sequence.known_ids, sequence.blocks, sequence.request.namespace)

    def leave(self, slot: int, keep: int) -> None:
        """A sequence has left its slot, which keeps its first `keep` tokens for other rows."""
        del self._owners[slot]
        if keep:
            self._kept[slot] = None
        if len(self._kept) > KEPT:
            self.drop_oldest()

    def note(self, slot: int, sequence: Sequence, num_tokens: int) -> None:
        """A slot has so many tokens of a sequence computed, and no more."""
        if self._active:
            ids, namespace = sequence.known_ids[:num_tokens], sequence.request.namespace
            self._put(slot, ids, blocks_of(ids, namespace=namespace), namespace)

    def forget(self, slot: int) -> None:
        """What a slot has is not shared any more."""
        for block in self._blocks(slot):
            slots = self._slots[block]
            del slots[slot]
            if not slots:
                del self._slots[block]
        self._tokens.pop(slot, None)

    def worth_keeping(self, slot: int) -> int:
        """Leading tokens of a slot that waiting sequences need and no other slot has."""
        blocks = self._blocks(slot)
        for depth in range(len(blocks), 0, -1):
            if blocks[depth - 1] in self._wanted:
                held = any(
                    other != slot
                    and (other in self._owners or other in self._kept)
                    and self._ready(other) >= depth * BLOCK
                    for other in self._slots[blocks[depth - 1]]
                )
                # A row that needs these blocks may also begin with some tokens of the next one.
                return 0 if held else min(len(self._tokens[slot][0]), (depth + 1) * BLOCK - 1)
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

    def _put(self, slot: int, ids: Ids, blocks: tuple[int, ...], namespace: bytes) -> None:
        """Note what a slot has from now on, in the place of what it had."""
        self.forget(slot)
        self._tokens[slot] = ids, blocks, namespace
        for block in blocks:
            self._slots.setdefault(block, {})[slot] = None

    def _blocks(self, slot: int) -> tuple[int, ...]:
        return self._tokens[slot][1] if slot in self._tokens else ()

    def _matches(self, sequence: Sequence) -> Iterator[tuple[int, int]]:
        """Slots that have at least a block in common with a sequence, by blocks the longest first.

        Each with the tokens in common. A hash alone is not believed: the tokens are compared.
        """
        ids, seen = sequence.known_ids, set[int]()
        levels = []
        for block in sequence.blocks:
            slots = self._slots.get(block)
            if slots is None:
                break
            levels.append(slots)
        for depth in range(len(levels), 0, -1):
            if depth < len(levels) and len(levels[depth - 1]) == len(levels[depth]):
                continue  # the same slots
            for slot in levels[depth - 1]:
                if slot not in seen:
                    seen.add(slot)
                    others, _, namespace = self._tokens[slot]
                    common = common_length(ids, others, depth * BLOCK)
                    if common and namespace == sequence.request.namespace:
                        yield slot, common


def common_length(ids: Ids, others: Ids, expected: int) -> int:
    """Leading tokens in common, of which `expected` are likely; 0 where they differ earlier."""
    if ids[:expected] != others[:expected]:
        return 0
    end = min(len(ids), len(others))
    return next((i for i in range(expected, end) if ids[i] != others[i]), end)
