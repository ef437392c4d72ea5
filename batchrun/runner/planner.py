"""Orders rows so that each shared prefix is used up at once, which takes knowing the file.

Rows are planned in windows, so that memory stays flat however long the file is. A window's prefix
tree is walked depth first: no prefix, at any level, is left before its last use. BatchLLM (arXiv
2412.03594) orders by such a tree; Liu et al. (arXiv 2403.05821) measure that the order of rows
decides what is shared. Rows that share nothing are ordered by length: the longest first, as in list
scheduling (Graham 1969), so that no long row is left to run alone, and decode-heavy before
prefill-heavy ones, as in BlendServe (arXiv 2411.16102).
"""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.prefixes import BLOCK

_FIRST = 512  # rows in the first window, so that the engine can begin at once
_ROWS = 16_384  # most rows in memory; half as many are read for the next window
_TOKENS = 4 << 20  # of their prompts, about
WIDTH = 4  # bytes of a token
_BEGUN = 1e9  # tokens: longer than any row


class Waiting(NamedTuple):
    """A request that waits to be computed, its prompt as bytes: a tuple takes nine times more.

    So does the text that is scored behind it.
    """

    prompt: bytes
    rest: Request
    text: bytes = b""

    @classmethod
    def of(cls, request: Request) -> Waiting:
        """Pack it."""
        scoring = request.scoring
        if scoring is None:
            return cls(pack(request.prompt_ids), replace(request, prompt_ids=()))
        rest = replace(request, prompt_ids=(), scoring=replace(scoring, text_ids=()))
        return cls(pack(request.prompt_ids), rest, pack(scoring.text_ids))

    @property
    def identity(self) -> bytes:
        """Its namespace and prompt: rows that share a prefix share the beginning of this."""
        return self.rest.namespace + self.prompt

    @property
    def num_tokens(self) -> tuple[int, int]:
        """The tokens to compute before any is generated, and how many of them it may share."""
        tokens, scoring = len(self.prompt) // WIDTH, self.rest.scoring
        if scoring is None:
            return tokens, tokens - 1
        begin, end = scoring.span(tokens, len(self.text) // WIDTH)
        return (end, begin) if end > begin else (tokens, tokens - 1)

    def request(self) -> Request:
        """Unpack it."""
        scoring = self.rest.scoring
        if scoring is not None:
            scoring = replace(scoring, text_ids=_unpacked(self.text))
        return replace(self.rest, prompt_ids=_unpacked(self.prompt), scoring=scoring)


def pack(ids: tuple[int, ...]) -> bytes:
    """Tokens, 4 bytes each."""
    return array("I", ids).tobytes()


def _unpacked(data: bytes) -> tuple[int, ...]:
    ids = array("I")
    ids.frombytes(data)
    return tuple(ids)


def order(prompts: Sequence[bytes], lengths: Sequence[float]) -> list[int]:
    """Walk the prompts' prefix tree depth first; at each node, the longest row's branch first.

    Args:
        prompts: Tokens, 4 bytes each.
        lengths: Expected tokens of each answer.

    Returns:
        Indices. Ties keep file order, so rows that share nothing and have equal lengths stay as
        they are.
    """
    # Sorting makes equal prefixes neighbours, and what neighbours share spans the tree. These are
    # the open nodes, from the root down, each with its depth and its units so far.
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
    """Number of whole blocks of `prefixes.BLOCK` tokens in two prompts' common prefix."""
    size = BLOCK * WIDTH
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
    """Puts requests in the best order to compute them.

    Attributes:
        seconds: Time spent on it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._answered = self._allowed = 1  # tokens of rows that may stop early

    @property
    def share(self) -> float:
        """Share of their allowed tokens that rows generate, if they may stop early."""
        return self._answered / self._allowed

    def learn(self, request: Request, tokens: int) -> None:
        """Note how long an answer was; call it from one thread only."""
        if not request.params.ignore_eos:
            self._answered += tokens
            self._allowed += request.params.max_tokens

    def expected(self, params: SamplingParams) -> float:
        """Tokens that an answer is expected to have."""
        if params.ignore_eos and not (params.stop or params.stop_token_ids):
            return params.max_tokens
        return max(params.min_tokens, params.max_tokens * self.share)

    def planned(self, rows: Iterable[Waiting], full: Callable[[], bool]) -> Iterator[Waiting]:
        """The same rows in another order.

        Args:
            rows: In file order.
            full: Whether the consumer has enough rows for now; then more are read.
        """
        ready: deque[Waiting] = deque()
        new: list[Waiting] = []
        last = b""  # identity of the last row handed out
        most, size, fresh = _FIRST, 0, 0  # rows to read, bytes of all, bytes of new ones
        for row in rows:
            new.append(row)
            size += len(row.prompt) + len(row.text)
            fresh += len(row.prompt) + len(row.text)
            enough = len(new) >= most or fresh >= _TOKENS * WIDTH // 2
            while ready and (
                len(ready) + len(new) > _ROWS or size > _TOKENS * WIDTH if enough else not full()
            ):
                waiting = ready.popleft()
                last = waiting.identity
                size -= len(waiting.prompt) + len(waiting.text)
                yield waiting
            if enough:
                ready = self._ordered([*ready, *new], last)
                new, fresh, most = [], 0, min(2 * most, _ROWS // 2)
        yield from self._ordered([*ready, *new], last)

    def _ordered(self, rows: list[Waiting], last: bytes) -> deque[Waiting]:
        """Order rows, those that share most with the last row handed out first."""
        began = time.perf_counter()
        # Rows that an earlier run began come before all others, so that a stop leaves few open.
        lengths = [self.expected(w.rest.params) + _BEGUN * bool(w.rest.generated_ids) for w in rows]
        at = order([*(w.identity for w in rows), last], [*lengths, math.inf])
        ordered = deque(rows[i] for i in at if i < len(rows))
        self.seconds += time.perf_counter() - began
        return ordered
