"""Plans which tokens a step computes. Pure decisions over a `KVSpace`; no torch, no clock."""

from __future__ import annotations

import sys
from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from batchrun.engine.core import Group, Segment, Sequence
from batchrun.engine.kvspace import KVSpace
from batchrun.engine.plan import StepOutput, StepPlan
from batchrun.engine.prefixes import BLOCK, SharedPrefixes
from batchrun.engine.speculation.proposers import Proposer, add_drafts, sits_out
from batchrun.engine.stays import Stays, next_segment, slot_of
from batchrun.engine.waiting import WaitingQueue, check_machine, why_refused

# Fraction of the budget that admission leaves for running sequences to grow. Without it, the
# youngest is preempted again and again: it saves 90% of recomputed tokens for 2 to 4% more steps.
_SPARE = 0.05


class Scheduler:
    """Continuous batching under one catch-up rule.

    Iteration-level scheduling is Orca's (Yu et al., OSDI 2022); mixing prefill chunks with decodes
    is Sarathi-Serve's (Agrawal et al., OSDI 2024). Each step advances `num_computed_tokens` of the
    chosen sequences towards `num_tokens`: chunked prefill, decode, and recomputation after a
    preemption are the same thing.

    Steps are pipelined: a step may be planned before the previous one is committed, whose tokens
    then count as pending. A slot that is left keeps its memory until every step planned by then is
    committed.

    Rows with a common prefix compute it once: a later row shares the memory of the first, and waits
    while the first computes it. A finished slot keeps what waiting rows need, until the memory is
    needed more urgently.

    The sequences of a `Group` are scheduled like others. One that has computed all its tokens is
    idle until the others have too; if idle ones hold all the memory, the youngest are preempted. An
    admitted row has places in the batch for as many sequences as its group may have.

    Args:
        space: Where keys and values are stored; has `prefixes.KEPT` slots beyond `max_num_seqs`.
        max_num_seqs: Maximum number of running sequences.
        max_num_batched_tokens: Maximum number of tokens computed in one step.
        max_model_len: Maximum number of tokens of prompt and output together.
        max_scored_tokens: Maximum number of tokens in one step after which known ones are scored:
            each takes a row of logits.
        share: Whether common prefixes are shared.
        proposer: Proposes draft tokens. A sequence is in no step while draft tokens of it are in
            flight.
        overlap: Whether a step is planned before the last one is committed.
        lookahead: Number of steps for which memory is prepared while the device computes; 0 if
            preparing it early saves no time.
    """

    def __init__(
        self,
        space: KVSpace,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_scored_tokens: int = sys.maxsize,
        share: bool = True,
        proposer: Proposer | None = None,
        overlap: bool = False,
        lookahead: int = 0,
    ) -> None:
        if min(max_num_seqs, max_num_batched_tokens, max_scored_tokens) < 1:
            raise ValueError("the limits of a step must be at least 1")
        self.space = space
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_scored_tokens = max_scored_tokens
        self.running: list[Sequence] = []  # in order of arrival: the youngest is last
        self.rejected: list[Sequence] = []
        self.step = 0
        self.num_preemptions = 0
        self._launched = self._committed = 0  # the last steps with segments
        self._admitting = True  # False from a preemption until memory has come back
        self._drafting = False  # whether the last step had room for drafts
        self._overlap = overlap
        self._share = share
        self._lookahead = lookahead
        self._groups: dict[Group, None] = {}  # those that have started
        self._prefixes = SharedPrefixes(space, share)
        self.stays = Stays(space, self._prefixes, proposer)
        self.waiting = WaitingQueue(self._prefixes)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that can never fit is rejected at once, with the reason."""
        refused = why_refused(
            sequence.num_prompt_tokens,
            sequence.width,
            scored=sequence.scoring is not None,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            can_fit=self.space.can_fit,
        )
        if refused is not None:
            self._reject(sequence, *refused)
        else:
            self.waiting.add(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self.waiting or self.running)

    def plan(self) -> StepPlan:
        """Decide the next step: all running sequences first, then admissions.

        Returns:
            A plan that must be launched. It may be empty: then nothing runs, or what ran could not
            be kept (see `rejected`), or the next step depends on uncommitted steps.
        """
        self.step += 1
        segments: list[Segment] = []
        if not self._continue(segments):
            return StepPlan(self.step, ())
        # `_make_room` has taken back the segments of sequences preempted in this step.
        budget = self.max_num_batched_tokens - sum(s.length for s in segments)
        busy = bool(segments) or self._committed < self._launched
        # Admitting right after a preemption would only preempt again: wait for memory.
        self._admitting = self._admitting or not busy
        share = self._share
        scored = self.max_scored_tokens - sum(len(s.targets) for s in segments)
        while budget and self.waiting and self._admitting:
            segment = self._admit(budget, scored, share, _SPARE if busy else 0)
            if segment is not None:
                segments.append(segment)
                budget -= segment.length
                scored -= len(segment.targets)
                busy = True
            elif busy:
                break
            else:  # nothing else runs: free what idle and earlier sequences hold
                self.space.retire(self.step)
                self.step += 1
                if self._prefixes.drop_oldest():
                    continue
                if self.running:
                    self._preempt(self.running[-1])
                    self._admitting = True
                elif share:
                    share = False
                elif not self._reject_hopeless():
                    check_machine(self.space)
                    break
        self._prefixes.drop_unwanted()
        # Only if there is memory beyond what is certainly needed.
        proposer = self.stays.proposer
        may = proposer is not None and self._admitting and budget > 0
        self._drafting = may and self.space.has_room(budget, _SPARE)
        if proposer is not None and self._drafting:
            add_drafts(
                *(proposer, segments, self.stays.owners(segments), budget, self.max_model_len),
                ensure=self.space.ensure,
                overlap=self._overlap,
            )
        copies, after = self.stays.take_copies()
        new = self.stays.launch(segments, self.step)
        if segments:
            self._launched = self.step
        return StepPlan(self.step, tuple(segments), new, copies, after)

    def commit(
        self,
        plan: StepPlan,
        tokens: StepOutput,
        finished: list[Sequence],
        forks: Seq[tuple[Sequence, Sequence]] = (),
    ) -> None:
        """Take in a collected step; steps are committed in the order of their plans.

        Args:
            plan: The plan that was run.
            tokens: Tokens of the sampled segments, already appended to `output_ids` by the caller,
                which knows the stop conditions.
            finished: The sequences that ended with this step; their slots are closed.
            forks: Sequences that continue from another's tokens: see `Group.advance`.
        """
        assert plan.step == tokens.step
        self.stays.collect(plan.segments)
        self._finish(finished)
        self.stays.settle(plan.segments)
        self._committed = plan.step
        for child, _ in forks:
            if child.slot is not None:  # idle: no uncommitted step reads it
                self.stays.end(child, self._committed, keep=True)
                self.running.remove(child)
            elif child in self.waiting:
                self.waiting.remove(child)
        self.space.retire(plan.step, self._coming(), self._others())
        for child, parent in forks:
            found = self.stays.fork(child, parent, self.step + 1)
            if found is None:
                self.waiting.add(child)
            else:
                self._start(child, *found, child.num_tokens - 1)
        self._trim()

    def finish(self, sequences: Seq[Sequence]) -> None:
        """Close the slots of sequences that ended after `commit`, without a step of their own."""
        self._finish(sequences)
        self._trim()

    def _trim(self) -> None:
        if not self.has_work and self._committed == self._launched:
            self.space.retire(self._committed)
            self.space.trim()

    def _coming(self) -> Iterator[tuple[int, int]]:
        """Slots, and how many tokens they will hold a few steps from now."""
        chunk, ahead, longest = self.max_num_batched_tokens, self._lookahead, self.max_model_len
        for s in self.running if ahead else ():
            if s.slot is not None:
                tokens = min(s.num_tokens, s.num_computed_tokens + chunk) + ahead
                if tokens > s.most_tokens or tokens > longest:
                    tokens = min(s.most_tokens, longest)
                yield s.slot, tokens

    def _others(self) -> int:
        """Tokens of sequences that may be admitted next, at most one step's worth."""
        most = self.max_num_batched_tokens if self._lookahead else 0
        return self.waiting.num_tokens(self.max_num_seqs - len(self.running), most)

    def _finish(self, sequences: Seq[Sequence]) -> None:
        """Close the slots of sequences that have ended, or take them out of the queue.

        What rows that failed have computed is not shared any more.
        """
        for sequence in sequences:
            if sequence.slot is not None:
                if _leader(sequence).error is not None:
                    self._prefixes.forget(sequence.slot)
                self.stays.end(sequence, self._launched, keep=True)
            else:  # preempted, and its group has ended
                self.waiting.remove(sequence)
            if sequence.group is not None:
                self._groups.pop(sequence.group, None)
        if sequences:
            self._admitting = True
            self.running = [s for s in self.running if s.slot is not None]

    def _continue(self, segments: list[Segment]) -> bool:
        """Plan the running sequences; False if that must wait for the steps in flight."""
        budget, ensure, longest = self.max_num_batched_tokens, self.space.ensure, self.max_model_len
        decodes: list[tuple[Sequence, int]] = []
        prefills: list[tuple[Sequence, int]] = []
        proposer = self.stays.proposer if self._drafting else None
        # Rows take drafts in the same steps, so that the others' steps stay short.
        verifying = any(s.num_drafts for s in self.running) if proposer else False
        for sequence in self.running:
            num_tokens = sequence.num_tokens
            todo = num_tokens - sequence.num_computed_tokens
            if (sequence.num_pending or verifying) and sits_out(proposer, sequence, longest):
                continue
            # If not, it is a beam that waits for others, or its last token is in flight.
            if todo and num_tokens < sequence.most_tokens and num_tokens < longest:
                (decodes if todo == 1 else prefills).append((sequence, todo))
        scored = self.max_scored_tokens
        # Decodes first: a long prefill must not starve tokens that are one step away.
        for sequence, todo in decodes + prefills:
            slot, start, length = sequence.slot, sequence.num_computed_tokens, min(todo, budget)
            if length == 0:
                break
            if sequence.scoring is not None:
                length = sequence.scoring.fitting(start, length, scored)
            if slot is None or length == 0:
                continue  # preempted by an older one in this step, or none may be scored any more
            fits = ensure(slot, start + length) or self._make_room(
                sequence, start + length, segments
            )
            if fits is None:
                return False
            if fits:
                segment = next_segment(sequence, start, length)
                segments.append(segment)
                budget -= length
                scored -= len(segment.targets)
        return True

    def _admit(self, budget: int, scored: int, share: bool, spare: float) -> Segment | None:
        """Start the first waiting sequence that can: open a slot and back its first chunk."""
        found = self.waiting.first(self._groups, self._places())
        if found is None:
            return None
        sequence, source, ready = found
        shared, scoring = ready * share, sequence.scoring
        if spare and not self.space.has_room(sequence.num_tokens - shared, spare):
            return None
        shared = shared if shared >= BLOCK else 0
        length = min(sequence.num_tokens - shared, budget)
        if scoring is not None:
            length = scoring.fitting(shared, length, scored)
        if not length:
            return None
        if shared:
            slot = self.space.share(source, shared, sequence.num_tokens, self.step)
        else:
            slot = self.space.open(sequence.num_tokens)
        if slot is None:
            return None
        if not self.space.ensure(slot, shared + length):
            self._prefixes.forget(slot)
            self.space.close(slot, self._launched)
            return None
        self.waiting.remove(sequence)
        self._start(sequence, slot, source, shared)
        self._prefixes.expect(sequence)
        if sequence.group is not None:
            self._groups[sequence.group] = None
        return next_segment(sequence, shared, length)

    def _start(self, sequence: Sequence, slot: int, source: int, shared: int) -> None:
        """Run a sequence in a slot that already has its first tokens, from another slot."""
        self.stays.begin(sequence, slot, source, shared)
        # Sorted by arrival, so that two can't preempt each other forever.
        insort(self.running, sequence, key=lambda s: s.arrived)

    def _places(self) -> int:
        """Sequences that may be admitted beyond the running ones and the started groups."""
        if not self._groups:
            return self.max_num_seqs - len(self.running)
        plain = sum(sequence.group is None for sequence in self.running)
        return self.max_num_seqs - plain - sum(group.width for group in self._groups)

    def _make_room(
        self, sequence: Sequence, num_tokens: int, segments: list[Segment]
    ) -> bool | None:
        """Preempt the youngest until a running sequence has memory for `num_tokens`.

        Returns:
            False if `sequence` itself was preempted, or rejected because it was alone. None if
            steps are in flight: a preemption frees memory only after they end.
        """
        if self._committed < self._launched:
            return None
        while True:
            if not self._prefixes.drop_oldest():
                victim = self._victim(sequence)
                segments[:] = [s for s in segments if s.key != victim.key]
                if victim is sequence and len(self.running) == 1:
                    check_machine(self.space)
                    self._reject_begun(sequence, num_tokens)
                    return False
                self._preempt(victim)
                if victim is sequence:
                    return False
            if self.space.ensure(slot_of(sequence), num_tokens):
                return True

    def _victim(self, sequence: Sequence) -> Sequence:
        """The sequence to preempt: the youngest, or an idle one of its own group before itself."""
        victim, group = self.running[-1], sequence.group
        if victim is sequence and group is not None:
            idle = [s for s in self.running if s.group is group and s.idle]
            return idle[-1] if idle else victim
        return victim

    def _preempt(self, sequence: Sequence) -> None:
        """Take its slot away; when admitted again, the sequence is recomputed from its tokens."""
        assert not sequence.num_pending, "a step in flight computes a token of it"
        self.num_preemptions += 1
        self._admitting = False
        self.stays.interrupt(sequence, self._launched)
        self.running.remove(sequence)
        self.waiting.add(sequence)

    def _reject_hopeless(self) -> bool:
        """Reject a waiting sequence that has outgrown all memory; False if there is none."""
        for sequence in self.waiting:
            if not self.space.can_fit(sequence.num_tokens):
                self._reject_begun(sequence, sequence.num_tokens)
                return True
        return False

    def _reject_begun(self, sequence: Sequence, num_tokens: int) -> None:
        """Reject a row, with all its beams, that now needs more memory than there is."""
        self._reject(
            _leader(sequence),
            "kv_budget",
            f"the row needs KV cache for {num_tokens} tokens "
            f"({sequence.num_prompt_tokens} of them the prompt), more than the KV budget "
            "holds; raise --kv-budget or lower --max-tokens",
        )
        self._finish([sequence] if sequence.group is None else sequence.group.sequences)

    def _reject(self, sequence: Sequence, kind: str, reason: str) -> None:
        sequence.fail(kind, reason)
        self.rejected.append(sequence)


def _leader(sequence: Sequence) -> Sequence:
    """The sequence that its row began with."""
    return sequence if sequence.group is None else sequence.group.leader
