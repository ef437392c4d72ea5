"""Identical requests have the same answer under greedy decoding, and the same scores.

It is computed once, unless tokens are drawn.

A duplicate of a row that waits or runs is attached to it and gets its result. For a duplicate of a
finished row, the journal copies the result. Finished rows are known by 128-bit digests in a
fixed-size table; a row that was evicted from it is computed again.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from struct import unpack
from threading import Lock

from batchrun.engine.core import Request, SamplingParams
from batchrun.jobs.journal.results import CopiedResult, Result
from batchrun.runner.planner import Waiting, pack

_SETS = 1 << 16  # of the table
_WAYS = 4  # entries of a set; a full one replaces them in turn
_FIELDS = 4  # of an entry: the digest's halves, the result's number + 1, its tokens
_ATTACHED = 1 << 20  # duplicates that may wait for a result, at 8 bytes each

_Digest = tuple[int, int]  # its halves


class Duplicates:
    """Says which rows need no computing. The reader claims, the engine's thread settles.

    Args:
        n: Samples a row.

    Attributes:
        rows: Results that were not computed, errors aside.
        tokens: Their tokens.
    """

    def __init__(self, n: int) -> None:
        self.rows = self.tokens = 0
        self._n = n
        self._lock = Lock()
        self._leaders: dict[_Digest, int] = {}  # -> number of the row that is computed
        self._followers: dict[int, array[int]] = {}  # of a leader
        self._attached = 0
        self._table = array("Q")
        self._turn = 0

    def claim(
        self, waiting: Waiting, before: Callable[[], None] = lambda: None
    ) -> CopiedResult | bool:
        """Decide what happens to a row.

        Args:
            waiting: The row.
            before: Called before a `settle` can give its result.

        Returns:
            True: compute it, then `settle` it. False: the `settle` of another row will return its
            result. Otherwise, what to hand to the journal instead.
        """
        request = waiting.rest
        if _draws(request.params):
            return True
        digest = _digest(request, waiting.prompt, waiting.text)
        number = request.row * self._n + request.sample
        with self._lock:
            leader = self._leaders.get(digest)
            if leader is not None:
                if self._attached == _ATTACHED:
                    return True
                before()
                self._followers.setdefault(leader, array("q")).append(number)
                self._attached += 1
                return False
            at = self._find(digest)
            if at is None:
                self._leaders[digest] = number
                return True
            known, tokens = self._table[at + 2] - 1, self._table[at + 3]
            self.rows += 1
            self.tokens += tokens
        return CopiedResult(request.row, request.sample, *divmod(known, self._n), tokens)

    def settle(self, request: Request, result: Result) -> list[Result]:
        """Settle a row that has ended, after its result was handed to the journal.

        Returns:
            The results of its duplicates, to be handed on too.
        """
        if _draws(request.params):
            return []
        text = () if request.scoring is None else request.scoring.text_ids
        digest = _digest(request, pack(request.prompt_ids), pack(text))
        number = request.row * self._n + request.sample
        with self._lock:
            if self._leaders.get(digest) != number:
                return []
            del self._leaders[digest]
            followers = self._followers.pop(number, array("q"))
            self._attached -= len(followers)
            if result.status == "ok":
                self.rows += len(followers)
                self.tokens += len(followers) * result.completion_tokens
                self._note(digest, number, result.completion_tokens)
        bare = result._replace(queue_s=None, prefill_s=None, decode_s=None)
        return [bare._replace(row=f // self._n, sample=f % self._n) for f in followers]

    def _find(self, digest: _Digest) -> int | None:
        """Where the table has a digest."""
        table, (low, high) = self._table, digest
        for at in _entries(digest) if table else ():
            if table[at] == low and table[at + 1] == high and table[at + 2]:
                return at
        return None

    def _note(self, digest: _Digest, number: int, tokens: int) -> None:
        if not self._table:
            self._table = array("Q", [0]) * (_SETS * _WAYS * _FIELDS)
        entries = _entries(digest)
        self._turn = (self._turn + 1) % _WAYS
        at = next((at for at in entries if not self._table[at + 2]), entries[self._turn])
        self._table[at : at + _FIELDS] = array("Q", (*digest, number + 1, tokens))


def _entries(digest: _Digest) -> range:
    """Where the entries of a digest's set are."""
    begin = digest[0] % _SETS * _WAYS * _FIELDS
    return range(begin, begin + _WAYS * _FIELDS, _FIELDS)


def _draws(params: SamplingParams) -> bool:
    """Whether the row's own random numbers matter."""
    return params.max_tokens > 0 and not params.greedy


def _digest(request: Request, prompt: bytes, text: bytes) -> _Digest:
    """Of all that rows must match in to have the same result."""
    content, scoring = request.namespace + prompt, request.scoring
    if scoring is not None:
        rest = repr((scoring.first, scoring.labels, len(text))).encode()
        content = blake2b(rest + text, digest_size=16).digest() + content
    digest = blake2b(_tag(request.params) + content, digest_size=16).digest()
    low, high = unpack("<QQ", digest)
    return low, high


@lru_cache(1024)
def _tag(params: SamplingParams) -> bytes:
    """A fixed-length digest of the parameters that matter where nothing is drawn."""
    if params.max_tokens:
        params = replace(params, seed=None)
    else:  # only the scores; and whether there are log-probabilities, of no tokens
        scored, logprobs = params.scored, params.logprobs
        params = SamplingParams(max_tokens=0, scoring=True, scored=scored, logprobs=logprobs)
    return blake2b(repr(params).encode(), digest_size=16).digest()
