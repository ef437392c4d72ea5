"""Physical pages that outlive the sequences using them: budget, references, fences."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from time import perf_counter

from batchrun.allocator.vmm import AllocatorError, Handle, OutOfBudget, OutOfPages, VirtualMemory


class PagePool:
    """Pages of a `VirtualMemory`, created in batches on demand and kept for reuse.

    A page is free, or in use (one or more references), or parked: unreferenced, but a step that
    was launched earlier may still read it.

    Args:
        memory: where pages come from. The pool destroys only what it created.
        budget: bytes of pages to hold at most, now: a number, or a function that is asked at most
            once between two calls of `retire`; None for as much as the machine has.
        batch: pages to create at once at most when fewer are wanted. The pool grows by a small part
            of itself, so that a small cache does not hold a large one's spare pages.

    Attributes:
        created: pages held now: free, in use and parked.
        acquired: pages taken so far.
        create_calls, create_seconds, destroy_calls, destroy_seconds: work done so far.
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
        self._measured: int | None = None  # what the function said since the last `retire`
        self._batch = batch
        self._free: list[Handle] = []
        self._references: dict[Handle, int] = {}
        self._parked: deque[tuple[int, list[Handle]]] = deque()  # steps ascending
        self._refused = False  # creating ahead failed, and growing on demand has not succeeded yet
        self.created = 0
        self.acquired = 0
        self.create_calls = 0
        self.create_seconds = 0.0
        self.destroy_calls = 0
        self.destroy_seconds = 0.0

    @property
    def free(self) -> int:
        """Pages ready to be acquired without growing."""
        return len(self._free)

    @property
    def in_use(self) -> int:
        """Pages with at least one reference."""
        return len(self._references)

    @property
    def parked(self) -> int:
        """Pages that wait for `retire`."""
        return self.created - self.free - self.in_use

    def page_budget(self) -> int | None:
        """Pages that the budget allows to hold now; None where there is no budget."""
        budget = self._budget
        if callable(budget):
            if self._measured is None:
                self._measured = budget()
            budget = self._measured
        return None if budget is None else max(0, budget // self._page_bytes)

    def acquire(self, count: int) -> list[Handle]:
        """Take `count` pages, with one reference each and undefined contents.

        Raises:
            OutOfPages: the budget or the machine has not that many. Nothing was taken.
        """
        if count > len(self._free):
            self._grow(count - len(self._free))
        at = len(self._free) - count
        taken = self._free[at:]
        del self._free[at:]
        self._references.update(dict.fromkeys(taken, 1))
        self.acquired += count
        return taken

    def addref(self, handles: Sequence[Handle]) -> None:
        """Add a reference to each page in use."""
        for handle in handles:
            if handle not in self._references:
                raise AllocatorError(f"cannot share page {handle}: it is not in use")
        for handle in handles:
            self._references[handle] += 1

    def release(self, handles: Sequence[Handle], step: int | None = None) -> int:
        """Drop a reference from each page; pages without one become free.

        Args:
            handles: pages in use, each at most as often as it has references.
            step: the last step that may read the pages: they are parked until it is retired.
                None when no step can.

        Returns:
            The number of pages that have no reference any more.
        """
        for handle, times in Counter(handles).items():
            held = self._references.get(handle, 0)
            if times > held:
                raise AllocatorError(f"page {handle} has {held} references; {times} are released")
        if step is not None and self._parked and step < self._parked[-1][0]:
            raise AllocatorError(f"step {step} comes before step {self._parked[-1][0]}")
        unused: list[Handle] = []
        for handle in handles:
            self._references[handle] -= 1
            if not self._references[handle]:
                del self._references[handle]
                unused.append(handle)
        if step is None:
            self._free += unused
        elif unused:
            self._parked.append((step, unused))
        return len(unused)

    def retire(self, step: int) -> None:
        """Free the pages parked for steps up to and including `step`; ask for the budget anew."""
        self._measured = None
        while self._parked and self._parked[0][0] <= step:
            self._free += self._parked.popleft()[1]

    def stock(self, count: int, budget: int | None) -> None:
        """Create `count` pages ahead of need; none where the machine refuses.

        Args:
            count: pages wanted; fewer are created where the budget ends.
            budget: pages to hold at most, as `page_budget` says.
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
        """Destroy free pages until at most `keep` of them remain. Returns how many were."""
        excess = len(self._free) - keep
        if excess <= 0:
            return 0
        begin = perf_counter()
        self._memory.destroy(self._free[keep:])
        self.destroy_seconds += perf_counter() - begin
        self.destroy_calls += 1
        del self._free[keep:]
        self.created -= excess
        return excess

    def check(self) -> None:
        """Raise AssertionError where the pool contradicts itself."""
        parked = [handle for _, handles in self._parked for handle in handles]
        every = [*self._free, *self._references, *parked]
        assert len(set(every)) == len(every), "a page is in two of free, in use, parked"
        assert len(every) == self.created, f"{len(every)} pages known, {self.created} created"
        assert all(n > 0 for n in self._references.values()), "a page in use has no reference"
        steps = [step for step, _ in self._parked]
        assert steps == sorted(steps), f"parked steps are out of order: {steps}"

    def references(self, handle: Handle) -> int:
        """References of a page; 0 when it is free or parked."""
        return self._references.get(handle, 0)

    def _grow(self, count: int) -> None:
        """Create at least `count` pages, some more where possible."""
        wanted = max(count, min(self._batch, self.created // 32))
        budget = self.page_budget()
        if budget is not None:
            room = max(0, budget - self.created)
            if room < count:
                page = self._page_bytes
                raise OutOfBudget(
                    f"{count} more pages of {page} bytes are wanted, and the KV budget of "
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
            self.create_seconds += perf_counter() - begin
        self.create_calls += 1
        self.created += count
        self._free += handles
