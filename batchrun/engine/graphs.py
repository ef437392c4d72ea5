"""CUDA graphs of decode steps: one launch from the host instead of hundreds.

Slabs never move, so a graph stays valid while pages are mapped under it. There is one graph for
each batch size of a short list; what changes from step to step lies in tensors at fixed addresses.

Steps that verify draft tokens use them too. A layer writes the keys and values of all tokens before
it attends, so each token of a row can attend as if it were the row's only one in the step.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from batchrun.allocator.tensor import strided_view
from batchrun.engine.core import Segment

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Recorded = tuple[Callable[[], None], torch.Tensor]  # replays it, and its output
Record = Callable[[Callable[[], torch.Tensor]], Recorded]


_MOST_KNOWN = 16  # tokens of a row, beside draft tokens; more are mostly prompts


class DecodeGraphs:
    """Recorded steps of single tokens.

    Args:
        forward: Computes packed tokens `[4, B]` to logits, at the indices `[B]`.
        prepare: Plans a step of that many filler segments and returns its inputs.
        sizes: Batch sizes to record.
        filler: Pads a batch to the next size; it writes and reads a slot of its own.
        most_reread: Maximum number of keys that a step reads again, as each of several tokens of a
            row reads all keys of the row.
        record: Turns a function into something replayable, such as a CUDA graph.
    """

    def __init__(
        self,
        forward: Forward,
        prepare: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        sizes: Seq[int],
        filler: Segment,
        record: Record,
        *,
        most_reread: int,
    ) -> None:
        self._filler, self._most_reread = filler, most_reread
        # By size: the inputs, at the addresses that the graph reads, and the graph.
        self._graphs: dict[int, tuple[torch.Tensor, torch.Tensor, Recorded]] = {}
        for size in sorted(sizes, reverse=True):  # largest first: the others fit into its memory
            packed, last = (tensor.clone() for tensor in prepare(size))
            recorded = record(lambda p=packed, n=last: forward(p, n))  # type: ignore[misc]
            self._graphs[size] = packed, last, recorded
        self._sizes = sorted(sizes)

    def fitting(self, segments: Seq[Segment]) -> Seq[Segment] | None:
        """A step's tokens as a segment each; None if such a step, once padded, was not recorded.

        Draft tokens, and a few known ones such as a constraint forces, are segments of their own.
        """
        if len(segments) > self._sizes[-1] or not all(
            s.sampled and s.length - s.num_drafts <= _MOST_KNOWN for s in segments
        ):
            return None
        tokens = sum(s.length for s in segments)
        if tokens == len(segments):
            return segments
        reread = sum((s.length - 1) * s.end for s in segments)
        if tokens > self._sizes[-1] or reread > self._most_reread:
            return None
        return [each for s in segments for each in _singly(s)]

    def fill_up(self, segments: Seq[Segment]) -> list[Segment]:
        """The segments, padded with fillers to the next recorded size."""
        size = next(size for size in self._sizes if size >= len(segments))
        return [*segments, *[self._filler] * (size - len(segments))]

    def inputs(self, size: int) -> torch.Tensor:
        """Where the packed tokens `[4, B]` of a step of a recorded size go."""
        return self._graphs[size][0]

    def replay(self, size: int) -> torch.Tensor:
        """Compute a planned step from its inputs; its logits `[B, V]` last until the next one."""
        _, _, (run, logits) = self._graphs[size]
        run()
        return logits


def _singly(segment: Segment) -> list[Segment]:
    """Its tokens as a segment each."""
    if segment.length == 1:
        return [segment]
    tokens = enumerate(segment.token_ids, segment.start)
    return [Segment(segment.slot, at, 1, True, (token,)) for at, token in tokens]


class CudaRecorder:
    """Captures functions on the current stream; all graphs share one memory pool."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], torch.Tensor]) -> Recorded:
        """Capture `function`, after two runs that compile it and allocate its workspaces."""
        for _ in range(2):
            function()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(
            graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"
        ):
            logits = function()
        # A tensor that owned its memory would keep it from later graphs. They never run at once, so
        # one buffer serves all. The pool lives as long as a graph.
        return graph.replay, unowned(logits)


def unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, without ownership of its memory."""
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
    """Sizes worth a graph, up to `max_num_seqs`: denser where padding would cost most."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, 257, 32), *range(320, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]
