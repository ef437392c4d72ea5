"""Kernels that read planned arrays, over the slow device: what a step was planned with stays."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from batchrun.engine.attention import AttentionBackend, Geometry, Upload
from batchrun.engine.attention.flashinfer import FlashInfer
from batchrun.engine.attention.torch_flash import TorchFlash
from batchrun.engine.core import SamplingParams
from batchrun.engine.model.prepare import LoadedModel, prepare
from tests.attention.slots import PrefillModule, flash_attention_forward
from tests.parity.models import seeded, with_head_dim
from tests.parity.runner import generate, outputs, run
from tests.parity.test_generate import families
from tests.slow_device.device import SlowDevice, TooEarlyError
from tests.slow_device.rig import rig

MAX_TOKENS = 6


class PinnedPlans(PrefillModule):
    """Plans are copied to the device from pinned memory, by nobody's event."""

    def __init__(self, kind: Any, device: SlowDevice) -> None:
        super().__init__(kind)
        self._device = device

    def plan(self, *arguments: Any) -> list[int]:
        info = super().plan(*arguments)
        ints, host = arguments[1:3]
        self._device.copies.pin(host)
        host[:4] = torch.tensor([len(self.plans)], dtype=torch.int32).view(torch.uint8)
        ints[:4].copy_(host[:4], non_blocking=True)
        return info

    def paged_run(self, floats: Any, ints: Any, info: Any, *arguments: Any) -> None:
        number = int(ints[:4].view(torch.int32))
        assert self.plans[number - 1]["buffers"][1] == ints.data_ptr()
        assert self.plans[number - 1]["info"] == info
        query, keys, values, starts, block_starts, blocks, *rest = arguments
        # A recorded launch knows where the table of blocks begins, not how long it is by now.
        offset = int(blocks.storage_offset())
        blocks = blocks.as_strided((blocks.untyped_storage().nbytes() // 4 - offset,), (1,), offset)
        arrays = starts, block_starts, blocks
        super().paged_run(floats, ints, info, query, keys, values, *arrays, *rest)


def flashinfer(device: SlowDevice, geometry: Geometry, upload: Upload) -> FlashInfer:
    return FlashInfer(geometry, upload, lambda kind: PinnedPlans(kind, device), "flashinfer-fa2")


def torch_flash(device: SlowDevice, geometry: Geometry, upload: Upload) -> TorchFlash:
    return TorchFlash(geometry, upload, flash_attention_forward)


@cache
def loaded() -> LoadedModel:
    """Some of its layers see a window."""
    return prepare(seeded(with_head_dim("gemma3", 64)))


@cache
def wanted() -> list[list[int]]:
    return [generate(loaded().model, prompt, MAX_TOKENS) for prompt in families()[:12]]


def go(make: Any, change: Any = lambda backend: None) -> list[list[int]]:
    with SlowDevice().installed() as device:

        def backend(geometry: Geometry, upload: Upload) -> AttentionBackend:
            made = make(device, geometry, upload)
            change(made)
            return made

        shape = {"max_num_batched_tokens": 20, "max_num_seqs": 5, "graphs": (1, 3, 5)}
        with rig(device, loaded(), backend=backend, **shape) as r:
            return outputs(run(r, families()[:12], SamplingParams(max_tokens=MAX_TOKENS)))


@pytest.mark.parametrize("make", [flashinfer, torch_flash])
def test_planned_and_recorded_steps_equal_generate(make: Any) -> None:
    assert go(make) == wanted()


def test_one_pinned_buffer_for_all_plans_is_found() -> None:
    def take_no_turns(backend: FlashInfer) -> None:
        for plan in (plan for part in backend._parts for plan in part.plans.values()):
            plan._host = plan._host[:1] * 2

    with pytest.raises(TooEarlyError, match="pinned memory was written before it was copied"):
        go(flashinfer, take_no_turns)
