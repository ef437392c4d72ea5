"""What a GPU does before the first step: record steps, and try the largest ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from batchrun.allocator.arena import KVArena
from batchrun.engine.core import EngineError, Request, SamplingParams, Segment
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.graphs import CudaRecorder, batch_sizes
from batchrun.engine.pieces import CudaPieces
from batchrun.engine.plan import NewSequence, StepPlan
from batchrun.engine.settings import Limits
from batchrun.errors import first_line

# Steps are recorded up to this many times the tokens at which the device takes as long as the host
# takes to launch them: the host has more to do than launching.
_RECORDED = 1.5


@dataclass(frozen=True)
class WarmUp:
    """Warms up an executor over idle memory, which is idle again afterwards.

    Args:
        executor: The executor.
        arena: The memory.
        limits: Those of a step.
        num_logits: Maximum number of tokens in a step after which tokens are sampled.
        log: Called with each line that the user should see.
    """

    executor: TorchExecutor
    arena: KVArena
    limits: Limits
    num_logits: int
    log: Callable[[str], None]

    def run(self, *, graphs: bool) -> None:
        """Record decode steps, then run the largest possible steps.

        torch keeps the memory that activations took here, and the KV budget is what is free
        afterwards: nothing is guessed. The order matters, as recording a graph releases the memory
        that torch keeps. The pages created here are kept for the first steps.
        """
        loaded, most = self.executor.loaded, self.limits.max_num_batched_tokens
        torch.cuda.synchronize(loaded.device)  # other streams wrote what steps read
        if graphs:
            self._record()
        longest = min(most, loaded.max_model_len)
        largest = [longest] * (most // longest) + [most % longest]
        self._run_alone(largest)
        pieces = self.executor.pieces
        if pieces is not None:
            pieces.limit = 0
            launch, whole = self._run_alone(largest)
            pieces.limit = int(min(1.0, _RECORDED * launch / whole) * most)
            self._run_alone(largest)
        seqs = min(self.limits.max_num_seqs, most)
        drafts = max(0, min(self.num_logits, most) - seqs)
        self._run_alone([1] * (seqs - 1) + [min(1 + drafts, longest)], drafts=True)
        self.executor.transfers.drain()

    def _run_alone(self, lengths: Sequence[int], *, drafts: bool = False) -> tuple[float, float]:
        """Run one step of sequences with these lengths, or as many of them as memory holds.

        Args:
            lengths: How many tokens each has.
            drafts: Whether all but the first are draft tokens.

        Returns:
            The seconds that launching took, and the seconds of the whole step.
        """
        # With top-p, which needs the most memory to sample.
        params = SamplingParams(temperature=1.0, top_p=0.9)
        segments, new = [], []
        for row, length in enumerate(filter(None, lengths[: self.limits.max_num_seqs])):
            slot = self.arena.open(length)
            if slot is None:
                break
            if not self.arena.ensure(slot, length):
                self.arena.close(slot, 0)
                break
            ids = (0,) * length
            segments.append(Segment(slot, 0, length, True, ids, (length - 1) * drafts))
            new.append(NewSequence(slot, Request(row, 0, ids, params, 0)))
        began = launched = time.perf_counter()
        if segments:
            ticket = self.executor.launch(StepPlan(0, tuple(segments), tuple(new)))
            self.executor.sample(ticket)
            launched = time.perf_counter()
            self.executor.collect(ticket)
        ended = time.perf_counter()
        for segment in segments:
            self.arena.close(segment.slot, 0)
        self.arena.retire(0)
        return launched - began, ended - began

    def _record(self) -> None:
        """Record decode steps now, and let other steps be recorded when they occur.

        The padding of such steps uses a token in a slot kept for it, which no sequence gets.
        """
        scratch = self.arena.open(1)
        if scratch is None or not self.arena.ensure(scratch, 1):
            return
        self.arena.close(scratch, 0, keep=1)
        recorder = CudaRecorder()
        if self.executor.backend.capturable:
            self._capture(scratch, recorder)
        self.executor.record_pieces(
            scratch,
            most=self.limits.max_num_batched_tokens,
            sampled=self.num_logits,
            record=CudaPieces(recorder.pool),
            log=self.log,
        )

    def _capture(self, scratch: int, recorder: CudaRecorder) -> None:
        try:
            self.executor.capture(batch_sizes(self.num_logits), scratch, recorder)
        except (RuntimeError, EngineError) as error:
            self.executor.graphs = None
            reason = first_line(error)
            self.log(f"decode steps are launched kernel by kernel: no CUDA graph ({reason})")
