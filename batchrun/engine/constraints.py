"""Sequences whose answers are constrained: which tokens may come, and which must.

Each has a matcher, which knows the answer so far. It says which tokens may come next, as bits over
the vocabulary, computed while the device computes the logits; which must come, because the
constraint allows only one continuation: these are appended without being sampled; and when the
answer is complete.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from batchrun import machine
from batchrun.engine.core import Segment, Sequence
from batchrun.engine.plan import NO_MASKS, Masks
from batchrun.engine.speculation.proposers import num_right
from batchrun.grammars.constraint import reason
from batchrun.grammars.matchers import Matchers

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_WORD = 32  # bits of a mask's word


class ConstraintError(ValueError):
    """An answer can't go on under its constraint; the message says why."""


class Constraints:
    """The matchers of the sequences in progress.

    Args:
        matchers: Starts one for a constraint.
    """

    def __init__(self, matchers: Matchers) -> None:
        self._matchers = matchers
        self._held: dict[Sequence, LLMatcher] = {}
        self._executor: LLExecutor | None = None

    def of(self, sequence: Sequence) -> LLMatcher | None:
        """The matcher of a sequence, after its output so far; None if nothing constrains it."""
        constraint = sequence.request.params.constraint
        if constraint is None:
            return None
        found = self._held.get(sequence)
        if found is None:
            found = self._held[sequence] = self._matchers.start(constraint)
            found.consume_tokens(sequence.output_ids)
        return found

    def took(self, sequence: Sequence, token: int) -> bool:
        """Take note of a token just appended to a sequence.

        Returns:
            Whether the answer is complete: nothing can follow it.

        Raises:
            ConstraintError: The answer can't go on.
        """
        matcher = self._held.get(sequence)
        if matcher is None:  # its tokens so far include this one
            matcher = self.of(sequence)
        elif not matcher.is_error():
            matcher.consume_token(token)
        if matcher is None:
            return False
        if matcher.is_error():
            raise ConstraintError(reason(matcher.get_error()))
        return matcher.is_stopped()

    def problem(self, sequence: Sequence) -> str | None:
        """Why an answer can't go on under its constraint; None if it can."""
        matcher = self.of(sequence)
        if matcher is None or not (matcher.is_error() or not any(matcher.compute_bitmask())):
            return None
        return reason(matcher.get_error()) or "it allows no token here"

    def forced(self, sequence: Sequence) -> list[int]:
        """The tokens that must come now: a mask at each of them would allow that one alone."""
        matcher = self.of(sequence)
        return [] if matcher is None else matcher.compute_ff_tokens()

    def allowed(self, sequence: Sequence, token_ids: Seq[int]) -> int:
        """How many of these tokens may come, one after the other."""
        matcher = self.of(sequence) if token_ids else None
        return len(token_ids) if matcher is None else matcher.validate_tokens(list(token_ids))

    def copy(self, sequence: Sequence) -> LLMatcher | None:
        """A matcher that goes its own way after a sequence's output so far; None as from `of`."""
        matcher = self.of(sequence)
        return None if matcher is None else matcher.deep_copy()

    def forget(self, sequence: Sequence) -> None:
        """Drop the matcher of a sequence that has ended."""
        self._held.pop(sequence, None)

    def masks(
        self, segments: Seq[Segment], owners: Seq[Sequence | None], *, chosen_first: bool
    ) -> Masks | None:
        """The tokens that may follow, for each token that constrained segments yield.

        Args:
            segments: A step's segments.
            owners: Their sequences, all of whose tokens are known; None if one has ended.
            chosen_first: Whether the most likely tokens are chosen before their masks are computed:
                see `Masks.refused`.
        """
        found: list[LLMatcher | None] = []
        later: list[_Choice] = []
        for segment, sequence in zip(segments, owners, strict=True):
            if not segment.sampled:
                continue
            matcher = None if sequence is None else self.of(sequence)
            greedy = sequence is not None and sequence.request.params.greedy
            if chosen_first and greedy and matcher is not None:
                later.append(_Choice(len(found), matcher, segment.drafts))
                matcher = None
            for draft in (None, *segment.drafts):
                if matcher is not None and draft is not None:
                    matcher = _after(matcher, [draft])
                found.append(matcher)

        def refused(token_ids: Seq[int]) -> Masks | None:
            wrong = dict(filter(None, (choice.refused(token_ids) for choice in later)))
            return self.masks_of([wrong.get(place) for place in range(len(token_ids))])

        masks = self.masks_of(found)
        return replace(masks or NO_MASKS, refused=refused) if later else masks

    def masks_of(self, matchers: Seq[LLMatcher | None]) -> Masks | None:
        """The tokens that may follow the answer of each matcher; None constrains nothing."""
        held = [(row, matcher) for row, matcher in enumerate(matchers) if matcher is not None]
        if not held:
            return None
        if self._executor is None:
            from llguidance import LLExecutor  # noqa: PLC0415

            self._executor = LLExecutor(num_threads=machine.cores())
        words = -(-self._matchers.tokenizer.vocab_size // _WORD)
        bits = np.zeros((len(held), words), np.uint32)
        place = bits.ctypes.data, words * bits.itemsize, len(held)
        found = [(matcher, at) for at, (_, matcher) in enumerate(held)]
        self._executor.unsafe_compute_mask_ptr(found, *place)
        return Masks(np.array([row for row, _ in held]), bits)


@dataclass(slots=True)
class _Choice:
    """The most likely tokens of a row: their first place in the step, and its draft tokens.

    The last place that was looked at needs no other mask than it has got since, if any.
    """

    place: int
    matcher: LLMatcher
    drafts: Seq[int]
    seen: int = -1

    def refused(self, token_ids: Seq[int]) -> tuple[int, LLMatcher] | None:
        """The place after the right draft tokens and its matcher, if the token there is refused."""
        right = num_right(self.drafts, token_ids[self.place : self.place + len(self.drafts)])
        place, before = self.place + right, self.seen
        self.seen = place
        if place == before or token_ids[place] < 0:
            return None
        matcher = _after(self.matcher, list(self.drafts[:right])) if right else self.matcher
        return None if _allows(matcher, token_ids[place]) else (place, matcher)


def _allows(matcher: LLMatcher, token: int) -> bool:
    """Whether a mask would allow a token; False for the end of an answer that has to end.

    Where a token is forced, a mask allows that one alone, though others may say the same.
    """
    if matcher.validate_tokens([token]) < 1:
        return False
    forced = matcher.compute_ff_tokens()
    return not forced or forced[0] == token


def _after(matcher: LLMatcher, token_ids: list[int]) -> LLMatcher:
    """A copy of a matcher that has gone on: its own rollback forgets too little of choices."""
    copy = matcher.deep_copy()
    copy.consume_tokens(token_ids)
    return copy
