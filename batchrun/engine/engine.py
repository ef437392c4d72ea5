"""The main loop: plan, launch, sample, collect, commit."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from itertools import islice

from batchrun.engine.answers import Answers
from batchrun.engine.beams import BeamGroup
from batchrun.engine.constraints import Constraints
from batchrun.engine.core import (
    Candidates,
    Completion,
    EngineError,
    Likeliest,
    Request,
    Segment,
    Sequence,
)
from batchrun.engine.enginestats import EngineStats
from batchrun.engine.executor import Executor, Ticket
from batchrun.engine.failures import NOT_FINITE, not_finite
from batchrun.engine.output import Specials
from batchrun.engine.passes import ScoringPasses
from batchrun.engine.plan import Masks, StepPlan
from batchrun.engine.release import continued, releasable
from batchrun.engine.scheduler import Scheduler
from batchrun.prompts.chat import Tokenizer


class Engine:
    """Continuous batching over one executor.

    Args:
        executor: Computes the steps.
        scheduler: Plans the steps.
        tokenizer: Turns tokens into text; None gives completions without text.
        eos_ids: Tokens that end a completion unless its parameters ignore them.
        specials: Special tokens, hidden in completions; stop strings may contain them.
        constraints: Knows which tokens constrained answers allow; needed only for these.
        observe: Called after each step with its seconds, while its sequences still hold memory.
        mapping_seconds: Returns the time spent so far on the KV memory's pages.

    Attributes:
        on_admit: Called with each request before it is first computed.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        *,
        specials: Iterable[str] = (),
        constraints: Constraints | None = None,
        observe: Callable[[float], None] = lambda _: None,
        mapping_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.executor = executor
        self.scheduler = scheduler
        self.stats = EngineStats()
        self._eos_ids = eos_ids
        self._observe = observe
        self._mapping_seconds = mapping_seconds
        self._mapped = mapping_seconds()
        self._in_flight: deque[tuple[StepPlan, Ticket, float]] = deque()  # and its start time
        self._collected = 0.0
        self.on_admit: Callable[[Request], None] = lambda _: None
        self._constraints = constraints
        self._answers = Answers(tokenizer, eos_ids, Specials(specials), constraints)
        self._passes = ScoringPasses()
        self._ended: list[Sequence] = []  # rows that ended without a step of their own

    @property
    def has_work(self) -> bool:
        """Whether anything waits, runs, or has ended but was not yet returned."""
        ended = self.scheduler.rejected or self._ended
        return self.scheduler.has_work or bool(ended or self._in_flight)

    def load(self) -> tuple[int, int, int]:
        """Sequences running, sequences waiting, and tokens generated so far."""
        scheduler = self.scheduler
        waiting = len(scheduler.waiting) + self._passes.num_attached
        return len(scheduler.running), waiting, self.stats.generated_tokens

    def progress(self) -> list[tuple[int, int]]:
        """For each running sequence, the tokens that it has and may have; 0 of 0 for scoring."""
        found = self.scheduler.running
        return [
            (len(s.output_ids), s.request.params.max_tokens if s.scoring is None else 0)
            for s in found
        ]

    def add(self, request: Request) -> None:
        """Queue a request."""
        begun, logprobs = list(request.generated_ids), list(request.generated_logprobs)
        now = time.perf_counter()
        sequence = Sequence(request, begun, request.generated_logprob, logprobs, arrived=now)
        if request.scoring is None:
            self._queue(sequence)
        elif (scoring := self._passes.begin(sequence)) is not None:
            assert scoring.scoring is not None
            if scoring.scoring.is_complete:
                self._go_on(scoring)
            else:
                self.scheduler.add(scoring)

    def _go_on(self, scoring: Sequence) -> None:
        """End a pass: its rows are queued, or have ended too."""
        going, ended = self._passes.end(scoring, time.perf_counter())
        for sequence in going:
            self._queue(sequence)
        self._ended += ended

    def _queue(self, sequence: Sequence) -> None:
        request = sequence.request
        if request.params.beams:
            room = self.scheduler.max_model_len - sequence.num_prompt_tokens
            most = min(request.params.max_tokens, room)
            sequence.group = BeamGroup(sequence, most, request.params.stop_ids(self._eos_ids))
        self.scheduler.add(sequence)

    def partials(self) -> list[Request]:
        """Unfinished sequences that have tokens, as requests that continue where they stopped.

        Beam searches are left out: a later run starts them again and gets the same result.
        """
        unfinished = (*self.scheduler.running, *self.scheduler.waiting)
        return [continued(s) for s in unfinished if s.output_ids and s.group is None]

    def release(self, count: int) -> list[tuple[Request, bool]]:
        """Let go of up to so many rows that another engine can continue; see `releasable`.

        Returns:
            Requests that continue them, and whether they were admitted here.
        """
        while self._in_flight:  # their tokens are needed
            self._ended += self._collect()
        released = releasable(self.scheduler, count)
        for sequence in released:
            self._answers.forget(sequence)
        self.scheduler.finish(released)
        return [(continued(s), s.admitted is not None) for s in released]

    def step(self) -> list[Completion]:
        """Plan and launch one step, and collect the steps that are due.

        With an executor that computes asynchronously (`lag` 1), this collects the step before the
        one just launched, so that planning, mapping and bookkeeping happen while the device
        computes.

        Returns:
            Completions of the sequences that ended, rejected requests included.

        Raises:
            EngineError: Nothing runs and nothing can: a bug, reported instead of hanging.
        """
        began = time.perf_counter()
        ended: list[Sequence] = []
        plan = self.scheduler.plan()
        self._count_mapping()
        if plan.segments:
            for sequence in self.scheduler.stays.owners(plan.segments) if plan.new else ():
                if sequence is not None and sequence.admitted is None:
                    sequence.admitted = began
                    self.on_admit(sequence.request)
            ticket = self.executor.launch(plan)
            self._in_flight.append((plan, ticket, began))
            self.executor.sample(ticket, self._masks(plan, ended))
        elif not self._in_flight and self.scheduler.has_work and not self.scheduler.rejected:
            raise EngineError(
                f"the scheduler is stuck: {len(self.scheduler.running)} sequences run, "
                f"{len(self.scheduler.waiting)} wait, and none of them can get KV memory"
            )
        while len(self._in_flight) > (self.executor.lag if plan.segments else 0):
            ended += self._collect()
        rejected, self.scheduler.rejected = self.scheduler.rejected, []
        for sequence in rejected:
            sequence.finished = time.perf_counter()
            self._answers.forget(sequence)
            if sequence.scoring is not None:
                self._go_on(sequence)
        ended += (s for s in (*rejected, *self._ended) if s.scoring is None)
        self._ended = []
        return [sequence.completion() for sequence in ended]

    def _masks(self, plan: StepPlan, ended: list[Sequence]) -> Masks | None:
        """The masks of a step that the device computes; None if nothing in it is constrained.

        They depend on all tokens so far, so earlier steps are collected first: what thus ended is
        added to `ended`.
        """
        if self._constraints is None:
            return None
        owners = self.scheduler.stays.owners(plan.segments)
        if not any(s is not None and s.request.params.constraint for s in owners):
            return None
        while len(self._in_flight) > 1:
            ended += self._collect()
        owners = self.scheduler.stays.owners(plan.segments)
        # Elsewhere, masks are computed while the device computes the logits.
        first = self.executor.on_host
        return self._constraints.masks(plan.segments, owners, chosen_first=first)

    def _collect(self) -> list[Sequence]:
        """Take in the tokens of the oldest step in flight; returns the sequences that ended."""
        plan, ticket, began = self._in_flight.popleft()
        tokens = self.executor.collect(ticket)
        now = time.perf_counter()
        seconds = now - max(began, self._collected)
        self._collected = now
        owners = self.scheduler.stays.owners(plan.segments)
        self._count(plan, owners, seconds)
        self._observe(seconds)
        done: list[Sequence] = []
        beams: list[tuple[Sequence, Candidates, Likeliest]] = []
        logprobs = tokens.logprobs or (0.0,) * len(tokens.token_ids)
        likeliest = tokens.likeliest or ((),) * len(tokens.token_ids)
        produced = list(zip(tokens.token_ids, logprobs, likeliest, strict=True))
        scores, end = iter(tokens.scores), 0
        for segment, sequence in zip(plan.segments, owners, strict=True):
            if segment.targets:
                found = list(islice(scores, sum(map(len, segment.targets))))
                if sequence is not None and self._take(sequence, segment, found):
                    done.append(sequence)
            if not segment.sampled:
                continue
            begin, end = end, end + 1 + segment.num_drafts
            if sequence is None or sequence.num_ignored:
                continue  # it ended, or got this token, while this step was already in flight
            if sequence.first_token is None:
                sequence.first_token = now
            if sequence.group is not None:
                beams.append((sequence, tokens.candidates[begin], likeliest[begin]))
            elif self._append(sequence, segment.drafts, produced[begin:end]):
                done.append(sequence)
        leaders, forks = self._advance(beams)
        ended = [*done, *(s for leader in leaders if leader.group for s in leader.group.sequences)]
        self.scheduler.commit(plan, tokens, ended, forks)
        done += self._append_forced(plan.segments)
        self._count_mapping()
        for sequence in (*done, *leaders):
            sequence.finished = now
        again = [s for s in (*done, *leaders) if self._is_begun_anew(s)]
        for sequence in done:
            if sequence.scoring is not None and sequence.error and sequence not in again:
                self._go_on(sequence)
        return [s for s in (*done, *leaders) if s.scoring is None and s not in again]

    def _take(self, sequence: Sequence, segment: Segment, found: list[float]) -> bool:
        """Take in scores; whether the pass has ended. Its rows are queued while it has memory."""
        if not self._passes.take(sequence, segment, found):
            return False
        if sequence.error is None:
            self._go_on(sequence)
        return True

    def _is_begun_anew(self, failed: Sequence) -> bool:
        """Whether a failed row is computed again, because another row's NaN may have spoiled it.

        NaN in the values of a later token also spoils earlier tokens, as 0 times NaN is NaN. A row
        that shares that memory fails too; it is computed again, without sharing.
        """
        each = [failed] if failed.group is None else failed.group.sequences
        shared = failed.shares and any(sequence.inherited for sequence in each)
        if failed.error_kind != NOT_FINITE or not shared:
            return False
        times = failed.arrived, failed.admitted, failed.first_token
        again = Sequence(failed.request, shares=False, scoring=failed.scoring)
        again.arrived, again.admitted, again.first_token = times
        if failed.group is None:  # the tokens so far are right
            again.output_ids, again.logprobs = failed.output_ids, failed.logprobs
            again.logprob, again.scores = failed.logprob, failed.scores
        self._queue(again)
        return True

    def _append(
        self, sequence: Sequence, drafts: Seq[int], found: list[tuple[int, float, Likeliest]]
    ) -> bool:
        """Append tokens and their log-probabilities, up to the first after a rejected draft token.

        Returns:
            Whether the sequence has ended.
        """
        stats, right, ended = self.stats, 0, False
        asked, longest = sequence.request.params.logprobs, self.scheduler.max_model_len
        for token, logprob, likeliest in found:
            if token >= 0:
                sequence.output_ids.append(token)
                sequence.logprob += logprob
                if asked is not None:
                    sequence.logprobs.append((logprob, likeliest[:asked]))
            ended = self._answers.ended(sequence, token, longest)
            if sequence.error is not None:
                return True
            if ended or not drafts or right == len(drafts) or drafts[right] != token:
                break
            right += 1
        stats.generated_tokens += right + 1
        if right:  # the tokens before the last one were computed, too
            stats.decode_tokens += right
            stats.accepted_tokens += right
        return ended

    def _append_forced(self, segments: Seq[Segment]) -> list[Sequence]:
        """Append to committed sequences what must come; returns those that have ended with it.

        The next step computes these tokens as those of a prompt, for the logits after the last one.
        A step in flight may choose the first of them, too: that one is ignored.
        """
        stays, done = self.scheduler.stays, list[Sequence]()
        if stays.proposer is None:
            return done
        for sequence in filter(None, stays.owners(s for s in segments if s.sampled)):
            if count := self._answers.append_forced(sequence, self.scheduler.max_model_len):
                sequence.num_ignored, sequence.num_pending = sequence.num_pending, 0
                self.stats.generated_tokens += count
                self.stats.forced_tokens += count
                if sequence.finish_reason is not None:
                    done.append(sequence)
        self.scheduler.finish(done)
        return done

    def _advance(
        self, beams: list[tuple[Sequence, Candidates, Likeliest]]
    ) -> tuple[list[Sequence], list[tuple[Sequence, Sequence]]]:
        """Take in the beams' candidates, and advance each group whose round is complete.

        Returns:
            The leaders of rows that have ended, and the forks of other rows, as from
            `Group.advance`.
        """
        done: list[Sequence] = []
        forks: list[tuple[Sequence, Sequence]] = []
        for sequence, candidates, likeliest in beams:
            group = sequence.group
            assert group is not None
            if group.ended:
                continue  # it failed earlier in this step
            if not math.isfinite(candidates[0][1]):
                group.ended = True
                not_finite(group.leader, len(sequence.output_ids))
                done.append(group.leader)
                continue
            asked = sequence.request.params.logprobs or 0
            group.report(sequence, candidates, likeliest[:asked])
            if not group.is_complete:
                continue
            forks += group.advance()
            self.stats.generated_tokens += 1
            if group.ended:
                self._answers.finish(group.leader, group.finish())
                done.append(group.leader)
        return done, forks

    def _count(self, plan: StepPlan, owners: Seq[Sequence | None], seconds: float) -> None:
        stats, computed, prefill, drafted = self.stats, 0, 0, 0
        for segment, sequence in zip(plan.segments, owners, strict=True):
            computed += segment.length
            if sequence is not None and segment.start < sequence.num_prompt_tokens:
                prefill += segment.length
            drafted += segment.num_drafts
        stats.steps += 1
        stats.prefill_tokens += prefill
        stats.drafted_tokens += drafted
        stats.decode_tokens += computed - prefill - drafted
        stats.recomputed_tokens = self.scheduler.stays.num_recomputed_tokens
        stats.prefill_s += seconds * prefill / computed
        stats.decode_s += seconds * (computed - prefill) / computed
        stats.sequence_s += seconds * len(plan.segments)
        stats.device_s, stats.idle_s = self.executor.seconds()
        if (proposer := self.scheduler.stays.proposer) is not None:
            proposer.observe(plan.segments, seconds)

    def _count_mapping(self) -> None:
        """Add the time spent on pages since the last call: hidden if the device still computes."""
        before, self._mapped = self._mapped, self._mapping_seconds()
        seconds = self._mapped - before
        if seconds and self._in_flight and self.executor.busy():
            self.stats.map_hidden_s += seconds
        elif seconds:
            self.stats.map_exposed_s += seconds
            self.stats.map_stalls += bool(self._in_flight)
