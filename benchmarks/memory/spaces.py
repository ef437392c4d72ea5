"""What other ways to keep a KV cache would hold: static reservation and 16-token paging.

`CountedSpace` takes the same calls as `KVArena` and only counts, so that one scheduler can run one
trace over each.
"""

from collections.abc import Callable, Iterable

from batchrun.allocator.accounting import paged_blocks, paged_bytes, static_bytes
from batchrun.allocator.layout import KVLayout
from batchrun.allocator.vmm import AllocatorError


class CountedSpace:
    """Slots that take `footprint(tokens)` bytes each of a budget.

    What a slot gives up is free at once: whoever takes it next writes it in a later step, and the
    device runs steps in order. Nothing can be shared.

    Args:
        footprint: bytes that a slot of so many tokens takes, from its opening (0 tokens) on.
        budget: bytes for all slots.
        num_slots: sequences that can be open at once.
        max_tokens: tokens that a slot can hold.

    Attributes:
        used: bytes taken now.
        tokens: tokens of open slots.
    """

    refusal = ""  # a budget's end is no refusal of the machine

    def __init__(
        self, footprint: Callable[[int], int], *, budget: int, num_slots: int, max_tokens: int
    ) -> None:
        self._footprint = footprint
        self._budget = budget
        self._max_tokens = max_tokens
        self._open: dict[int, int] = {}
        self._closed = list(range(num_slots))
        self.used = self.tokens = 0

    def open(self, num_tokens: int = 0) -> int | None:
        """Take a slot; None when all are open, or there are no bytes for one more."""
        if not self._closed or self.used + self._footprint(0) > self._budget:
            return None
        slot = self._closed.pop()
        self._open[slot] = 0
        self.used += self._footprint(0)
        return slot

    def ensure(self, slot: int, num_tokens: int) -> bool:
        """Make room for the tokens [0, num_tokens) of an open slot; False where there is none."""
        before = self._open.get(slot)
        if before is None or num_tokens > self._max_tokens:
            raise AllocatorError(f"slot {slot} is not open, or cannot hold {num_tokens} tokens")
        more = self._footprint(num_tokens) - self._footprint(before)
        if self.used + more > self._budget:
            return False
        self.used += more
        self.tokens += num_tokens - before
        self._open[slot] = num_tokens
        return True

    def close(self, slot: int, step: int, keep: int = 0) -> None:
        """Give up all that an open slot has."""
        tokens = self._open.pop(slot)
        self.used -= self._footprint(tokens)
        self.tokens -= tokens
        self._closed.append(slot)

    def retire(self, step: int, coming: Iterable[tuple[int, int]] = (), others: int = 0) -> None:
        """Nothing waits for a step."""

    def trim(self) -> None:
        """Nothing is held that no slot has."""

    def share(self, source: int, num_shared: int, num_tokens: int, step: int) -> int | None:
        """None: nothing is shared here."""

    def fork(self, source: int, step: int) -> int | None:
        """None: nothing is shared here."""

    def drop(self, slot: int) -> None:
        """Nothing is kept here."""

    def held_tokens(self, slot: int) -> int:
        """A closed slot has nothing."""
        return self._open.get(slot, 0)

    def take_copies(self) -> tuple[()]:
        """Nothing is ever copied."""
        return ()

    def can_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` tokens could be held if it were alone."""
        return num_tokens <= self._max_tokens and self._footprint(num_tokens) <= self._budget

    def has_room(self, num_tokens: int, spare: float) -> bool:
        """Whether so many tokens more could be held now with a part of the budget to spare.

        Where slots never grow, nothing has to be spared.
        """
        grows = self._footprint(0) < self._footprint(self._max_tokens)
        return self.used + self._footprint(num_tokens) <= (1 - spare * grows) * self._budget


def static_space(layout: KVLayout, *, budget: int, num_slots: int) -> CountedSpace:
    """Every slot takes `layout.max_tokens` tokens from the start: nothing is ever mapped."""
    whole, tokens = static_bytes(layout, 1), layout.max_tokens
    return CountedSpace(lambda _: whole, budget=budget, num_slots=num_slots, max_tokens=tokens)


def paged_space(layout: KVLayout, *, budget: int, num_slots: int) -> CountedSpace:
    """Every slot takes whole blocks of 16 tokens, as in PagedAttention (arXiv 2309.06180)."""
    return CountedSpace(
        lambda tokens: paged_bytes(layout, paged_blocks(tokens)),
        budget=budget,
        num_slots=num_slots,
        max_tokens=layout.max_tokens,
    )
