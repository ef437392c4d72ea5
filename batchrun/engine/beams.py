"""Beam search: which continuations of a row survive. Pure decisions over candidates; no torch."""

from __future__ import annotations

import math
from ctypes import c_float
from dataclasses import dataclass

from batchrun.engine.core import Candidates, FinishReason, Likeliest, Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished answer: its tokens, and their log-probability over length ** penalty.

    `logprobs` are the log-probabilities of its tokens, if the row asks for them.
    """

    score: float
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


_Continuation = tuple[float, int, int, tuple[TokenLogprobs, ...]]
"""A score, the rank of the parent sequence, its next token, and that token's log-probabilities."""


class BeamGroup:
    """The beams of one row, each a sequence of its own: beam search as in transformers.

    It starts as one sequence. In each round every sequence reports its candidates, and `advance`
    turns the best of all of them into the sequences of the next round. A sequence with survivors
    continues as the first of them. The remaining survivors take over sequences that have none; new
    sequences are made if there are too few.

    Scores are rounded to float32 where transformers rounds them, so that ties break the same way.

    Args:
        leader: The row's sequence, before anything is generated.
        max_tokens: Maximum length of an answer.
        stop_ids: Tokens that end an answer.

    Attributes:
        sequences: The live sequences, the likeliest first.
        finished: The best answers, `num_beams` at most, the best first.
        ended: Whether `finished` is final.
    """

    def __init__(self, leader: Sequence, max_tokens: int, stop_ids: frozenset[int]) -> None:
        self.leader = leader
        self.params = leader.request.params
        self.sequences = [leader]
        self.finished: list[Hypothesis] = []
        self.ended = False
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._scores = [0.0]  # sums of log-probabilities
        self._reports: dict[Sequence, tuple[Candidates, Likeliest]] = {}

    def report(self, sequence: Sequence, candidates: Candidates, likeliest: Likeliest = ()) -> None:
        """See `Group.report`; takes at least the `width(...)` likeliest tokens."""
        self._reports[sequence] = candidates, likeliest
        sequence.idle = True

    @property
    def width(self) -> int:
        """See `Group.width`."""
        return self.params.num_beams

    @property
    def is_complete(self) -> bool:
        """See `Group.is_complete`."""
        return len(self._reports) == len(self.sequences)

    def advance(self) -> list[tuple[Sequence, Sequence]]:
        """See `Group.advance`."""
        length = len(self.sequences[0].output_ids) + 1
        best = self._best_candidates()
        for sequence in self._reports:
            sequence.idle = False
        self._reports.clear()
        is_last = length >= self._max_tokens
        for score, rank, token, told in best[: self.params.num_beams]:
            if is_last or token in self._stop_ids:
                parent = self.sequences[rank]
                answer = (*parent.output_ids, token), (*parent.logprobs, *told)
                self.finished.append(Hypothesis(self._penalised(score, length), *answer))
        self.finished.sort(key=lambda h: -h.score)
        del self.finished[self.params.num_beams :]
        survivors = [c for c in best if c[2] not in self._stop_ids][: self.params.num_beams]
        if is_last or not survivors or not self._may_improve(survivors[0][0], length):
            self.ended = True
            return []
        return self._take_over(survivors, length)

    def finish(self) -> FinishReason:
        """See `Group.finish`."""
        self.leader.output_ids = list(self.finished[0].token_ids)
        self.leader.logprobs = list(self.finished[0].logprobs)
        stopped = self.leader.output_ids[-1] in self._stop_ids
        return FinishReason.STOP if stopped else FinishReason.LENGTH

    def _best_candidates(self) -> list[_Continuation]:
        """The best candidates, the best first."""
        found: list[_Continuation] = []
        for rank, (sequence, score) in enumerate(zip(self.sequences, self._scores, strict=True)):
            candidates, likeliest = self._reports[sequence]
            for token, logprob, own in candidates:
                told = () if self.params.logprobs is None else ((own, likeliest),)
                found.append((_float32(score + logprob), rank, token, told))
        found.sort(key=lambda c: (-c[0], c[1], c[2]))
        return found[: width(self.params.num_beams, len(self._stop_ids))]

    def _penalised(self, score: float, length: int) -> float:
        """The score divided by length ** penalty, even if that power overflows."""
        try:
            over = _float32(length**self.params.length_penalty)
        except OverflowError:
            over = math.inf
        return _float32(score / over) if over else -math.inf

    def _may_improve(self, score: float, length: int) -> bool:
        """Whether a future answer could beat the worst finished one.

        Args:
            score: The score of the likeliest sequence, which is `length` tokens long.
            length: In tokens.
        """
        params = self.params
        if len(self.finished) < params.num_beams:
            return True
        if params.early_stopping is True:
            return False
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self._max_tokens
        return self._penalised(score, length) > self.finished[-1].score

    def _take_over(
        self, survivors: list[_Continuation], length: int
    ) -> list[tuple[Sequence, Sequence]]:
        parents = self.sequences
        outputs = [(sequence.output_ids, sequence.logprobs) for sequence in parents]
        fertile = {rank for _, rank, *_ in survivors}
        free = [s for rank, s in enumerate(parents) if rank not in fertile]
        forks: list[tuple[Sequence, Sequence]] = []
        self.sequences = []
        for _, rank, token, told in survivors:
            child = parents[rank]
            if rank in fertile:
                fertile.remove(rank)  # the next survivor needs another sequence
            else:
                child = free.pop() if free else self._make()
                forks.append((child, parents[rank]))
            ids, logprobs = outputs[rank]
            child.output_ids, child.logprobs = [*ids, token], [*logprobs, *told]
            child.high_water = child.num_prompt_tokens + length - 1
            self.sequences.append(child)
        self._scores = [score for score, *_ in survivors]
        return forks

    def _make(self) -> Sequence:
        leader = self.leader
        return Sequence(
            leader.request,
            arrived=leader.arrived,
            admitted=leader.admitted,
            first_token=leader.first_token,
            group=self,
        )


def width(num_beams: int, num_stop_ids: int) -> int:
    """Candidates needed so that `num_beams` continue even if the others are all stop tokens."""
    return max(2, 1 + num_stop_ids) * num_beams


def _float32(value: float) -> float:
    return c_float(value).value
