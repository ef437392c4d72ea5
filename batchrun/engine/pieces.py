"""CUDA graphs of steps with prompts: recorded pieces, with attention launched between them.

How attention is launched depends on the lengths of a step's segments; everything else depends only
on its number of tokens. So the model is recorded in pieces that end at each layer's attention
(piecewise graphs, as in vLLM), for a set of sizes to which steps are padded. A layer then costs the
host two launches instead of twenty.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from batchrun.engine.attention import KV, AttentionBackend, LayerAttention
from batchrun.engine.graphs import Recorded, unowned
from batchrun.errors import first_line

Apart = Callable[[Callable[[], None]], None]  # runs something between two pieces
Forward = Callable[[torch.Tensor, torch.Tensor, "Padded"], torch.Tensor]
Record = Callable[[Callable[[Apart], torch.Tensor]], Recorded]

_LEAST = 16  # tokens between two sizes
_TOLERANCE = 0.01  # of the largest logit; the same kernels should compute the same numbers


def size_for(num_tokens: int, most: int) -> int:
    """The size to which a step is padded: at most `most`, with four sizes between powers of two."""
    step = max(_LEAST, 1 << max(0, (num_tokens - 1).bit_length() - 3))
    return min(-(-num_tokens // step) * step, most)


@dataclass
class _Size:
    """Steps padded to one size: their inputs `[4, T]` and `[N]`, at fixed addresses."""

    packed: torch.Tensor
    last: torch.Tensor
    has_run: bool = False
    recorded: Recorded | None = None


class PieceGraphs:
    """Steps of any segments, recorded when a size occurs for the second time.

    Args:
        forward: Computes packed tokens `[4, T]` to logits, at the indices `[N]`; its last argument
            is the attention.
        backend: The attention kernels.
        device: Where inputs are.
        most: Maximum number of tokens in a step.
        sampled: Maximum number of tokens in a step whose logits are wanted.
        record: Makes something replayable of a function that passes the calls between pieces to its
            argument.
        log: Called with the reason if steps can't be recorded.

    Attributes:
        limit: Steps with more tokens are not recorded, because the device takes longer to compute
            them than the host takes to launch them.
    """

    def __init__(
        self,
        forward: Forward,
        backend: AttentionBackend,
        device: torch.device,
        *,
        most: int,
        sampled: int,
        record: Record,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.limit = self.most = most
        self._forward = forward
        self._device = device
        self._sampled = sampled
        self._record = record
        self._log = log
        self._attention = Padded(backend, most)
        self._sizes: dict[int, _Size] = {}

    def size_of(self, num_tokens: int, num_logits: int = 1) -> int | None:
        """The size to which a step is padded; None if it is computed without recording.

        Args:
            num_tokens: The step's tokens.
            num_logits: Those of them whose logits are wanted: many where known text is scored.
        """
        recorded = num_tokens <= self.limit and num_logits <= self._sampled
        return size_for(num_tokens, self.most) if recorded else None

    def inputs(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the inputs of a step of that size go: `[4, T]` and `[N]`."""
        if size not in self._sizes:
            zeros = partial(torch.zeros, dtype=torch.int64, device=self._device)
            self._sizes[size] = _Size(zeros((4, size)), zeros(min(size, self._sampled)))
        each = self._sizes[size]
        return each.packed, each.last

    def compute(self, size: int, num_tokens: int) -> torch.Tensor:
        """Compute a planned step from its inputs; the logits `[N, V]` are valid until the next one.

        Args:
            size: From `size_of`.
            num_tokens: The step's tokens, without padding.
        """
        each = self._sizes[size]
        self._attention.num_tokens = num_tokens
        if each.recorded is None:
            logits = self._forward(each.packed, each.last, self._attention)
            # Not the first time, when kernels are compiled and loaded. Nor when a row's logits are
            # NaN, which compare equal to nothing.
            may_record = each.has_run and not bool(logits.isnan().any())
            if may_record and not self._is_recorded(each, logits):
                # A wrong replay may have written wrong keys and values: write them again.
                logits = self._forward(each.packed, each.last, self._attention)
            each.has_run = True
            return logits
        run, logits = each.recorded
        run()
        return logits

    def _is_recorded(self, size: _Size, want: torch.Tensor) -> bool:
        """Record a size; False if that fails, or if a replay gives different logits."""
        try:
            run, logits = recorded = self._record(partial(self._apart, size))
            run()
            off = (logits - want).abs().max() / want.abs().max().clamp_min(1e-6)
            if not float(off) <= _TOLERANCE:  # also refuses NaN
                raise RuntimeError(f"a replay's logits differ by {float(off):.2g} of the largest")
        except RuntimeError as error:
            self.limit = 0
            self._sizes.clear()
            self._log(f"steps with prompts are launched kernel by kernel ({first_line(error)})")
            return False
        size.recorded = recorded
        return True

    def _apart(self, size: _Size, apart: Apart) -> torch.Tensor:
        """Compute a step; `apart` launches its attention."""
        self._attention.apart = apart
        try:
            return self._forward(size.packed, size.last, self._attention)
        finally:
            self._attention.apart = _at_once


def _at_once(call: Callable[[], None]) -> None:
    call()


class Padded:
    """Attention of a padded step: over its real tokens only, and not part of the recording.

    Args:
        backend: The attention kernels.
        most: Maximum number of tokens in a step.

    Attributes:
        num_tokens: Tokens of the step, without padding.
        apart: Takes the call that launches attention.
    """

    def __init__(self, backend: AttentionBackend, most: int) -> None:
        self.num_tokens = 0
        self.apart: Apart = _at_once
        self._backend = backend
        self._most = most
        # By heads and width. Initially zeros, because the padding must never be NaN.
        self._outputs: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, layer: LayerAttention, query: torch.Tensor, slots: KV) -> torch.Tensor:
        """See `AttentionBackend.run`."""
        shape = query.shape[1], slots[1].shape[3]
        if shape not in self._outputs:
            self._outputs[shape] = query.new_zeros(self._most, *shape)
        outputs = self._outputs[shape]

        def attend() -> None:
            count = self.num_tokens
            outputs[:count] = self._backend.run(layer, query[:count], slots)

        self.apart(attend)
        # All layers reuse that memory; a layer's output may have to live longer.
        return outputs[: len(query)].clone()


class CudaPieces:
    """Captures functions on the current stream as several graphs that share a memory pool.

    Args:
        pool: Handle of the pool. Graphs that share it never run at once.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __call__(self, function: Callable[[Apart], torch.Tensor]) -> Recorded:
        """Capture `function`, which has run before, in pieces between its calls of `apart`."""
        calls: list[Callable[[], None]] = []
        graph = torch.cuda.CUDAGraph()

        def begin() -> None:
            nonlocal graph
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

        def end() -> None:
            graph.capture_end()
            calls.append(graph.replay)

        def apart(call: Callable[[], None]) -> None:
            end()
            call()
            calls.append(call)
            begin()

        with _no_collection():
            begin()
            try:
                logits = function(apart)
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            end()
        return partial(_run, calls), unowned(logits)


def _run(calls: Seq[Callable[[], None]]) -> None:
    for call in calls:
        call()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection: freed objects might make calls that a capture forbids."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
