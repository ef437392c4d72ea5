"""Physical pages that outlive the sequences that use them, within a budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from batchrun.allocator.vmm import AllocatorError, Handle, OutOfBudget, OutOfPages, VirtualMemory


@dataclass(slots=True)
class Work:
    """Calls made so far, and the seconds they took."""

    calls: int = 0
    seconds: float = 0.0

    def add(self, begin: float) -> None:
        """Count a call that began at `begin` and ends now."""
        self.calls += 1
        self.seconds += perf_counter() - begin


class PagePool:
    """Pages of a `VirtualMemory`, created in batches on demand and kept for reuse.

    A page is free or in use. The memory counts how often it is mapped (`VirtualMemory.counts`): a
    page that is passed to `release` stays in use until it is mapped nowhere.

    Args:
        memory: where pages come from. The pool destroys only what it created.
        budget: bytes of pages to hold at most: a number, or a function that is called at most once
            between two calls of `remeasure`; None for as much as the machine has.
        batch: how many pages to create at once, at most, when fewer are wanted. The pool grows by a
            small fraction of itself, so that a small cache does not hold a large one's spare pages.

    Attributes:
        created: pages held now, free and in use.
        known_budget: bytes of the budget, as last asked for; None before, or without one.
        acquired: pages taken so far.
        creating, destroying: the work done so far.
    """

    def __init__(
        self,
        memory: VirtualMemory,
        budget: int | Callable[[], int] | None = None,
        *,
        batch: int = 8,
    ) -> None:
        self._memory = memory
        self._page_bytes = memory.granularity * memory.planes
        self._budget = budget
        self.known_budget: int | None = None
        self._measured: int | None = None  # by the function, since the last `remeasure`
        self._batch = batch
        self._free: list[Handle] = []
        self._used: set[Handle] = set()
        self._refused = False  # creating ahead failed; no growth has succeeded since
        self.created = 0
        self.acquired = 0
        self.creating = Work()
        self.destroying = Work()

    @property
    def free(self) -> int:
        """Pages ready to be acquired without growing."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """Pages that were acquired and not yet freed by `release`."""
        return len(self._used)

    def page_budget(self) -> int | None:
        """How many pages the budget allows now; None if there is no budget."""
        budget = self._budget
        if callable(budget):
            if self._measured is None:
                self._measured = budget()
            budget = self._measured
        self.known_budget = budget
        return None if budget is None else max(0, budget // self._page_bytes)

    def acquire(self, count: int) -> list[Handle]:
        """Take `count` pages that are mapped nowhere. Their contents are undefined.

        Raises:
            OutOfPages: the budget or the machine does not have that many. Nothing was taken.
        """
        if count > len(self._free):
            self._grow(count - len(self._free))
        at = len(self._free) - count
        taken = self._free[at:]
        del self._free[at:]
        self._used.update(taken)
        self.acquired += count
        return taken

    def release(self, handles: Sequence[Handle]) -> int:
        """Free those of the given pages that are mapped nowhere. Returns how many were freed."""
        for handle in handles:
            if handle not in self._used:
                raise AllocatorError(f"cannot release page {handle}: it is not in use")
        counts = self._memory.counts
        unused = [handle for handle in dict.fromkeys(handles) if not counts[handle]]
        self._used.difference_update(unused)
        self._free += unused
        return len(unused)

    def remeasure(self) -> None:
        """Call the budget function again when the budget is next needed."""
        self._measured = None

    def stock(self, count: int, budget: int | None) -> None:
        """Create `count` pages ahead of need; none if the machine refuses.

        Args:
            count: pages wanted; fewer are created if the budget ends first.
            budget: pages to hold at most, as returned by `page_budget`.
        """
        if budget is not None:
            count = min(count, budget - self.created)
        if count <= 0 or self._refused:
            return
        try:
            self._create(count)
        except OutOfPages:
            self._refused = True

    def shrink(self, keep: int = 0) -> int:
        """Destroy free pages until at most `keep` remain. Returns how many were destroyed."""
        excess = len(self._free) - keep
        if excess <= 0:
            return 0
        begin = perf_counter()
        self._memory.destroy(self._free[keep:])
        self.destroying.add(begin)
        del self._free[keep:]
        self.created -= excess
        return excess

    def _grow(self, count: int) -> None:
        """Create at least `count` pages, and a few more if possible."""
        wanted = max(count, min(self._batch, self.created // 32))
        budget = self.page_budget()
        if budget is not None:
            room = max(0, budget - self.created)
            if room < count:
                page = self._page_bytes
                raise OutOfBudget(
                    f"cannot add {count} pages of {page} bytes: the KV budget of "
                    f"{budget * page} bytes has room for {room}; "
                    "raise the budget or run fewer sequences at once"
                )
            wanted = min(wanted, room)
        try:
            self._create(wanted)
        except OutOfPages:
            if wanted == count:
                raise
            self._create(count)
        self._refused = False

    def _create(self, count: int) -> None:
        begin = perf_counter()
        try:
            handles = self._memory.create(count)
        finally:
            self.creating.seconds += perf_counter() - begin
        self.creating.calls += 1
        self.created += count
        self._free += handles
