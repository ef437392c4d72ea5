"""Which slots hold which tokens, so that a prefix common to several rows is computed once.

Tokens are identified in blocks, each by a hash of itself and everything before it, as in vLLM's
automatic prefix caching. But slots are contiguous, so a match need not end at a block boundary.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import pairwise

from batchrun.engine.core import Sequence
from batchrun.engine.kvspace import KVSpace

BLOCK = 16  # tokens: shorter prefixes are not shared
KEPT = 32  # maximum number of slots that keep a prefix for later rows, beside the running ones
Ids = tuple[int, ...]


def blocks_of(ids: Ids | bytes, size: int = BLOCK, *, namespace: bytes) -> tuple[int, ...]:
    """A hash per whole block, each over the block and everything before it.

    Args:
        ids: Tokens, or packed tokens as bytes.
        size: Size of a block, in elements of `ids`.
        namespace: The request's namespace, hashed before the first block.
    """
    found: list[int] = []
    value = hash(namespace)
    for begin in range(0, len(ids) - size + 1, size):
        value = hash((value, ids[begin : begin + size]))
        found.append(value)
    return tuple(found)


class SharedPrefixes:
    """What slots hold or are computing, and what the waiting sequences need of it.

    Args:
        space: Where keys and values are stored.
        active: Whether anything is shared; if not, nothing is ever found.
    """

    def __init__(self, space: KVSpace, active: bool) -> None:
        self._space = space
        self._active = active
        self._owners: dict[int, Sequence] = {}  # slot -> the running sequence
        self._origins: dict[int, tuple[tuple[int, int], ...]] = {}  # of a slot's tokens
        self._stays = 0
        self._kept: dict[int, None] = {}  # slots, the oldest first
        self._wanted = Counter[int]()  # blocks of waiting sequences
        # What slots hold, or will hold once their sequence is computed: tokens, their blocks, and
        # their namespace.
        self._tokens: dict[int, tuple[Ids, tuple[int, ...], bytes]] = {}
        self._slots: dict[int, dict[int, None]] = {}  # block -> slots, in the order of `_put`

    def read(self, sequence: Sequence) -> None:
        """Compute the blocks of the tokens that a sequence may share; called before it waits."""
        if self._active and sequence.shares:
            ids, namespace = sequence.known_ids, sequence.request.namespace
            if sequence.scoring is not None:
                ids = ids[: sequence.most_shared]
            sequence.blocks = blocks_of(ids, namespace=namespace)

    def want(self, sequence: Sequence) -> None:
        """Note that a sequence begins to wait."""
        self._wanted.update(sequence.blocks)

    def unwant(self, sequence: Sequence) -> None:
        """Note that a sequence no longer waits."""
        self._wanted.subtract(sequence.blocks)
        for block in sequence.blocks:  # a job's blocks would fill the memory
            if not self._wanted[block]:
                del self._wanted[block]

    def place(self, sequence: Sequence, waiting: Seq[Sequence]) -> int:
        """The position in the queue: after the sequences with the most in common, or at the end."""
        for depth in range(len(sequence.blocks), 0, -1):
            block = sequence.blocks[depth - 1]
            if block in self._wanted:
                for i in range(len(waiting), 0, -1):
                    if block in waiting[i - 1].blocks[depth - 1 : depth]:
                        return i
        return len(waiting)

    def match(self, sequence: Sequence) -> tuple[int, int, int]:
        """The slot that now holds most of a sequence's tokens.

        Tokens whose logits are wanted are always computed: the last one, or those that are scored.

        Returns:
            The slot, or -1; the tokens that it holds; and those that a running sequence will
            compute.
        """
        best, ready, coming = -1, 0, 0
        most = sequence.most_shared
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
        """Note that a sequence now runs in a slot, whose former contents are gone.

        Its first `shared` tokens are those of slot `source`, which may be the same slot.
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
        """Note that a newly admitted sequence will have all its known tokens in its slot."""
        assert sequence.slot is not None
        ids, blocks, namespace = sequence.known_ids, sequence.blocks, sequence.request.namespace
        if sequence.scoring is not None and self._active and sequence.shares:
            blocks = blocks_of(ids, namespace=namespace)  # others may share what it scores
        self._put(sequence.slot, ids, blocks, namespace)

    def leave(self, slot: int, keep: int) -> None:
        """Note that a sequence left its slot, which keeps `keep` leading tokens for other rows."""
        del self._owners[slot]
        if keep:
            self._kept[slot] = None
        if len(self._kept) > KEPT:
            self.drop_oldest()

    def note(self, slot: int, sequence: Sequence, num_tokens: int) -> None:
        """Note that a slot holds exactly the first `num_tokens` tokens of a sequence."""
        if self._active:
            ids, namespace = sequence.known_ids[:num_tokens], sequence.request.namespace
            self._put(slot, ids, blocks_of(ids, namespace=namespace), namespace)

    def forget(self, slot: int) -> None:
        """Stop sharing what a slot holds."""
        for block in self._blocks(slot):
            slots = self._slots[block]
            del slots[slot]
            if not slots:
                del self._slots[block]
        self._tokens.pop(slot, None)

    def worth_keeping(self, slot: int) -> int:
        """Leading tokens of a slot that waiting sequences need and no other slot holds."""
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
        """Drop kept prefixes that no waiting sequence needs, or that other slots hold too."""
        for slot in [s for s in self._kept if not self.worth_keeping(s)]:
            self._drop(slot)

    def drop_oldest(self) -> bool:
        """Drop the oldest kept prefix to free memory; False if there is none."""
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
        """Record what a slot holds from now on, replacing what it held."""
        self.forget(slot)
        self._tokens[slot] = ids, blocks, namespace
        for block in blocks:
            self._slots.setdefault(block, {})[slot] = None

    def _blocks(self, slot: int) -> tuple[int, ...]:
        return self._tokens[slot][1] if slot in self._tokens else ()

    def _matches(self, sequence: Sequence) -> Iterator[tuple[int, int]]:
        """Slots that share at least a block with a sequence, most shared blocks first.

        Each comes with its number of common tokens, found by comparing tokens, not just hashes.
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
    """Number of common leading tokens, probably at least `expected`; 0 if it is less."""
    if ids[:expected] != others[:expected]:
        return 0
    end = min(len(ids), len(others))
    return next((i for i in range(expected, end) if ids[i] != others[i]), end)
