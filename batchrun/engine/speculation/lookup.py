"""Draft tokens from a row's own text.

A text often continues as it did before: an answer quotes its prompt, a list repeats its pattern. So
when the last tokens have occurred before, the tokens that followed them are proposed again (LLMA,
Yang et al., arXiv 2304.04487; known as prompt lookup).
"""

from __future__ import annotations

from array import array

from batchrun.engine.core import Sequence

LONGEST = 15  # draft tokens per sequence and step
_NGRAMS = (3, 2, 1)  # numbers of last tokens to look for, the strongest sign first
_TYPE = "i"
_SIZE = array(_TYPE).itemsize


class Lookup:
    """Finds what followed the last tokens of a sequence where they occurred before.

    Args:
        sequence: The sequence; it only grows.

    Attributes:
        length: Number of last tokens that were found by the last call.
    """

    def __init__(self, sequence: Sequence) -> None:
        self.length = 0
        self._sequence = sequence
        self._packed = bytearray()

    def find(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; none if the last ones are new."""
        sequence, packed = self._sequence, self._packed
        known = len(packed) // _SIZE
        packed += array(_TYPE, sequence.token_ids(known, sequence.num_known_tokens - known))
        for length in _NGRAMS:
            at = _last(packed, packed[-length * _SIZE :])
            if at >= 0:
                self.length = length
                # Text that repeats itself is assumed to continue doing so past its end.
                begin = at + length * _SIZE
                after = array(_TYPE, packed[begin : begin + most * _SIZE]).tolist()
                return (after * -(-most // len(after)))[:most]
        return []


def _last(packed: bytearray, tail: bytearray) -> int:
    """Where `tail` last occurs before the end, on a token boundary; -1 if nowhere."""
    at = packed.rfind(tail, 0, len(packed) - _SIZE)
    while at > 0 and at % _SIZE:
        at = packed.rfind(tail, 0, at + len(tail) - 1)
    return at
