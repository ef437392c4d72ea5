"""CUDA graphs of decode steps: one launch from the host in the place of hundreds.

Slabs never move, so a graph stays valid while pages are mapped under it. There is one for each
batch size of a short list; what changes from step to step lies in tensors at fixed addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from batchrun.allocator.tensor import strided_view
from batchrun.engine.core import Segment

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Recorded = tuple[Callable[[], None], torch.Tensor]  # replays; and what it writes
Record = Callable[[Callable[[], torch.Tensor]], Recorded]


class DecodeGraphs:
    """Recorded steps of single tokens.

    Args:
        forward: Computes packed tokens `[4, B]`, of which those at `[B]` are wanted, to logits.
        prepare: Plans a step of so many filler segments and returns its inputs.
        sizes: Batch sizes to record.
        filler: What fills a batch up to the next size: it writes and reads a slot of its own.
        record: Makes something replayable of a function, such as a CUDA graph.
    """

    def __init__(
        self,
        forward: Forward,
        prepare: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        sizes: Seq[int],
        filler: Segment,
        record: Record,
    ) -> None:
        self._filler = filler
        # By size: the inputs at the addresses that a graph reads, and the graph.
        self._graphs: dict[int, tuple[torch.Tensor, torch.Tensor, Recorded]] = {}
        for size in sorted(sizes, reverse=True):  # the largest first: the others fit its memory
            packed, last = (tensor.clone() for tensor in prepare(size))
            recorded = record(lambda p=packed, n=last: forward(p, n))  # type: ignore[misc]
            self._graphs[size] = packed, last, recorded
        self._sizes = sorted(sizes)

    def fits(self, segments: Seq[Segment]) -> bool:
        """Whether a step of these segments is one that was recorded, once it is filled up."""
        return len(segments) <= self._sizes[-1] and all(
            s.length == 1 and s.sampled for s in segments
        )

    def fill_up(self, segments: Seq[Segment]) -> list[Segment]:
        """The segments, and fillers up to the next recorded size."""
        size = next(size for size in self._sizes if size >= len(segments))
        return [*segments, *[self._filler] * (size - len(segments))]

    def inputs(self, size: int) -> torch.Tensor:
        """Where the packed tokens `[4, B]` of a step of a recorded size go."""
        return self._graphs[size][0]

    def replay(self, size: int) -> torch.Tensor:
        """Compute a planned step from its inputs; its logits `[B, V]` stay until the next."""
        _, _, (run, logits) = self._graphs[size]
        run()
        return logits


class CudaRecorder:
    """Captures functions on the current stream; all share one pool of memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], torch.Tensor]) -> Recorded:
        """Capture `function`, after it has run twice to compile and to allocate its workspaces."""
        for _ in range(2):
            function()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(
            graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"
        ):
            logits = function()
        # The tensor itself would keep its memory from the graphs that are captured after this one:
        # they never run at once, so that one buffer serves all. The pool lives as long as a graph.
        return graph.replay, unowned(logits)


def unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, but one that does not keep its memory."""
    storage = tensor.untyped_storage()
    return strided_view(
        storage.data_ptr(),
        storage.nbytes(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        offset=int(tensor.storage_offset()),
        device=tensor.device,
    )


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Sizes worth a graph: close together where padding would cost most, up to `max_num_seqs`."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, 257, 32), *range(320, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]
