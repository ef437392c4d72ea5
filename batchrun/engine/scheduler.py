"""Which tokens the next step computes. Pure decisions over a `KVSpace`; no torch, no clock."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from batchrun.engine.core import Group, Segment, Sequence
from batchrun.engine.kvspace import KVSpace
from batchrun.engine.plan import StepOutput, StepPlan
from batchrun.engine.prefixes import BLOCK, SharedPrefixes
from batchrun.engine.proposers import Proposer, add_drafts
from batchrun.engine.stays import Stays, slot_of
from batchrun.engine.waiting import WaitingQueue, check_machine, why_refused

# Part of the budget that admitting leaves to sequences that grow: otherwise the youngest would be
# preempted again and again. It saves nine in ten recomputed tokens for 2 to 4% more steps.
_SPARE = 0.05


class Scheduler:
    """Continuous batching under one catch-up rule.

    Iteration-level scheduling is Orca's (Yu et al., OSDI 2022), mixing prefill chunks with decodes
    Sarathi-Serve's (Agrawal et al., OSDI 2024). Each step advances `num_computed_tokens` of the
    chosen sequences towards `num_tokens`: chunked prefill, decode, and recomputation after a
    preemption are the same thing.

    Steps are pipelined: a step may be planned before the one before it is committed, whose tokens
    then count as pending. Slots that are left keep their memory until every step that was planned
    by then is committed.

    Rows with a common prefix compute it once: who comes later shares the memory of who came first,
    and waits while that one computes it. A finished slot keeps what waiting rows need, until memory
    is needed more.

    The sequences of a `Group` are like others. One that has computed all its tokens is idle until
    the others have; where idle ones hold all the memory, the youngest give way. A row that is
    admitted has a place in the batch for all that its group may come to have.

    Args:
        space: Where keys and values live; with `prefixes.KEPT` slots beyond `max_num_seqs`.
        max_num_seqs: Sequences that may run at once.
        max_num_batched_tokens: Tokens computed in one step at most.
        max_model_len: Tokens of prompt and output together at most.
        share: Whether common prefixes are shared.
        proposer: Proposes draft tokens; for executors without steps in flight.
        lookahead: Steps for which memory is prepared while the device computes; 0 where preparing
            it early saves no time.
    """

    def __init__(
        self,
        space: KVSpace,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        share: bool = True,
        proposer: Proposer | None = None,
        lookahead: int = 0,
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")
        self.space = space
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.running: list[Sequence] = []  # in order of arrival: the youngest is last
        self.rejected: list[Sequence] = []
        self.step = 0
        self.num_preemptions = 0
        self._launched = self._committed = 0  # the last steps with segments
        self._admitting = True  # False from a preemption until memory has come back
        self._share = share
        self._lookahead = lookahead
        self._groups: dict[Group, None] = {}  # those that have begun
        self._prefixes = SharedPrefixes(space, share)
        self.stays = Stays(space, self._prefixes, proposer)
        self.waiting = WaitingQueue(self._prefixes)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that can never fit is rejected with the reason at once."""
        refused = why_refused(
            sequence.num_prompt_tokens,
            sequence.width,
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
        """Decide the next step: every running sequence first, then admissions.

        Returns:
            A plan that must be launched. It may be empty: then nothing runs, or what ran could not
            be kept (see `rejected`), or the next step depends on steps that are not committed yet.
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
        while budget and self.waiting and self._admitting:
            segment = self._admit(budget, share, _SPARE if busy else 0)
            if segment is not None:
                segments.append(segment)
                budget -= segment.length
                busy = True
            elif busy:
                break
            else:  # nothing is computed, so what idle and earlier sequences hold is in the way
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
        # Where there is memory for more than what is sure to come.
        proposer, ensure = self.stays.proposer, self.space.ensure
        if proposer and self._admitting and self.space.has_room(budget, _SPARE):
            owners = self.stays.owners(segments)
            add_drafts(proposer, segments, owners, budget, self.max_model_len, ensure=ensure)
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
            tokens: Those of the sampled segments, already appended to `output_ids` by the caller
                who knows about stop conditions.
            finished: The sequences that ended with this step; their slots are closed.
            forks: Sequences that go on from where others are: see `Group.advance`.
        """
        assert plan.step == tokens.step
        self.stays.collect(plan.segments)
        self._finish(finished)
        self.stays.settle(plan.segments, last=plan.step == self._launched)
        self._committed = plan.step
        for child, _ in forks:
            if child.slot is not None:  # idle: no step that is not committed reads it
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
        if not self.has_work and self._committed == self._launched:
            self.space.trim()

    def forsake(self, sequence: Sequence) -> list[Sequence]:
        """Stop sharing what a row computed that has failed, or has to end early.

        Returns:
            Its sequences, all beams of it, which are to be finished.
        """
        sequences = [sequence] if sequence.group is None else sequence.group.sequences
        for each in sequences:
            if each.slot is not None:
                self._prefixes.forget(each.slot)
        return sequences

    def _coming(self) -> Iterator[tuple[int, int]]:
        """Slots, and the tokens that they will hold in some steps."""
        chunk, ahead, longest = self.max_num_batched_tokens, self._lookahead, self.max_model_len
        for s in self.running if ahead else ():
            if s.slot is not None:
                tokens = min(s.num_tokens, s.num_computed_tokens + chunk) + ahead
                if tokens > s.most_tokens or tokens > longest:
                    tokens = min(s.most_tokens, longest)
                yield s.slot, tokens

    def _others(self) -> int:
        """Tokens of sequences that may be admitted next, one step's at most."""
        most = self.max_num_batched_tokens if self._lookahead else 0
        return self.waiting.num_tokens(self.max_num_seqs - len(self.running), most)

    def _finish(self, sequences: Seq[Sequence]) -> None:
        """Close the slots of sequences that have ended, or take them out of the queue."""
        for sequence in sequences:
            if sequence.slot is not None:
                self.stays.end(sequence, self._launched, keep=True)
            else:  # preempted, and its group has ended
                self.waiting.remove(sequence)
            if sequence.group is not None:
                self._groups.pop(sequence.group, None)
        if sequences:
            self._admitting = True
            self.running = [s for s in self.running if s.slot is not None]

    def _continue(self, segments: list[Segment]) -> bool:
        """Plan the running sequences; False if that has to wait for the steps in flight."""
        budget, ensure, longest = self.max_num_batched_tokens, self.space.ensure, self.max_model_len
        decodes: list[tuple[Sequence, int]] = []
        prefills: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            num_tokens = sequence.num_tokens
            todo = num_tokens - sequence.num_computed_tokens
            # Else it is a beam that waits for others, or its last token is on the way.
            if todo and num_tokens < sequence.most_tokens and num_tokens < longest:
                (decodes if todo == 1 else prefills).append((sequence, todo))
        # Decodes first: a long prefill must not starve tokens that are one step away.
        for sequence, todo in decodes + prefills:
            slot, start, length = sequence.slot, sequence.num_computed_tokens, min(todo, budget)
            if length == 0:
                break
            if slot is None:
                continue  # preempted by an elder in this very step
            fits = ensure(slot, start + length) or self._make_room(
                sequence, start + length, segments
            )
            if fits is None:
                return False
            if fits:
                ids = () if todo <= sequence.num_pending else sequence.token_ids(start, length)
                key, inherited = sequence.key, sequence.inherited
                segments.append(
                    Segment(slot, start, length, length == todo, ids, 0, key, inherited)
                )
                budget -= length
        return True

    def _admit(self, budget: int, share: bool, spare: float) -> Segment | None:
        """Start the first waiting sequence that can: open a slot and back its first chunk."""
        found = self.waiting.first(self._groups, self._places())
        if found is None:
            return None
        sequence, source, ready = found
        shared, slot = ready * share, None
        if spare and not self.space.has_room(sequence.num_tokens - shared, spare):
            return None
        if shared >= BLOCK:
            slot = self.space.share(source, shared, sequence.num_tokens, self.step)
        else:
            shared, slot = 0, self.space.open(sequence.num_tokens)
        if slot is None:
            return None
        todo = sequence.num_tokens - shared
        length = min(todo, budget)
        if not self.space.ensure(slot, shared + length):
            self._prefixes.forget(slot)
            self.space.close(slot, self._launched)
            return None
        self.waiting.remove(sequence)
        self._start(sequence, slot, source, shared)
        self._prefixes.expect(sequence)
        if sequence.group is not None:
            self._groups[sequence.group] = None
        ids, key = sequence.token_ids(shared, length), sequence.key
        return Segment(slot, shared, length, length == todo, ids, 0, key, sequence.inherited)

    def _start(self, sequence: Sequence, slot: int, source: int, shared: int) -> None:
        """Let a sequence run in a slot that has its first tokens already, from another one."""
        self.stays.begin(sequence, slot, source, shared)
        # By arrival, so that two can't take memory from each other for ever.
        insort(self.running, sequence, key=lambda s: s.arrived)

    def _places(self) -> int:
        """Sequences that may be admitted beside those that run and those of groups begun."""
        if not self._groups:
            return self.max_num_seqs - len(self.running)
        plain = sum(sequence.group is None for sequence in self.running)
        return self.max_num_seqs - plain - sum(group.width for group in self._groups)

    def _make_room(
        self, sequence: Sequence, num_tokens: int, segments: list[Segment]
    ) -> bool | None:
        """Preempt the youngest until the memory for `num_tokens` of a running sequence is there.

        Returns:
            False when `sequence` itself had to go: preempted, or rejected if it was alone. None
            when steps are in flight: only after them a preemption gives memory back.
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
        """Which sequence gives way: the youngest, or an idle one of its own group before itself."""
        victim, group = self.running[-1], sequence.group
        if victim is sequence and group is not None:
            idle = [s for s in self.running if s.group is group and s.idle]
            return idle[-1] if idle else victim
        return victim

    def _preempt(self, sequence: Sequence) -> None:
        """Take the slot away; the sequence recomputes from its tokens when admitted again."""
        assert not sequence.num_pending, "a step in flight computes a token of it"
        self.num_preemptions += 1
        self._admitting = False
        self.stays.interrupt(sequence, self._launched)
        self.running.remove(sequence)
        self.waiting.add(sequence)

    def _reject_hopeless(self) -> bool:
        """Give up a waiting sequence that has grown beyond all memory; False if there is none."""
        for sequence in self.waiting:
            if not self.space.can_fit(sequence.num_tokens):
                self._reject_begun(sequence, sequence.num_tokens)
                return True
        return False

    def _reject_begun(self, sequence: Sequence, num_tokens: int) -> None:
        """Give up a row that has come to need more memory than there is, with all its beams."""
        self._finish(self.forsake(sequence))
        self._reject(
            sequence if sequence.group is None else sequence.group.leader,
            "kv_budget",
            f"the row needs the keys and values of {num_tokens} tokens "
            f"({sequence.num_prompt_tokens} of them the prompt), more than the KV budget "
            "holds; raise --kv-budget or lower --max-tokens",
        )

    def _reject(self, sequence: Sequence, kind: str, reason: str) -> None:
        sequence.fail(kind, reason)
        self.rejected.append(sequence)
