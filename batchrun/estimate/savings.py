"""What planning saves: simulates a run of the same rows in file order and in planned order.

Only one of the two is really computed, so this is an estimate. The simulation knows each answer's
length and the prompts' prefixes; it ignores memory shortage and draft tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapreplace
from threading import Lock
from typing import NamedTuple

from batchrun.engine.prefixes import BLOCK, blocks_of
from batchrun.runner.planner import WIDTH, Waiting

# Rows behind the running ones that can still share what these compute: three quarters of the
# engine's queue of 256, as counted with the real scheduler (benchmarks/plancounts.py).
_QUEUED = 192
_OPEN = 1 << 15  # rows that may wait for their lengths in one order; more than a plan holds


class BatchModel:
    """Counts the steps of continuous batching: a row takes the place of the first that ends.

    A step computes one token of each generating sequence and, with the rest of its budget, prompts
    one after the other.

    Args:
        places: Maximum sequences that run at once.
        budget: Maximum tokens in a step.
    """

    def __init__(self, places: int, budget: int) -> None:
        self._free = [0.0] * places  # the step in which each place becomes free, as a heap
        self._prompt_rate = max(budget - places, budget // 8, 1)
        self._prompted = 0.0  # the step by which all prompts so far are computed

    def add(self, prompt: int, steps: float) -> None:
        """Add a row, with the prompt tokens to compute and the steps to generate in."""
        self._prompted = max(self._prompted, self._free[0]) + prompt / self._prompt_rate
        heapreplace(self._free, self._prompted + steps)

    @property
    def steps(self) -> float:
        """Steps until all rows have ended."""
        return max(self._free)

    @property
    def tail(self) -> float:
        """Steps at the end during which at least half of the places are empty."""
        return self.steps - sorted(self._free)[(len(self._free) - 1) // 2]


class Saved(NamedTuple):
    """What file order would have cost in addition, at least 0.

    Attributes:
        prompt_tokens: Prompt tokens to compute.
        steps: Steps, as a share of the plan's steps.
        tail: Steps with at least half of the places empty, likewise as a share.
    """

    prompt_tokens: int = 0
    steps: float = 0.0
    tail: float = 0.0


class Savings:
    """Compares the two orders; any thread may call.

    Args:
        places: Maximum sequences that run at once.
        budget: Maximum tokens in a step.
        share: Whether common prefixes are computed once.
    """

    def __init__(self, places: int, budget: int, *, share: bool) -> None:
        self._file, self._plan = (_Order(places, budget, share) for _ in range(2))
        self._lock = Lock()

    def read(self, row: Waiting, expected: float) -> None:
        """Add a row in file order.

        Args:
            row: A row to compute, or a duplicate of another one.
            expected: Expected tokens of its answer.
        """
        with self._lock:
            self._file.add(row, expected)

    def put(self, row: Waiting, expected: float) -> None:
        """Add a row to compute, in planned order."""
        with self._lock:
            self._plan.add(row, expected)

    def end(self, row: int, sample: int, tokens: int) -> None:
        """Note the length of a row's answer, its own or one taken from another row."""
        with self._lock:
            for order in (self._file, self._plan):
                order.end((row, sample), tokens)

    def saved(self) -> Saved:
        """What the plan saved; nothing while rows are unfinished, or if the run was cut short."""
        file, plan = self._file, self._plan
        with self._lock:
            if file.open or plan.open or not plan.slots.steps:
                return Saved()
            return Saved(
                max(0, file.prompt_tokens - plan.prompt_tokens),
                max(0.0, file.slots.steps / plan.slots.steps - 1),
                max(0.0, (file.slots.tail - plan.slots.tail) / plan.slots.steps),
            )


class _Order:
    """Rows in one order.

    Attributes:
        slots: Simulates the first rows, up to one whose length is unknown.
        prompt_tokens: Prompt tokens to compute for all rows.
        open: The rows behind: prompt tokens, answer tokens, and whether the latter are known.
    """

    def __init__(self, places: int, budget: int, share: bool) -> None:
        self.slots = BatchModel(places, budget)
        self.prompt_tokens = 0
        self.open: OrderedDict[tuple[int, int], tuple[int, float, bool]] = OrderedDict()
        self._recent = _Recent(places + _QUEUED) if share else None

    def add(self, row: Waiting, expected: float) -> None:
        tokens, most_shared = row.num_tokens
        if self._recent is not None:
            tokens -= min(self._recent.shared(row), most_shared)
        self.prompt_tokens += tokens
        self.open[row.rest.row, row.rest.sample] = (tokens, expected, False)
        if len(self.open) > _OPEN:
            self._take()

    def end(self, key: tuple[int, int], tokens: int) -> None:
        if key in self.open:
            self.open[key] = (self.open[key][0], tokens, True)
            while self.open and next(iter(self.open.values()))[2]:
                self._take()

    def _take(self) -> None:
        _, (prompt, answer, _) = self.open.popitem(last=False)
        self.slots.add(prompt, answer)


class _Recent:
    """The prefixes of the last rows, as hashes of their leading blocks."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._seen: OrderedDict[int, int] = OrderedDict()  # hash -> its last row, in row order
        self._row = 0

    def shared(self, row: Waiting) -> int:
        """Leading tokens that a row shares with one of the last rows; then it becomes one."""
        self._row += 1
        while self._seen and next(iter(self._seen.values())) < self._row - self._rows:
            self._seen.popitem(last=False)
        depth = 0
        blocks = blocks_of(row.prompt, BLOCK * WIDTH, namespace=row.rest.namespace)
        for block, key in enumerate(blocks):
            depth += depth == block and key in self._seen
            self._seen[key] = self._row
            self._seen.move_to_end(key)
        return depth * BLOCK
