"""Guesses of tokens to come, which a step checks at once: speculative decoding without a model.

A text often goes on as it did before: an answer quotes its prompt, a list repeats its form. So the
tokens that followed the last ones when they came before are guessed to follow again (LLMA, Yang et
al., arXiv 2304.04487; known as prompt lookup). The step computes them behind the sequence's last
token, samples after each of them, and takes what was sampled as far as the guesses before it were
right (Leviathan et al., ICML 2023): the tokens are those of one step each.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace

from batchrun.engine.core import Segment, Sequence

LONGEST = 15  # tokens of a draft
_NGRAMS = (3, 2)  # last tokens to look for, the best sign first
_TYPE = "i"
_SIZE = array(_TYPE).itemsize


class Lookup:
    """What follows the last tokens of a sequence, where they were before in it.

    Args:
        sequence: Its tokens so far are known. They only grow.

    Attributes:
        trust: Tokens of it worth guessing, as its guesses were right so far.
    """

    def __init__(self, sequence: Sequence) -> None:
        self.trust = 0
        self._sequence = sequence
        self._packed = bytearray()
        self._guess: list[int] = []
        self._known = 0  # tokens when it was made

    def guess(self, most: int) -> list[int]:
        """At most so many tokens that may come next; none where the last ones are new."""
        sequence, packed = self._sequence, self._packed
        known = len(packed) // _SIZE
        self._known = sequence.num_known_tokens
        packed += array(_TYPE, sequence.token_ids(known, self._known - known)).tobytes()
        self._guess = []
        for length in _NGRAMS:
            at = _last(packed, packed[-length * _SIZE :])
            if at >= 0:
                # Who repeats himself does so beyond the end of what there is.
                begin = at + length * _SIZE
                after = array(_TYPE, packed[begin : begin + most * _SIZE]).tolist()
                self._guess = (after * -(-most // len(after)))[:most]
                break
        return self._guess

    def settle(self) -> None:
        """Compare the last guess with the tokens that have come since."""
        if self._guess:
            came = self._sequence.num_known_tokens - self._known
            tokens = self._sequence.token_ids(self._known, came)
            pairs = enumerate(zip(self._guess, tokens, strict=False))
            right = next((i for i, (a, b) in pairs if a != b), min(came, len(self._guess)))
            whole = right == len(self._guess)
            self.trust = min(LONGEST, 2 * self.trust + 1) if whole else right
            self._guess = []


def _last(packed: bytearray, tail: bytearray) -> int:
    """Where `tail` was last before the end, on a token's border; -1 where it was not."""
    at = packed.rfind(tail, 0, len(packed) - _SIZE)
    while at > 0 and at % _SIZE:
        at = packed.rfind(tail, 0, at + len(tail) - 1)
    return at


class Drafts:
    """Adds guesses to the segments of a step: as many as cost nothing, and as are likely right.

    Tokens are known when a step is planned only where no other step is in flight.

    Args:
        num_logits: Of a step at most, with guesses: each is one of the whole vocabulary.
        free: Tokens of a step that take no longer than one, as weights are read either way.
        lookup: Makes what guesses for a sequence.
    """

    def __init__(
        self, num_logits: int, free: int, lookup: Callable[[Sequence], Lookup] = Lookup
    ) -> None:
        self.num_logits = num_logits
        self.free = free
        self._lookup = lookup

    def extend(
        self,
        segments: list[Segment],
        stays: Mapping[int, Sequence],
        budget: int,
        max_model_len: int,
        ensure: Callable[[int, int], bool],
    ) -> None:
        """Let segments of one sampled token compute guesses behind it.

        Args:
            segments: Of the step; changed in place.
            stays: Whose they are, by their keys.
            budget: Guesses at most.
            max_model_len: Tokens of a sequence at most.
            ensure: Gives a slot memory for so many tokens, or says that there is none.
        """
        able = [
            (i, stays[segment.key])
            for i, segment in enumerate(segments)
            if _takes_drafts(segment, stays[segment.key])
        ]
        free = self.free - sum(segment.length for segment in segments)
        places = min(budget, self.num_logits - sum(segment.sampled for segment in segments))
        for number, (i, sequence) in enumerate(able):
            segment, others = segments[i], len(able) - number
            if sequence.lookup is None:
                sequence.lookup = self._lookup(sequence)
            params, known = sequence.request.params, sequence.num_known_tokens
            room = min(params.max_tokens - len(sequence.output_ids), max_model_len - known) - 1
            wanted = max(sequence.lookup.trust, free // others)
            most = max(0, min(wanted, places // others, LONGEST, room))
            # One is made in any case: whether it will have been right says what to try next.
            drafts = tuple(sequence.lookup.guess(max(most, 1))[:most])
            if drafts and ensure(segment.slot, known + len(drafts)):
                places -= len(drafts)
                free -= len(drafts)
                ids = (*segment.token_ids, *drafts)
                segments[i] = replace(
                    segment, length=len(ids), token_ids=ids, num_drafts=len(drafts)
                )


def _takes_drafts(segment: Segment, sequence: Sequence) -> bool:
    """Whether guesses may follow: penalties depend on the tokens before, beams on each other."""
    return (
        segment.sampled
        and segment.length == 1
        and sequence.group is None
        and not sequence.request.params.penalised
    )
