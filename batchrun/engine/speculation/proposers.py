"""Speculative decoding: draft tokens that one step verifies together, and who proposes them.

The step computes them after the sequence's last token, samples after each, and accepts what was
sampled as long as the draft tokens before it were right (Leviathan et al., ICML 2023): the result
is the same as one token per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Protocol

from batchrun.engine.core import Segment, Sequence


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Sequences of a step that may take draft tokens, each with its maximum.

    Args:
        sequences: The sequences, whose tokens are all known, and how many drafts each may take.
        watched: Other sequences of the step, which take none: how predictable they are can be
            learned from them.
        num_tokens: Tokens of the step, without drafts.
        num_logits: Rows of logits of the step, without drafts.
        budget: Maximum number of draft tokens in total.
    """

    sequences: Seq[tuple[Sequence, int]]
    num_tokens: int
    num_logits: int
    budget: int
    watched: Seq[Sequence] = ()


class Proposer(Protocol):
    """Proposes draft tokens."""

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

    def pays(self, sequence: Sequence) -> bool:
        """Whether draft tokens are worth the steps that a sequence sits out for them.

        Asked only where steps overlap. The sequence is not in the step after its draft tokens: how
        many are right is not known yet. If `num_pending`, it is not in the next step either, after
        which its tokens are known.
        """

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """Note that these sequences, which continue, got tokens that are now known."""

    def learn(self, context: tuple[str, ...], constraint: str | None, token_ids: Seq[int]) -> None:
        """Note an answer to a request of that context and constraint, from an earlier run."""

    def measurements(self) -> dict[str, Any]:
        """Its figures so far, named as in `batchrun.jobs.metrics`."""


class DraftModel(Protocol):
    """A second model that chooses draft tokens."""

    def open(self, sequence: Sequence) -> None:
        """See `Proposer.open`."""

    def close(self, sequence: Sequence) -> None:
        """See `Proposer.close`."""

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """See `Proposer.settle`."""

    def cost(self, sequences: Seq[Sequence], step: float) -> float:
        """Seconds in which it would choose one token for each of the sequences.

        Args:
            sequences: Sequences in slots, whose tokens are all known.
            step: Seconds of the model's own step; until it was tried, it takes some share of them.
        """

    def guess(self, wanted: Seq[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """Choose draft tokens for sequences, so many for each or fewer."""


def num_right(guessed: Iterable[int], came: Iterable[int]) -> int:
    """How many guessed tokens came, up to the first that did not."""
    pairs = zip(guessed, came, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def add_drafts(
    proposer: Proposer,
    segments: list[Segment],
    owners: Seq[Sequence | None],
    budget: int,
    max_model_len: int,
    *,
    ensure: Callable[[int, int], bool],
    overlap: bool = False,
) -> None:
    """Append draft tokens to segments that end in an answer; single tokens stay in front.

    Args:
        proposer: Proposes them.
        segments: The step's segments; changed in place.
        owners: The sequence of each segment.
        budget: Maximum number of draft tokens.
        max_model_len: Maximum number of tokens of a sequence.
        ensure: Gives a slot memory for that many tokens; False if there is none.
        overlap: Whether a step is planned before the tokens of the last one are known.
    """
    able: list[int] = []
    sequences: list[tuple[Sequence, int]] = []
    watched: list[Sequence] = []
    for i, (segment, sequence) in enumerate(zip(segments, owners, strict=True)):
        if sequence is None or not segment.sampled:
            continue
        if segment.length > 1 and segment.start < sequence.num_prompt_tokens:
            continue
        if sequence.group is not None or sequence.request.params.penalised:
            continue  # beams depend on each other, and penalties on earlier tokens
        if overlap and (sequence.num_pending or not proposer.pays(sequence)):
            watched.append(sequence)
        else:
            able.append(i)
            sequences.append((sequence, _room(sequence, max_model_len)))
    tokens = sum(s.length for s in segments)
    logits = sum(s.sampled + len(s.targets) for s in segments)
    proposed = proposer.propose(DraftBatch(sequences, tokens, logits, budget, watched))
    for i, drafts in zip(able, proposed, strict=True):
        segment = segments[i]
        if drafts and ensure(segment.slot, segment.end + len(drafts)):
            ids = (*segment.token_ids, *drafts)
            segments[i] = replace(segment, length=len(ids), token_ids=ids, num_drafts=len(drafts))
    segments.sort(key=lambda segment: segment.length > 1)


def sits_out(proposer: Proposer | None, sequence: Sequence, max_model_len: int) -> bool:
    """Whether a sequence stays out of a step, until tokens in flight are known.

    Either a step in flight has draft tokens of it, or a later one should.

    Args:
        proposer: Proposes draft tokens; None if there is no room for any.
        sequence: The sequence.
        max_model_len: Maximum number of tokens of a sequence.
    """
    if sequence.num_drafts or proposer is None:
        return sequence.num_drafts > 0
    return proposer.pays(sequence) and _room(sequence, max_model_len) > 0


def _room(sequence: Sequence, max_model_len: int) -> int:
    """Maximum number of draft tokens after the last token."""
    return min(sequence.most_tokens, max_model_len) - sequence.num_tokens - 1
