"""What a journal holds: results, partial results, and the set of finished samples."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from itertools import chain
from struct import Struct
from typing import NamedTuple, cast

_MOST = Struct("<i")


TokenLogprobs = tuple[tuple[float, tuple[tuple[int, float], ...]], ...]
"""For each token its log-probability, and the likeliest tokens in its place with theirs."""


def packed(logprobs: TokenLogprobs | None) -> bytes | None:
    """The stored form: the number of likeliest tokens, then little-endian float32 and int32."""
    if logprobs is None:
        return None
    most = len(logprobs[0][1]) if logprobs else 0
    record = Struct(f"<f{most * 'if'}")
    flat = (record.pack(own, *chain.from_iterable(likeliest)) for own, likeliest in logprobs)
    return b"".join((_MOST.pack(most), *flat))


def unpacked(data: bytes | None) -> TokenLogprobs | None:
    """What `packed` made."""
    if data is None:
        return None
    (most,) = _MOST.unpack_from(data)
    records = Struct(f"<f{most * 'if'}").iter_unpack(data[_MOST.size :])
    return tuple((own, tuple(zip(pairs[::2], pairs[1::2], strict=True))) for own, *pairs in records)


class Scores(NamedTuple):
    """Log-probabilities of known tokens, in the model's own distribution.

    `logprobs` are those of a text's tokens, behind the prompt, or of the prompt's own but for the
    first; `labels` those of the labels behind the prompt, in their order.
    """

    logprobs: tuple[float, ...] = ()
    labels: tuple[float, ...] = ()

    @property
    def sum(self) -> float:
        """The sum of the tokens' log-probabilities: the text's; 0 if there are none."""
        return math.fsum(self.logprobs)

    @property
    def mean(self) -> float | None:
        """Their mean; None if there are none."""
        return self.sum / len(self.logprobs) if self.logprobs else None

    @property
    def perplexity(self) -> float | None:
        """The exponential of their negative mean; None if there are none."""
        return None if self.mean is None else _exp(-self.mean)

    @property
    def label_probs(self) -> tuple[float, ...]:
        """The labels' probabilities."""
        return tuple(map(_exp, self.labels))

    def packed(self) -> bytes:
        """The stored form: the number of labels, then little-endian float32."""
        count = len(self.labels) + len(self.logprobs)
        return Struct(f"<i{count}f").pack(len(self.labels), *self.labels, *self.logprobs)

    @classmethod
    def unpacked(cls, data: bytes) -> Scores:
        """What `packed` made."""
        count, *values = Struct(f"<i{len(data) // 4 - 1}f").unpack(data)
        return cls(tuple(values[count:]), tuple(values[:count]))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


class Result(NamedTuple):
    """The outcome of one sample of one row. Times in seconds; None for stages never reached.

    `status` is `ok`, `error`, or `skipped` if the user asked to leave such rows out: a skipped row
    has no completion and no error, is counted apart, and is not retried.
    `logprob` is the sum of its tokens' log-probabilities, None if nobody asked for it; `logprobs`
    has each of them, with those of the likeliest tokens in its place, or None likewise. `scores`
    are those of known tokens, or None.
    """

    row: int
    sample: int
    status: str
    text: str | None = None
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    error_kind: str | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    logprob: float | None = None
    logprobs: TokenLogprobs | None = None
    scores: Scores | None = None

    @property
    def mean_logprob(self) -> float | None:
        """The mean log-probability of its tokens; None if unknown."""
        if self.logprob is None or not self.completion_tokens:
            return None
        return self.logprob / self.completion_tokens


class CopiedResult(NamedTuple):
    """A sample whose result is a copy of another one's, journalled before it or with it.

    It has that one's completion, of about `tokens` tokens, and no times of its own.
    """

    row: int
    sample: int
    of_row: int
    of_sample: int
    tokens: int


class RowDigests(NamedTuple):
    """Digests of rows as they were read, journalled before the rows' results."""

    digests: list[tuple[int, int]]  # row, digest


class Crashed(NamedTuple):
    """Rows that were in a process when it crashed."""

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Partial:
    """The tokens so far of a sample without a result; log-probabilities as in `Result`."""

    row: int
    sample: int
    token_ids: tuple[int, ...]
    logprob: float | None = None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Results so far.

    `rows` counts rows all of whose samples have a result, `failed` rows with a failed sample,
    `skipped` rows with a skipped one.
    """

    rows: int
    samples: int
    failed: int
    skipped: int
    prompt_tokens: int
    completion_tokens: int


class DoneSet(Container[tuple[int, int]]):
    """The (row, sample) pairs that have a result, one bit each."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._bits = bytearray()

    def __contains__(self, key: object) -> bool:
        row, sample = cast("tuple[int, int]", key)
        number = row * self._n + sample
        byte = number >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (number & 7) & 1)

    def add(self, number: int) -> None:
        """Mark `row * n + sample`."""
        byte = number >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits) + (len(self._bits) >> 1)))
        self._bits[byte] |= 1 << (number & 7)
