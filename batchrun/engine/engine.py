"""The loop: plan, launch, collect, commit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from batchrun.engine.core import (
    EngineError,
    FinishReason,
    Request,
    Sequence,
    StepPlan,
    StepTokens,
)
from batchrun.engine.executor import Executor
from batchrun.engine.scheduler import Scheduler
from batchrun.engine.text import Detokenizer, Tokenizer, find_stop


@dataclass(slots=True)
class EngineStats:
    """Counts and measured seconds of an engine's life; a mixed step's time is split by tokens."""

    steps: int = 0
    seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    sequence_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A sequence that ended, with its text; the text is None where it ended in an error."""

    sequence: Sequence
    text: str | None


class Engine:
    """Continuous batching over one executor.

    Args:
        executor: Computes the steps.
        scheduler: Decides them.
        tokenizer: Makes text of tokens; None gives completions without text.
        eos_ids: Tokens that end a completion unless its parameters ignore them.
        observe: Called after each step with its seconds, while its sequences still hold memory.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        observe: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.executor = executor
        self.scheduler = scheduler
        self.stats = EngineStats()
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._observe = observe
        self._texts: dict[Sequence, Detokenizer] = {}

    @property
    def has_work(self) -> bool:
        """Whether anything waits, runs, or was rejected and not yet handed out."""
        return self.scheduler.has_work or bool(self.scheduler.rejected)

    def load(self) -> tuple[int, int, int]:
        """Sequences running, sequences waiting, and tokens generated so far."""
        scheduler = self.scheduler
        return len(scheduler.running), len(scheduler.waiting), self.stats.generated_tokens

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.scheduler.add(Sequence(request, arrived=time.perf_counter()))

    def step(self) -> list[Completion]:
        """Compute one step; returns what ended with it, rejected requests included.

        Raises:
            EngineError: Nothing runs and nothing can: a defect, told instead of a hang.
        """
        began = time.perf_counter()
        plan = self.scheduler.plan()
        for segment in plan.segments:
            if segment.sequence.admitted is None:
                segment.sequence.admitted = began
        done: list[Completion] = []
        if plan.segments:
            tokens = self.executor.collect(self.executor.launch(plan))
            ended = time.perf_counter()
            self._count(plan, ended - began)
            self._observe(ended - began)
            done = self._advance(plan, tokens, ended)
        elif self.scheduler.has_work and not self.scheduler.rejected:
            raise EngineError(
                f"the scheduler is stuck: {len(self.scheduler.running)} sequences run, "
                f"{len(self.scheduler.waiting)} wait, and none of them gets KV memory"
            )
        for sequence in self.scheduler.rejected:
            sequence.finished = time.perf_counter()
            self._texts.pop(sequence, None)
            done.append(Completion(sequence, None))
        self.scheduler.rejected.clear()
        return done

    def _advance(self, plan: StepPlan, tokens: StepTokens, now: float) -> list[Completion]:
        """Append the sampled tokens, find who has ended, and commit the step."""
        sampled = [s.sequence for s in plan.segments if s.sampled]
        done: list[Completion] = []
        for sequence, token in zip(sampled, tokens.token_ids, strict=True):
            sequence.output_ids.append(token)
            if sequence.first_token is None:
                sequence.first_token = now
            reason, text = self._ending(sequence, token)
            if reason is not None:
                sequence.finish_reason = reason
                sequence.finished = now
                done.append(Completion(sequence, text))
        self.scheduler.commit(plan, tokens, [c.sequence for c in done])
        return done

    def _ending(self, sequence: Sequence, token: int) -> tuple[FinishReason | None, str | None]:
        """Whether the token just appended ends the sequence, and then the whole text."""
        params = sequence.request.params
        reason = None
        if len(sequence.output_ids) >= params.min_tokens:
            end_token = token in self._eos_ids and not params.ignore_eos
            if end_token or token in params.stop_token_ids:
                reason = FinishReason.STOP
        if reason is None and (
            len(sequence.output_ids) >= params.max_tokens
            or sequence.num_tokens >= self.scheduler.max_model_len
        ):
            reason = FinishReason.LENGTH
        if self._tokenizer is None or (reason is None and not params.stop):
            return reason, None
        detokenizer = self._texts.pop(sequence, None)
        if detokenizer is None:
            detokenizer = Detokenizer(self._tokenizer, sequence.request.prompt_ids)
            # After a preemption or with min_tokens the detokenizer may start late: catch up.
            detokenizer.push(sequence.output_ids[:-1])
        before = len(detokenizer.text)
        detokenizer.push([token])
        text = detokenizer.text if reason is None else detokenizer.finish()
        if params.stop and len(sequence.output_ids) >= params.min_tokens:
            cut = find_stop(text, len(text) - before, params.stop)
            if cut is not None:
                return FinishReason.STOP, text[:cut]
        if reason is None:
            self._texts[sequence] = detokenizer
        return reason, text

    def _count(self, plan: StepPlan, seconds: float) -> None:
        prefill = sum(s.length for s in plan.segments if s.start < s.sequence.num_prompt_tokens)
        again = sum(
            min(s.start + s.length, s.sequence.high_water) - s.start
            for s in plan.segments
            if s.start < s.sequence.high_water
        )
        stats = self.stats
        stats.steps += 1
        stats.generated_tokens += sum(s.sampled for s in plan.segments)
        stats.seconds += seconds
        stats.prefill_tokens += prefill
        stats.decode_tokens += plan.num_tokens - prefill
        stats.recomputed_tokens += again
        stats.prefill_seconds += seconds * prefill / plan.num_tokens
        stats.decode_seconds += seconds * (plan.num_tokens - prefill) / plan.num_tokens
        stats.sequence_seconds += seconds * len(plan.segments)
