"""Speculative decoding: draft tokens that one step verifies together, and who proposes them.

The step computes them after the sequence's last token, samples after each, and accepts what was
sampled as long as the draft tokens before it were right (Leviathan et al., ICML 2023): the result
is the same as one token per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol

from batchrun.engine.core import Segment, Sequence


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Sequences of a step that may take draft tokens, each with its maximum.

    Args:
        sequences: The sequences, whose tokens are all known, and how many drafts each may take.
        num_tokens: Tokens of the step, without drafts.
        num_logits: Rows of logits of the step, without drafts.
        budget: Maximum number of draft tokens in total.
    """

    sequences: Seq[tuple[Sequence, int]]
    num_tokens: int
    num_logits: int
    budget: int


class Proposer(Protocol):
    """Proposes draft tokens, for executors that have no steps in flight."""

    def open(self, sequence: Sequence) -> None:
        """Note that a sequence now runs in a slot and may appear in batches."""

    def close(self, sequence: Sequence) -> None:
        """Note that a sequence has left its slot."""

    def propose(self, batch: DraftBatch) -> list[tuple[int, ...]]:
        """Draft tokens for each sequence of the batch; may be empty.

        As many as cost nothing, or as are probably right. Not all of them may be computed.
        """

    def observe(self, segments: Seq[Segment], seconds: float) -> None:
        """Take note of the seconds that a step took."""

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """Note that a step was taken in: these sequences continue, and their tokens are known."""


def add_drafts(
    proposer: Proposer,
    segments: list[Segment],
    owners: Seq[Sequence | None],
    budget: int,
    max_model_len: int,
    *,
    ensure: Callable[[int, int], bool],
) -> None:
    """Append draft tokens to segments of one sampled token.

    Args:
        proposer: Proposes them.
        segments: The step's segments; changed in place.
        owners: The sequence of each segment.
        budget: Maximum number of draft tokens.
        max_model_len: Maximum number of tokens of a sequence.
        ensure: Gives a slot memory for that many tokens; False if there is none.
    """
    able: list[int] = []
    sequences: list[tuple[Sequence, int]] = []
    for i, (segment, sequence) in enumerate(zip(segments, owners, strict=True)):
        if sequence is not None and _takes_drafts(segment, sequence):
            able.append(i)
            room = min(sequence.most_tokens, max_model_len) - sequence.num_known_tokens - 1
            sequences.append((sequence, room))
    tokens = sum(s.length for s in segments)
    logits = sum(s.sampled + len(s.targets) for s in segments)
    proposed = proposer.propose(DraftBatch(sequences, tokens, logits, budget))
    for i, drafts in zip(able, proposed, strict=True):
        segment = segments[i]
        if drafts and ensure(segment.slot, segment.end + len(drafts)):
            ids = (*segment.token_ids, *drafts)
            segments[i] = replace(segment, length=len(ids), token_ids=ids, num_drafts=len(drafts))


def _takes_drafts(segment: Segment, sequence: Sequence) -> bool:
    """Whether drafts may follow: penalties depend on earlier tokens, and beams on each other."""
    return (
        segment.sampled
        and segment.length == 1
        and sequence.group is None
        and not sequence.request.params.penalised
    )
