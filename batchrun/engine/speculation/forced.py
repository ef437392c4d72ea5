"""Draft tokens that constraints force, which can't be wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from batchrun.engine.constraints import Constraints
from batchrun.engine.core import Sequence
from batchrun.engine.speculation.proposers import DraftBatch, Proposer

# Forced tokens for which a row sits out a step, or two if its last token is pending, which then is
# the first of them: fewer come as soon without.
_LEAST, _LEAST_PENDING = 2, 4


class ConstrainedDrafts:
    """Proposes the tokens that constraints force; of other draft tokens, those that they allow.

    Args:
        constraints: Knows the matchers.
        inner: Proposes draft tokens for whatever is not forced.
        num_logits: Maximum rows of logits in a step, with drafts.
    """

    def __init__(self, constraints: Constraints, inner: Proposer, num_logits: int) -> None:
        self._constraints, self._inner, self._num_logits = constraints, inner, num_logits
        self._room = 0  # for draft tokens in the last step
        self._paying: dict[Sequence, int] = {}  # and their forced tokens, for which there is room

    def open(self, sequence: Sequence) -> None:
        """See `Proposer.open`."""
        self._inner.open(sequence)

    def close(self, sequence: Sequence) -> None:
        """See `Proposer.close`."""
        self._inner.close(sequence)
        self._paying.pop(sequence, None)

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """See `Proposer.settle`."""
        settled = list(sequences)
        self._inner.settle(settled)
        room = self._room - sum(self._paying.values())
        for sequence in settled:
            if sequence.request.params.constraint:
                room += self._paying.pop(sequence, 0)
                count = len(self._constraints.forced(sequence))
                if (_LEAST_PENDING if sequence.num_pending else _LEAST) <= count <= room:
                    self._paying[sequence] = count
                    room -= count

    def propose(self, batch: DraftBatch) -> list[tuple[int, ...]]:
        """See `Proposer.propose`; what is forced comes first."""
        places = self._room = min(batch.budget, self._num_logits - batch.num_logits)
        forced: dict[Sequence, tuple[int, ...]] = {}
        for sequence, room in batch.sequences:
            if sequence.request.params.constraint and places > 0:
                ids = self._constraints.forced(sequence)[: max(0, min(room, places))]
                if ids:
                    forced[sequence] = tuple(ids)
                    places -= len(ids)
        rest = [pair for pair in batch.sequences if pair[0] not in forced]
        count = sum(map(len, forced.values()))
        self._constraints.num_forced += count
        left = replace(
            batch,
            sequences=rest,
            num_tokens=batch.num_tokens + count,
            num_logits=batch.num_logits + count,
            budget=batch.budget - count,
        )
        others = dict(zip((s for s, _ in rest), self._inner.propose(left), strict=True))
        return [
            forced[sequence] if sequence in forced else self._allowed(sequence, others[sequence])
            for sequence, _ in batch.sequences
        ]

    def pays(self, sequence: Sequence) -> bool:
        """See `Proposer.pays`."""
        return sequence in self._paying or self._inner.pays(sequence)

    def _allowed(self, sequence: Sequence, drafts: tuple[int, ...]) -> tuple[int, ...]:
        return drafts[: self._constraints.allowed(sequence, drafts)]
