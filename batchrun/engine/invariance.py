"""Whether a row's answer depends on the rows beside it, and what computes the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import cycle
from typing import TYPE_CHECKING

import torch
from torch import nn

from batchrun.engine.core import Segment, Sequence
from batchrun.engine.cpu import Level, library
from batchrun.engine.cpu.layers import NativeStack
from batchrun.engine.cpu.linear import NativeLinear
from batchrun.engine.model.gates import budget_too_small, sequences_of
from batchrun.engine.model.int8 import Int8Linear
from batchrun.engine.model.invariant import varying_operator
from batchrun.engine.model.rowwise import RowwiseLinear

if TYPE_CHECKING:
    from batchrun.engine.attention import AttentionBackend
    from batchrun.engine.executor import TorchExecutor
    from batchrun.engine.kvspace import KVSpace
    from batchrun.engine.model.prepare import LoadedModel

_INSTRUCTIONS = {Level.TILES: "amx", Level.VECTORS: "avx512", Level.NOTHING: "native"}
_PIECES = (5, 1, 17, 2, 31)  # tokens of the pieces that a test prompt is cut into, again and again
_LONGEST = 48  # tokens of the longer test prompt
_LAST = 12  # positions whose logits are compared


class VariesError(Exception):
    """Answers depend on the batch: the message is a clause that says why."""


def varies(loaded: LoadedModel, backend: AttentionBackend) -> str | None:
    """Why answers may depend on the batch, in one clause; None if nothing says that they do."""
    on_cpu = loaded.device.type == "cpu"
    if not on_cpu and not any(isinstance(m, RowwiseLinear) for m in loaded.model.modules()):
        return "torch's matrix products depend on the batch"
    if not backend.invariant:
        return f"the attention kernel {backend.name} depends on the batch"
    return varying_operator(loaded.model) if on_cpu else None


@torch.inference_mode()
def check(loaded: LoadedModel, executor: TorchExecutor, space: KVSpace, most: int) -> float:
    """Compute the logits of test prompts in several ways, which must not differ in a bit.

    Args:
        loaded: The model.
        executor: Computes its steps.
        space: An idle KV space; idle again afterwards.
        most: Maximum tokens computed in a step.

    Returns:
        0: how far they are apart.

    Raises:
        VariesError: They differ; the message is a clause that says where.
    """
    sequences = sequences_of(loaded, min(loaded.max_model_len, _LONGEST))
    part = max(1, most // len(sequences))
    alone = {}
    for sequence in sequences:
        alone.update(_logits(executor, space, [sequence], [most]))
    ways = {
        "is split and computed beside another": _logits(
            executor, space, sequences, [min(size, part) for size in _PIECES]
        ),
        "is computed token by token beside another": _logits(
            executor, space, sequences, [part], singly=True
        ),
    }
    if loaded.device.type == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            ways["is computed by one thread"] = _logits(executor, space, sequences[1:], [most])
        finally:
            torch.set_num_threads(threads)
    for how, logits in ways.items():
        if any(not torch.equal(logits[place], alone[place]) for place in logits.keys() & alone):
            raise VariesError(f"a check found different logits where a prompt {how}")
    return 0


def _logits(
    executor: TorchExecutor,
    space: KVSpace,
    sequences: Seq[Sequence],
    sizes: Iterable[int],
    *,
    singly: bool = False,
) -> dict[tuple[int, int], torch.Tensor]:
    """Compute sequences side by side in pieces of these sizes, the last tokens `singly` or not.

    Returns:
        Logits `[V]` by row and position, of the last positions.
    """
    opened = {
        s.request.row: (s, slot)
        for s in sequences
        if (slot := space.open(s.num_tokens)) is not None
    }
    done, found = dict.fromkeys(opened, 0), {}
    for size in cycle(sizes):
        segments = []
        for row, (sequence, slot) in opened.items():
            start, total = done[row], sequence.num_tokens
            last = total - _LAST  # the first position that is compared
            length = min(size, (total if not singly else last) - start)
            length = max(length, min(1, total - start))
            if length:
                if not space.ensure(slot, start + length):
                    raise budget_too_small(total, space.refusal)
                wanted = start + length - max(start, last)
                ids = sequence.token_ids(start, length)
                segments.append(
                    Segment(slot, start, length, wanted > 0, ids, max(0, wanted - 1), row)
                )
        if not segments:
            break
        segments.sort(key=lambda s: s.length > 1)
        logits = iter(executor.logits(segments))
        for segment in segments:
            done[segment.key] = segment.end
            if segment.sampled:
                for position in range(segment.end - 1 - segment.num_drafts, segment.end):
                    found[segment.key, position] = next(logits)
    for _, slot in opened.values():
        space.close(slot, 0)
    space.retire(0)
    return found


def arithmetic(loaded: LoadedModel) -> str:
    """The dtype, and whose instructions compute."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    if loaded.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(loaded.device)
        return f"{dtype} cuda sm_{major}{minor}"
    kinds = {type(module) for module in loaded.model.modules()}
    used = []
    if kinds & {NativeStack, NativeLinear}:
        used.append(_INSTRUCTIONS[library.arithmetic(loaded.dtype).level])
    if NativeStack not in kinds or kinds & {nn.Linear, Int8Linear}:
        used.append(f"torch {torch.backends.cpu.get_cpu_capability().lower()}")
    return f"{dtype} {' and '.join(used)}"
