"""What knowing the whole file buys: an order in which each shared prefix is used up at once.

Rows are planned in windows, so that memory stays flat however long the file is. Within one a prefix
tree is walked depth first: no prefix, at any level, is left before its last use. BatchLLM (arXiv
2412.03594) orders by such a tree; that the order of rows decides what is shared is measured in Liu
et al. (arXiv 2403.05821). What shares nothing goes by length: the longest rows first, as in list
scheduling (Graham 1969), so that no long one is left to run alone, and decode-heavy before
prefill-heavy ones as in BlendServe (arXiv 2411.16102).
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.prefixes import BLOCK

_FIRST = 512  # rows of the first window: the engine is to begin at once
_ROWS = 16_384  # of a window at most
_TOKENS = 4 << 20  # of its prompts, about
_WIDTH = 4  # bytes of a token


class Waiting(NamedTuple):
    """A request that waits to be computed, its prompt as bytes: a tuple needs nine times those."""

    prompt: bytes
    rest: Request

    @classmethod
    def of(cls, request: Request) -> Waiting:
        """Pack it."""
        return cls(array("I", request.prompt_ids).tobytes(), _with_prompt(request, ()))

    def request(self) -> Request:
        """Unpack it."""
        ids = array("I")
        ids.frombytes(self.prompt)
        return _with_prompt(self.rest, tuple(ids))


def _with_prompt(r: Request, ids: tuple[int, ...]) -> Request:
    return Request(r.row, r.sample, ids, r.params, r.seed, r.generated_ids, r.generated_logprob)


def order(prompts: Sequence[bytes], lengths: Sequence[float]) -> list[int]:
    """Walk the prefix tree of prompts depth first, at each node what holds the longest row first.

    Args:
        prompts: Tokens, 4 bytes each.
        lengths: Expected tokens of each answer.

    Returns:
        Indices. Of equally long rows the first comes first, so rows in which nothing is shared and
        all lengths agree stay as they are.
    """
    # Sorted, equal prefixes are neighbours, and what neighbours have in common spans the tree:
    # the nodes that are open, from the root down, each with its depth and its units so far.
    nodes: list[tuple[int, list[_Unit]]] = [(0, [])]
    previous = b""
    for i in sorted(range(len(prompts)), key=prompts.__getitem__):
        depth = common_blocks(previous, prompts[i])
        if depth > nodes[-1][0]:
            nodes.append((depth, [nodes[-1][1].pop()]))  # it begins with the leaf before
        else:
            _close(nodes, depth)
        nodes[-1][1].append((-lengths[i], i, [i]))
        previous = prompts[i]
    _close(nodes, 0)
    return _joined(nodes[0][1])[2]


_Unit = tuple[float, int, list[int]]  # its longest row's length, negated; its first row; all rows


def _close(nodes: list[tuple[int, list[_Unit]]], depth: int) -> None:
    """End the nodes deeper than `depth`: each is a unit of the node above it."""
    while nodes[-1][0] > depth:
        unit = _joined(nodes.pop()[1])
        if nodes[-1][0] < depth:
            nodes.append((depth, []))
        nodes[-1][1].append(unit)


def _joined(units: list[_Unit]) -> _Unit:
    units.sort()
    rows = [i for unit in units for i in unit[2]]
    return (units[0][0], min(unit[1] for unit in units), rows) if units else (0.0, 0, [])


def common_blocks(a: bytes, b: bytes) -> int:
    """Whole blocks of `prefixes.BLOCK` tokens that two prompts begin with alike."""
    size = BLOCK * _WIDTH
    if a[:size] != b[:size]:
        return 0
    low, high = 0, min(len(a), len(b)) // size
    while low < high:
        middle = (low + high + 1) // 2
        if a[: middle * size] == b[: middle * size]:
            low = middle
        else:
            high = middle - 1
    return low


class Planner:
    """Puts requests in the order in which they are best computed.

    Attributes:
        seconds: Spent on it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._answered = self._allowed = 1  # tokens of rows that may stop early

    @property
    def share(self) -> float:
        """Of the tokens that rows may generate, those that they do if they may stop early."""
        return self._answered / self._allowed

    def learn(self, request: Request, tokens: int) -> None:
        """Take note of how long an answer was; from any one thread."""
        if not request.params.ignore_eos:
            self._answered += tokens
            self._allowed += request.params.max_tokens

    def expected(self, params: SamplingParams) -> float:
        """Tokens that an answer is expected to have."""
        if params.ignore_eos and not (params.stop or params.stop_token_ids):
            return params.max_tokens
        return max(params.min_tokens, params.max_tokens * self.share)

    def planned(self, rows: Iterable[Waiting], full: Callable[[], bool]) -> Iterator[Waiting]:
        """The same rows, window by window.

        Args:
            rows: In file order.
            full: Whether whoever takes the rows has enough for now: then the next window is read.
        """
        ready: deque[Waiting] = deque()
        window: list[Waiting] = []
        most, size = _FIRST, 0
        for row in rows:
            window.append(row)
            size += len(row.prompt)
            if len(window) >= most or size >= _TOKENS * _WIDTH:
                while ready:
                    yield ready.popleft()
                ready = self._ordered(window)
                window, size, most = [], 0, min(2 * most, _ROWS)
            while ready and not full():
                yield ready.popleft()
        yield from ready
        yield from self._ordered(window)

    def _ordered(self, window: list[Waiting]) -> deque[Waiting]:
        began = time.perf_counter()
        lengths = [self.expected(w.rest.params) - len(w.rest.generated_ids) for w in window]
        ordered = deque(window[i] for i in order([w.prompt for w in window], lengths))
        self.seconds += time.perf_counter() - began
        return ordered
