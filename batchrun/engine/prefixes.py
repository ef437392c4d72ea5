"""Which slots hold which tokens, so that a prefix that rows have in common is computed once.

Tokens are known by blocks, each by a hash of itself and all before it, as in vLLM's automatic
prefix caching; but a slot is contiguous, so a match need not end where a block does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

BLOCK = 16  # tokens: no shorter prefix is shared
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


@dataclass(frozen=True, slots=True)
class Match:
    """A slot that begins with the same tokens.

    Attributes:
        slot: The slot.
        num_tokens: Leading tokens in common that it will have.
        num_ready: Of these, those that it has now.
    """

    slot: int
    num_tokens: int
    num_ready: int


class PrefixIndex:
    """The tokens that slots have, or will have once their sequence has been computed.

    Args:
        ready: Says how many of a slot's tokens are computed by now.
    """

    def __init__(self, ready: Callable[[int], int]) -> None:
        self._ready = ready
        # Tokens, their blocks, and the namespace of both.
        self._tokens: dict[int, tuple[Ids, tuple[int, ...], bytes]] = {}
        self._slots: dict[int, dict[int, None]] = {}  # block -> slots, in the order of `put`

    def put(self, slot: int, ids: Ids, blocks: tuple[int, ...], namespace: bytes) -> None:
        """Note what a slot has from now on, in the place of what it had."""
        self.remove(slot)
        self._tokens[slot] = ids, blocks, namespace
        for block in blocks:
            self._slots.setdefault(block, {})[slot] = None

    def remove(self, slot: int) -> None:
        """Forget a slot."""
        for block in self._tokens.pop(slot, ((), (), b""))[1]:
            slots = self._slots[block]
            del slots[slot]
            if not slots:
                del self._slots[block]

    def blocks(self, slot: int) -> tuple[int, ...]:
        """The blocks of what a slot has."""
        return self._tokens[slot][1] if slot in self._tokens else ()

    def length(self, slot: int, depth: int) -> int:
        """Tokens of a slot that those may have in common with it who have its first blocks."""
        return min(len(self._tokens[slot][0]), (depth + 1) * BLOCK - 1)

    def holders(self, block: int) -> Iterable[int]:
        """Slots that have a block, and all before it."""
        return self._slots.get(block, ())

    def matches(self, ids: Ids, blocks: tuple[int, ...], namespace: bytes) -> Iterator[Match]:
        """Slots that have at least a block in common with tokens, by blocks the longest first.

        A hash alone is not believed: the tokens are compared.
        """
        levels = []
        for block in blocks:
            slots = self._slots.get(block)
            if slots is None:
                break
            levels.append(slots)
        seen: set[int] = set()
        for depth in range(len(levels), 0, -1):
            if depth < len(levels) and len(levels[depth - 1]) == len(levels[depth]):
                continue  # the same slots
            for slot in levels[depth - 1]:
                if slot not in seen:
                    seen.add(slot)
                    others, _, theirs = self._tokens[slot]
                    common = common_length(ids, others, depth * BLOCK)
                    if common and theirs == namespace:
                        yield Match(slot, common, min(common, self._ready(slot)))


def common_length(ids: Ids, others: Ids, expected: int) -> int:
    """Leading tokens in common, of which `expected` are likely; 0 where they differ earlier."""
    if ids[:expected] != others[:expected]:
        return 0
    end = min(len(ids), len(others))
    return next((i for i in range(expected, end) if ids[i] != others[i]), end)
