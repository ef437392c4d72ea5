"""Scoring passes: rows that ask for the same scores wait for one pass, then go on."""

from __future__ import annotations

from collections.abc import Iterable

from batchrun.engine.core import FinishReason, Segment, Sequence
from batchrun.engine.failures import not_finite
from batchrun.engine.scores import ScoringPass


class ScoringPasses:
    """The passes that wait or run. No torch here."""

    def __init__(self) -> None:
        self._passes: dict[object, ScoringPass] = {}

    @property
    def num_attached(self) -> int:
        """Rows that wait for a pass that another one began."""
        return sum(len(each.followers) - 1 for each in self._passes.values())

    def begin(self, sequence: Sequence) -> Sequence | None:
        """The sequence to queue before a new one; None if one is queued that does for both."""
        request = sequence.request
        assert request.scoring is not None
        key = _key(sequence)
        if (known := self._passes.get(key)) is not None:
            known.followers.append(sequence)
            return None
        made = ScoringPass(request.prompt_ids, request.scoring)
        made.followers.append(sequence)
        self._passes[key] = made
        return Sequence(request, arrived=sequence.arrived, scoring=made)

    def take(self, sequence: Sequence, segment: Segment, found: Iterable[float]) -> bool:
        """Take in the scores of a pass's segment; whether the pass has ended, maybe as an error."""
        scoring = sequence.scoring
        assert scoring is not None
        if not scoring.take(segment.targets, iter(found)):
            not_finite(sequence)
        elif scoring.is_complete:
            sequence.finish_reason = FinishReason.SCORED
        return sequence.finish_reason is not None

    def end(self, sequence: Sequence, now: float) -> tuple[list[Sequence], list[Sequence]]:
        """End a pass.

        Returns:
            Its rows that go on to generate, and those that have ended with it.
        """
        scoring = sequence.scoring
        assert scoring is not None
        followers, going = scoring.followers, list[Sequence]()
        del self._passes[_key(followers[0])]
        followers[0].admitted = sequence.admitted
        for each in followers:
            if sequence.error_kind is not None and sequence.error is not None:
                each.fail(sequence.error_kind, sequence.error)
                each.finished = now
                continue
            each.scores = scoring.scores
            if each.request.params.max_tokens:
                # As if preempted: it goes before rows that have not begun.
                each.high_water = each.num_prompt_tokens
                going.append(each)
            else:
                each.finish_reason, each.first_token, each.finished = FinishReason.SCORED, now, now
        return going, [each for each in followers if each.finish_reason is not None]


def _key(sequence: Sequence) -> object:
    """What rows with the same scores have in common."""
    request = sequence.request
    return request.prompt_ids, request.scoring, request.context
