"""The engine over a slow device, as `tests.parity.runner` builds it over the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any
from unittest.mock import patch

import torch

from batchrun.allocator.arena import KVArena
from batchrun.allocator.vmm import VirtualMemory
from batchrun.engine import build
from batchrun.engine.attention import AttentionBackend, Geometry, Upload
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.build import Assembly
from batchrun.engine.core import Segment
from batchrun.engine.executor import Ticket
from batchrun.engine.graphs import Recorded
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.plan import StepOutput, StepPlan
from batchrun.engine.settings import geometry_of
from batchrun.engine.transfers import CudaTransfers
from tests.parity import runner
from tests.slow_device.device import SlowDevice
from tests.slow_device.steps import WatchedMemory, uses_of


class Transfers(CudaTransfers):
    """The product's, whose steps the device knows."""

    def __init__(self, device: SlowDevice, lag: int, size: int) -> None:
        super().__init__(torch.device("cpu"), lag, size)
        self._steps_of_device = device.steps

    @contextmanager
    def step(self, *, more: bool = False) -> Iterator[None]:
        known = self._steps_of_device.launch(self.compute, more=more)
        with known, super().step(more=more):
            yield


@contextmanager
def rig(
    device: SlowDevice,
    loaded: LoadedModel,
    *,
    lag: int = 1,
    staging: int = 1 << 16,
    graphs: Sequence[int] = (),
    collects: bool = True,
    backend: Callable[[Geometry, Upload], AttentionBackend] | None = None,
    **settings: Any,
) -> Iterator[Assembly]:
    """An engine over an installed slow device, with that many bytes of staging memory.

    Args:
        device: Over which.
        loaded: The model.
        lag: Steps in flight.
        staging: Bytes of staging memory for a step.
        graphs: Batch sizes to record, if any.
        collects: Whether a step that is collected before it is over is told at once.
        backend: Makes the attention kernels; None for SDPA.
        settings: As of `runner.rig`.
    """

    def watched(memory: VirtualMemory, *args: Any, **kwargs: Any) -> KVArena:
        return KVArena(WatchedMemory(memory, device.steps), *args, **kwargs)

    with (
        patch.object(build, "Transfers", lambda: Transfers(device, lag, staging)),
        patch.object(build, "KVArena", watched),
        runner.rig(loaded, lag=lag, **settings) as made,
    ):
        made.scheduler._lookahead = build._LOOKAHEAD if lag else 0  # as on a device
        made.scheduler._overlap = lag > 0
        if backend is not None:
            made.executor.backend = backend(_geometry(made), made.executor.transfers.upload)
        scratch = _record(made, graphs) if graphs else None
        _watch(made, device, scratch, collects=collects)
        yield made


def _watch(rig: Assembly, device: SlowDevice, scratch: int | None, *, collects: bool) -> None:
    """Tell the device what each step uses, and that a collected step must be over."""
    executor, steps = rig.executor, device.steps
    launch, collect, launched = executor.launch, executor.collect, {}

    def watched_launch(plan: StepPlan) -> Ticket:
        steps.next_uses = uses_of(plan, rig.arena, scratch)
        ticket = launch(plan)
        launched[plan.step] = steps.last
        return ticket

    def watched_collect(ticket: Ticket) -> StepOutput:
        tokens = collect(ticket)
        if launched.pop(ticket.step) in steps.unfinished() and collects:
            device.broken("a step was collected before it was over")
        return tokens

    executor.launch, executor.collect = watched_launch, watched_collect  # type: ignore[method-assign]


def _record(rig: Assembly, sizes: Sequence[int]) -> int:
    """Record decode steps of these sizes; returns the slot of what fills them up."""
    scratch = rig.arena.open(1)
    assert scratch is not None
    assert rig.arena.ensure(scratch, 1)
    executor = rig.executor
    if isinstance(executor.backend, SDPA):
        executor.backend = Rereading()
    executor.capture(sizes, scratch, Recorder(executor.backend))
    most, sampled = rig.max_num_batched_tokens, max(sizes)
    executor.record_pieces(scratch, most=most, sampled=sampled, record=runner.spoiled)
    return scratch


def _geometry(rig: Assembly) -> Geometry:
    slots = rig.arena.layout.slot_tokens, rig.arena.num_slots
    return geometry_of(rig.loaded, rig.limits, *slots)


class Recorder:
    """Records as CUDA graphs do.

    A replay sees the attributes of the backend as they were when it was recorded, and what their
    tensors hold by now. The outputs of all graphs lie in one memory, which each replay spoils.
    """

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        self._outputs: torch.Tensor | None = None

    def __call__(self, function: Callable[[], torch.Tensor]) -> Recorded:
        torch.cuda.synchronize()  # as torch.cuda.graph does
        made, attributes = function(), vars(self._backend)
        recorded = {} if isinstance(self._backend, Rereading) else _frozen(attributes)
        if self._outputs is None:  # the largest comes first
            self._outputs = torch.empty_like(made)
        outputs = self._outputs
        output = outputs[: len(made)]

        def replay() -> None:
            outputs.fill_(torch.nan)
            now = dict(attributes)
            attributes.update(recorded)
            output.copy_(function())
            attributes.update(now)

        return replay, output


def _frozen(attributes: dict[str, Any]) -> dict[str, Any]:
    """The same attributes, whatever becomes of their lists, dictionaries and what is in these."""
    return {
        name: {key: copy(each) for key, each in value.items()}
        if isinstance(value, dict)
        else copy(value)
        for name, value in attributes.items()
        if not isinstance(value, torch.Tensor)
    }


class Rereading(SDPA):
    """SDPA under a `Recorder`, which freezes nothing."""

    capturable = True

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        super().plan(segments)
