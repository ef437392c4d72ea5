"""Draft tokens from a row's own text.

A text often continues as it did before: an answer quotes its prompt, a list repeats its pattern. So
when the last tokens have occurred before, the tokens that followed them are proposed again (LLMA,
Yang et al., arXiv 2304.04487; known as prompt lookup).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

from batchrun.engine.core import Sequence
from batchrun.engine.speculation.proposers import DraftBatch

LONGEST = 15  # draft tokens per sequence and step
_NGRAMS = (3, 2)  # numbers of last tokens to look for, the strongest sign first
_KEPT = 7 / 8  # of a rate, when another token is tested
# Rates above which draft tokens are worth a step, for a row that had none and for one that had. It
# takes one step more to begin than to go on, and rows that change their minds gain nothing.
_BEGIN, _GO_ON = 0.7, 0.5
_WATCHED = 8  # rows of a step whose guesses are only tested, as each takes some microseconds
_SHARE = 4  # draft tokens that a row needs: fewer would not make up for a step
_TYPE = "i"
_SIZE = array(_TYPE).itemsize


class Lookup:
    """Finds what followed the last tokens of a sequence where they occurred before.

    Args:
        sequence: All its tokens so far are known. It only grows.

    Attributes:
        trust: Number of draft tokens worth computing, given how many were right so far.
        rate: How many of the last draft tokens were right; where none was found, one was wrong.
    """

    def __init__(self, sequence: Sequence) -> None:
        self.trust = 0
        self.rate = 0.0
        self._sequence = sequence
        self._packed = bytearray()
        self._drafts: list[int] | None = None
        self._known = 0  # tokens known when they were made

    def draft(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; none if the last ones are new."""
        sequence, packed = self._sequence, self._packed
        known = len(packed) // _SIZE
        self._known = sequence.num_known_tokens
        packed += array(_TYPE, sequence.token_ids(known, self._known - known)).tobytes()
        drafts: list[int] = []
        for length in _NGRAMS:
            at = _last(packed, packed[-length * _SIZE :])
            if at >= 0:
                # Text that repeats itself is assumed to continue doing so past its end.
                begin = at + length * _SIZE
                after = array(_TYPE, packed[begin : begin + most * _SIZE]).tolist()
                drafts = (after * -(-most // len(after)))[:most]
                break
        self._drafts = drafts
        return drafts

    def settle(self) -> bool:
        """Compare the last draft tokens with those that actually followed.

        Returns:
            Whether any were sought, and tokens followed.
        """
        if self._drafts is None:
            return False
        came = self._sequence.num_known_tokens - self._known
        if not came:
            return False
        drafts, self._drafts = self._drafts, None
        pairs = enumerate(zip(drafts, self._sequence.token_ids(self._known, came), strict=False))
        right = next((i for i, (a, b) in pairs if a != b), min(came, len(drafts)))
        whole = 0 < right == len(drafts)
        if drafts:
            self.trust = min(LONGEST, 2 * self.trust + 1) if whole else right
        self.rate = 1 - (1 - self.rate) * _KEPT**right
        if not whole:
            self.rate *= _KEPT
        return True


def _last(packed: bytearray, tail: bytearray) -> int:
    """Where `tail` last occurs before the end, on a token boundary; -1 if nowhere."""
    at = packed.rfind(tail, 0, len(packed) - _SIZE)
    while at > 0 and at % _SIZE:
        at = packed.rfind(tail, 0, at + len(tail) - 1)
    return at


class PromptLookup:
    """Proposes what followed the last tokens of a sequence where they occurred before.

    Args:
        num_logits: Maximum rows of logits in a step, with drafts; each row is a whole vocabulary.
        free: Tokens of a step that take no longer than one, because the weights are read anyway.
        lookup: Makes the lookup for one sequence.
    """

    def __init__(
        self, num_logits: int, free: int, lookup: Callable[[Sequence], Lookup] = Lookup
    ) -> None:
        self.num_logits = num_logits
        self.free = free
        self._make = lookup
        self.lookups: dict[Sequence, Lookup] = {}
        self._paying, self._most_paying = set[Sequence](), 0
        self._turn = 0

    def open(self, sequence: Sequence) -> None:
        """See `Proposer.open`."""

    def close(self, sequence: Sequence) -> None:
        """See `Proposer.close`."""
        self.lookups.pop(sequence, None)
        self._paying.discard(sequence)

    def propose(self, batch: DraftBatch) -> list[tuple[int, ...]]:
        """See `Proposer.propose`."""
        free = self.free - batch.num_tokens
        places = min(batch.budget, self.num_logits - batch.num_logits)
        self._most_paying = places // _SHARE
        found: list[tuple[int, ...]] = []
        for number, (sequence, room) in enumerate(batch.sequences):
            others = len(batch.sequences) - number
            lookup = self._of(sequence)
            wanted = max(lookup.trust, free // others)
            most = max(0, min(wanted, places // others, LONGEST, room))
            # Always look up one: whether it turns out right says how many to try next.
            drafts = tuple(lookup.draft(max(most, 1))[:most])
            places -= len(drafts)
            free -= len(drafts)
            found.append(drafts)
        self._turn += 1
        stride = -(-len(batch.watched) // _WATCHED) or 1
        for sequence in batch.watched[self._turn % stride :: stride]:
            self._of(sequence).draft(1)
        return found

    def _of(self, sequence: Sequence) -> Lookup:
        if sequence not in self.lookups:
            self.lookups[sequence] = self._make(sequence)
        return self.lookups[sequence]

    def pays(self, sequence: Sequence) -> bool:
        """See `Proposer.pays`: if about two tokens more than one are probably right."""
        return sequence in self._paying

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """See `Proposer.settle`."""
        for sequence in sequences:
            lookup = self.lookups.get(sequence)
            if lookup is not None and lookup.settle():
                if lookup.rate <= _GO_ON:
                    self._paying.discard(sequence)
                elif lookup.rate > _BEGIN and len(self._paying) < self._most_paying:
                    self._paying.add(sequence)
