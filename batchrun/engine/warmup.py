"""What a GPU does before the first step: steps are recorded, and the largest ones tried."""

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

# A step is recorded up to so many times the tokens for which the device takes as long as launching
# them takes the host, which has more to do than that.
_RECORDED = 1.5


@dataclass(frozen=True)
class WarmUp:
    """Of an executor over idle memory, idle again afterwards."""

    executor: TorchExecutor
    arena: KVArena
    limits: Limits
    log: Callable[[str], None]

    def run(self, *, graphs: bool) -> None:
        """Record decode steps, then run the largest steps there can be.

        torch keeps what activations took here, and the KV budget is what is free after that:
        nothing is guessed. The order matters: recording a graph gives back what torch
        keeps. The pages that were created stay for the first steps.
        """
        loaded, most = self.executor.loaded, self.limits.max_num_batched_tokens
        torch.cuda.synchronize(loaded.device)  # other streams filled what steps read
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
        self._run_alone([1] * min(self.limits.max_num_seqs, most))
        self.executor.transfers.drain()

    def _run_alone(self, lengths: Sequence[int]) -> tuple[float, float]:
        """One step of sequences of so many tokens, or of as many as memory holds.

        Returns:
            The seconds that launching it took, and the whole of it.
        """
        # With top-p, which needs more memory to sample than anything else.
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
            segments.append(Segment(slot, 0, length, True, ids))
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
        """Record decode steps now, and let others be recorded when they are met.

        What fills up such steps has a token in a slot that is kept for it: no sequence's.
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
            sampled=self.limits.max_num_seqs,
            record=CudaPieces(recorder.pool),
            log=self.log,
        )

    def _capture(self, scratch: int, recorder: CudaRecorder) -> None:
        began = time.perf_counter()
        sizes = batch_sizes(self.limits.max_num_seqs)
        try:
            self.executor.capture(sizes, scratch, recorder)
        except (RuntimeError, EngineError) as error:
            self.executor.graphs = None
            reason = str(error).splitlines()[0]
            self.log(f"decode steps are launched kernel by kernel: no CUDA graph ({reason})")
        else:
            seconds = time.perf_counter() - began
            self.log(f"recorded decode steps of {len(sizes)} sizes in {seconds:.1f} s")
