"""Draft tokens from a second, smaller model of the same vocabulary.

The idea is Leviathan et al.'s (ICML 2023). Here both models choose by the same rules and the same
random numbers, which depend on the row and the position alone. So a draft token is right where the
two models would say the same, and needs no correction of its probability where they would not.

The draft model's keys and values lie in the sequences' slots, as those of further layers:

    tokens            | 0 ...          | ... known - 1 | known ... known + d - 1 |
    the draft model   | has K and V    | catches up    | chose them: K and V of all but the last
    the next step                                      | verifies them

They are never copied, kept or counted apart: what holds a token's memory for one model holds it for
both. Whether they are right decides how many draft tokens are, and never what an answer says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batchrun.engine.constraints import Constraints
from batchrun.engine.core import Segment, Sequence
from batchrun.engine.executor import Executor, TorchExecutor
from batchrun.engine.model.generation import vocabulary_size
from batchrun.engine.plan import NewSequence, StepPlan
from batchrun.engine.speculation.cost import StepCost
from batchrun.engine.speculation.proposers import num_right
from batchrun.engine.stays import slot_of

if TYPE_CHECKING:
    from llguidance import LLMatcher

_SPREAD = 16  # draft tokens over which the cost of reading a sequence for the first time is spread


@dataclass(slots=True, eq=False)
class _Draft:
    """What the draft model has computed of a sequence, and what it guesses.

    Args:
        sequence: The sequence, in its slot.
        ready: Whether a step of it has ended: before that, memory that it shares may be on its way.
        computed: Leading tokens that have keys and values, draft tokens included.
        known: Known tokens when the draft tokens were chosen.
        ids: The draft tokens.
        most: How many are wanted.
        matcher: What they must match: the sequence's, after them.
    """

    sequence: Sequence
    ready: bool = False
    computed: int = 0
    known: int = 0
    ids: list[int] = field(default_factory=list)
    most: int = 0
    matcher: LLMatcher | None = None

    def settle(self) -> None:
        """Keep what was computed for the tokens that did come."""
        known = self.sequence.num_known_tokens
        came = self.sequence.token_ids(self.known, len(self.ids))
        right = num_right(self.ids, came)
        # The last known token is computed again if need be: its logits are wanted.
        self.computed = min(self.computed, self.known + right, known - 1)
        self.known, self.ids = known, []

    @property
    def num_left(self) -> int:
        """Tokens to compute before another can be chosen."""
        return self.known + len(self.ids) - self.computed

    def segment(self, most: int) -> Segment:
        """The next tokens to compute, at most `most`."""
        length = min(self.num_left, most)
        ids = self.sequence.token_ids(self.computed, min(length, self.known - self.computed))
        ids += self.ids[max(0, self.computed - self.known) :][: length - len(ids)]
        slot, last = slot_of(self.sequence), length == self.num_left
        # Nothing is said of whose tokens it begins with: others may have no such numbers.
        return Segment(slot, self.computed, length, last, ids, key=self.sequence.key)


class ModelDrafts:
    """Has a second model choose draft tokens, for all sequences of a step together.

    Args:
        executor: Computes the draft model's steps, over the slots that the sequences are in. It
            samples as the model's executor does.
        constraints: Knows which tokens constrained answers allow.
        ensure: Gives a slot memory for that many tokens; False if there is none.
        step_cost: What the draft model's steps cost.
        share: Of the model's weights, how many the draft model has.
        max_num_batched_tokens: Maximum number of tokens computed in one of the draft model's steps.
        max_model_len: Maximum number of tokens that the draft model can read.
        vocabulary: Tokens that both models know are below this.
        eos_ids: The model's end tokens.

    Attributes:
        num_steps: The draft model's steps so far.
    """

    def __init__(
        self,
        executor: Executor,
        constraints: Constraints,
        ensure: Callable[[int, int], bool],
        step_cost: StepCost,
        *,
        share: float,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocabulary: int,
        eos_ids: Collection[int] = (),
    ) -> None:
        self._executor, self._constraints, self._ensure = executor, constraints, ensure
        self._step_cost, self._share = step_cost, share
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len, self._vocabulary = max_model_len, vocabulary
        self._eos_ids = frozenset(eos_ids)
        self._drafts: dict[Sequence, _Draft] = {}
        self.num_steps = 0

    def open(self, sequence: Sequence) -> None:
        """See `Proposer.open`.

        What it shares with others is computed again by the draft model, to the same places: a
        prefix is mostly shared before the draft model has seen it.
        """
        self._drafts[sequence] = _Draft(sequence)

    def close(self, sequence: Sequence) -> None:
        """See `Proposer.close`."""
        self._drafts.pop(sequence, None)

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """See `Proposer.settle`."""
        for sequence in sequences:
            if sequence in self._drafts:
                self._drafts[sequence].ready = True

    def cost(self, sequences: Seq[Sequence], step: float) -> float:
        """See `DraftModel.cost`: with a part of what it takes to read what it has not read yet."""
        if not self._step_cost.is_known:
            return self._share * step
        unread = sum(s.num_known_tokens - self._drafts[s].computed - 1 for s in sequences)
        seconds, _ = self._step_cost.of(len(sequences), max(0, unread) // _SPREAD)
        return seconds

    def guess(self, wanted: Seq[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """Choose draft tokens; computes until they are there.

        The draft model first reads the tokens that it has not read yet: for a sequence that is new
        to it, the prompt and all of the answer so far. What does not fit into one step is read in
        the next calls. So it has at most as many steps as a sequence gets draft tokens, the first
        of up to `max_num_batched_tokens` tokens, the others of one token per sequence.

        Args:
            wanted: Sequences in slots, whose tokens are all known, and how many draft tokens each
                should get; the step that verifies them must have room for as many.

        Returns:
            The draft tokens of each: fewer where an answer would end, or the draft model can't read
            that far; none where there is no memory for them, some tokens are still to be read, or
            the sequence has just been opened.
        """
        drafts = [self._begin(sequence, most) for sequence, most in wanted]
        left = [draft for draft in drafts if draft is not None]
        sequences = [(slot_of(d.sequence), d.sequence) for d in left]
        new = [NewSequence(slot, s.request, tuple(s.output_ids)) for slot, s in sequences]
        while left:
            self._step(left, new)
            left, new = [draft for draft in left if 0 < len(draft.ids) < draft.most], []
        for draft in drafts:
            if draft is not None and not draft.ids:  # what was for draft tokens holds none
                self._ensure(slot_of(draft.sequence), draft.known)
        return [() if draft is None else tuple(draft.ids) for draft in drafts]

    def _begin(self, sequence: Sequence, most: int) -> _Draft | None:
        """Get ready to choose draft tokens; None if there can be none."""
        draft, known = self._drafts[sequence], sequence.num_known_tokens
        draft.most = min(most, self._max_model_len + 1 - known)
        if not draft.ready or draft.most < 1:
            return None
        draft.settle()
        unread = sequence.token_ids(draft.computed, known - draft.computed)
        if max(unread) >= self._vocabulary:
            return None
        # The step that verifies them needs this memory too.
        if not self._ensure(slot_of(sequence), known + draft.most):
            return None
        draft.matcher = self._constraints.copy(sequence)
        return draft

    def _step(self, drafts: Seq[_Draft], new: Seq[NewSequence]) -> None:
        """Advance each sequence towards its last token, and choose another behind it."""
        left, taken = self._max_num_batched_tokens, list[tuple[_Draft, Segment]]()
        for draft in sorted(drafts, key=lambda draft: draft.num_left > 1):  # single tokens first
            if left:
                taken.append((draft, draft.segment(left)))
                left -= taken[-1][1].length
        segments = tuple(segment for _, segment in taken)
        matchers = [draft.matcher for draft, segment in taken if segment.sampled]
        self.num_steps += 1
        began = time.perf_counter()
        ticket = self._executor.launch(StepPlan(self.num_steps, segments, tuple(new)))
        self._executor.sample(ticket, self._constraints.masks_of(matchers))
        tokens = iter(self._executor.collect(ticket).token_ids)
        self._step_cost.observe(segments, time.perf_counter() - began)
        for draft, segment in taken:
            draft.computed = segment.end
            if segment.sampled:
                self._take(draft, next(tokens))

    def _take(self, draft: _Draft, token: int) -> None:
        """Add a draft token, unless nothing would follow it: the step before chooses that one."""
        ends = draft.sequence.request.params.stop_ids(self._eos_ids)
        known, matcher = 0 <= token < self._vocabulary, draft.matcher
        if known and matcher is not None:
            matcher.consume_token(token)
        if not known or token in ends or (matcher is not None and matcher.is_stopped()):
            draft.most = len(draft.ids)
        else:
            draft.ids.append(token)


def make_drafts(
    executor: TorchExecutor,
    drafter: TorchExecutor,
    constraints: Constraints,
    ensure: Callable[[int, int], bool],
    step_cost: StepCost,
    *,
    max_num_batched_tokens: int,
) -> ModelDrafts:
    """What `drafter` guesses for the sequences of `executor`: see `ModelDrafts`."""
    models = executor.loaded.model, drafter.loaded.model
    return ModelDrafts(
        *(drafter, constraints, ensure, step_cost),
        share=drafter.loaded.weights_bytes / max(1, executor.loaded.weights_bytes),
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=drafter.loaded.max_model_len,
        vocabulary=min(map(vocabulary_size, models)),
        eos_ids=executor.loaded.eos_ids,
    )
