"""Who computes what in the next step. Pure decisions over a `KVSpace`; no torch, no clock."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from batchrun.engine.core import FinishReason, Segment, Sequence, Status, StepPlan, StepTokens


class KVSpace(Protocol):
    """All that the scheduler sees of KV memory."""

    def open(self, num_tokens: int = 0) -> int | None:
        """Take a slot meant for about `num_tokens`; None while all are taken."""

    def ensure(self, slot: int, num_tokens: int) -> bool:
        """Back tokens `[0, num_tokens)` of the slot with memory: all of them, or no change."""

    def close(self, slot: int, step: int) -> None:
        """Give the slot up; `step` is the last one that may read it."""

    def retire(self, step: int) -> None:
        """Every step up to and including `step` has finished reading and writing."""

    def can_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of that length could ever be held, were it alone."""


class Scheduler:
    """Continuous batching under one catch-up rule.

    Iteration-level scheduling is Orca's (Yu et al., OSDI 2022), mixing prefill chunks with decodes
    Sarathi-Serve's (Agrawal et al., OSDI 2024). Each step advances `num_computed_tokens` of the
    chosen sequences towards `num_tokens`: chunked prefill, decode, and recomputation after a
    preemption are the same thing.

    Steps are pipelined: a step may be planned before the one before it is committed, whose tokens
    then count as pending. Slots that are left keep their memory until every step that was planned
    by then is committed.

    Args:
        space: Where keys and values live.
        max_num_seqs: Sequences that may run at once.
        max_num_batched_tokens: Tokens computed in one step at most.
        max_model_len: Tokens of prompt and output together at most.
    """

    def __init__(
        self,
        space: KVSpace,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")
        self.space = space
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission: the youngest is last
        self.rejected: list[Sequence] = []
        self.step = 0
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self._launched = self._committed = 0  # the last steps with segments
        self._admitting = True  # False from a preemption until memory has come back

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that can never fit is rejected with the reason at once."""
        need = sequence.num_prompt_tokens + 1
        if need > self.max_model_len:
            self._reject(
                sequence,
                "prompt_too_long",
                f"the prompt has {sequence.num_prompt_tokens} tokens and the context holds "
                f"{self.max_model_len}, one of them for the answer",
            )
        elif not self.space.can_fit(need):
            self._reject(
                sequence,
                "kv_budget",
                f"the prompt has {sequence.num_prompt_tokens} tokens, whose keys and values "
                "exceed the KV budget; raise --kv-budget",
            )
        else:
            self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self.waiting or self.running)

    def plan(self) -> StepPlan:
        """Decide the next step: every running sequence first, then admissions.

        Returns:
            A plan that must be launched. It may be empty: then nothing runs, or what ran could not
            be kept (see `rejected`), or the next step depends on steps that are not committed yet.
        """
        self.step += 1
        segments: list[Segment] = []
        if not self._continue(segments):
            return StepPlan(self.step, ())
        # Whoever was preempted in this step had its segment taken back by `_ensure`.
        budget = self.max_num_batched_tokens - sum(s.length for s in segments)
        # Admitting right after a preemption would only preempt again: wait for memory.
        self._admitting = self._admitting or not self.running
        while budget and self.waiting and self._admitting and len(self.running) < self.max_num_seqs:
            segment = self._admit(budget)
            if segment is None:
                break
            segments.append(segment)
            budget -= segment.length
        for segment in segments:
            sequence, end = segment.sequence, segment.start + segment.length
            self.num_recomputed_tokens += max(0, min(end, sequence.high_water) - segment.start)
            sequence.num_computed_tokens = end
            sequence.high_water = max(sequence.high_water, end)
            sequence.num_pending += segment.sampled
        if segments:
            self._launched = self.step
        return StepPlan(self.step, tuple(segments))

    def commit(self, plan: StepPlan, tokens: StepTokens, finished: list[Sequence]) -> None:
        """Take in a collected step; steps are committed in the order of their plans.

        Args:
            plan: The plan that was run.
            tokens: One token per sampled segment, already appended to `output_ids` by the caller
                who knows about stop conditions.
            finished: The sequences that ended with this step; their slots are closed.
        """
        assert plan.step == tokens.step
        for segment in plan.segments:
            segment.sequence.num_pending -= segment.sampled
        for sequence in finished:
            if sequence.slot is not None:
                self._leave(sequence)
            else:  # preempted while its last token was on the way
                self.waiting.remove(sequence)
            sequence.status = Status.FINISHED
        if finished:
            self._admitting = True
            self.running = [s for s in self.running if s.status is Status.RUNNING]
        self._committed = plan.step
        self.space.retire(plan.step)

    def _continue(self, segments: list[Segment]) -> bool:
        """Plan the running sequences; False if that has to wait for the steps in flight."""
        budget = self.max_num_batched_tokens
        # Decodes first: a long prefill must not starve tokens that are one step away.
        for sequence in sorted(
            self.running, key=lambda s: s.num_tokens - s.num_computed_tokens > 1
        ):
            if budget == 0:
                break
            # Preempted by an elder in this very step, or its last token is on the way.
            if sequence.slot is None or self._is_complete(sequence):
                continue
            length = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            fits = self._ensure(sequence, sequence.num_computed_tokens + length, segments)
            if fits is None:
                return False
            if fits:
                segments.append(_segment(sequence, length))
                budget -= length
        return True

    def _is_complete(self, sequence: Sequence) -> bool:
        """Whether no token may follow those that were sampled, known or pending."""
        generated = len(sequence.output_ids) + sequence.num_pending
        return (
            generated >= sequence.request.params.max_tokens
            or sequence.num_tokens >= self.max_model_len
        )

    def _admit(self, budget: int) -> Segment | None:
        """Open a slot for the first waiting sequence and back its first chunk."""
        sequence = self.waiting[0]
        if sequence.num_pending:  # preempted; its last token is not known yet
            return None
        slot = self.space.open(sequence.num_tokens)
        if slot is None:
            return None
        length = min(sequence.num_tokens, budget)
        if not self.space.ensure(slot, length):
            self.space.close(slot, self._launched)
            return None
        self.waiting.popleft()
        sequence.slot = slot
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        return _segment(sequence, length)

    def _ensure(self, sequence: Sequence, num_tokens: int, segments: list[Segment]) -> bool | None:
        """Back `num_tokens` of a running sequence, preempting the youngest until it succeeds.

        Returns:
            False when `sequence` itself had to go: preempted, or rejected if it was alone. None
            when steps are in flight: only after them a preemption gives memory back.
        """
        assert sequence.slot is not None
        while not self.space.ensure(sequence.slot, num_tokens):
            if self._committed < self._launched:
                return None
            victim = self.running[-1]
            segments[:] = [s for s in segments if s.sequence is not victim]
            if victim is sequence and len(self.running) == 1:
                self._leave(sequence)
                self.running.remove(sequence)
                self._reject(
                    sequence,
                    "kv_budget",
                    f"the row needs the keys and values of {num_tokens} tokens "
                    f"({sequence.num_prompt_tokens} of them the prompt), more than the KV budget "
                    "holds; raise --kv-budget or lower --max-tokens",
                )
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take the slot away; the sequence recomputes from its tokens when admitted again."""
        self.num_preemptions += 1
        self._admitting = False
        self._leave(sequence)
        self.running.remove(sequence)
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.space.close(sequence.slot, self._launched)
        sequence.slot = None
        sequence.num_computed_tokens = 0

    def _reject(self, sequence: Sequence, kind: str, reason: str) -> None:
        sequence.status = Status.FINISHED
        sequence.finish_reason = FinishReason.ERROR
        sequence.error_kind = kind
        sequence.error = reason
        self.rejected.append(sequence)

    def check(self) -> None:
        """Assert what must hold between steps."""
        slots = [s.slot for s in self.running]
        assert None not in slots, "a running sequence has no slot"
        assert len(set(slots)) == len(slots), f"a slot is used twice: {slots}"
        assert len(self.running) <= self.max_num_seqs
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert 0 <= sequence.num_computed_tokens <= sequence.num_tokens
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING
            assert sequence.slot is None
            assert sequence.num_computed_tokens == 0


def _segment(sequence: Sequence, length: int) -> Segment:
    assert sequence.slot is not None
    start = sequence.num_computed_tokens
    sampled = start + length == sequence.num_tokens
    pending = start >= sequence.num_known_tokens
    return Segment(sequence, sequence.slot, start, length, sampled, pending)
