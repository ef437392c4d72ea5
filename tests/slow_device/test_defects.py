"""Defects that were found on GPUs, put back: the slow device finds each of them on any machine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from batchrun.allocator.arena import KVArena
from batchrun.engine.build import Assembly
from batchrun.engine.core import EngineError, Request, SamplingParams, Segment
from batchrun.engine.executor import Ticket, TorchExecutor
from batchrun.engine.model import gates
from batchrun.engine.plan import Masks
from batchrun.engine.transfers import CudaTransfers
from batchrun.errors import ModelError
from tests.parity.runner import run
from tests.parity.test_generate import bytes_per_token, loaded
from tests.slow_device.device import Event, SlowDevice, TooEarlyError
from tests.slow_device.rig import rig

STOPS = tuple(range(3, 199, 3))  # a step more than is needed is on its way when one comes


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that samples nothing is collected without a look at the device."""
    sample = TorchExecutor.sample

    def forgetting(self: TorchExecutor, ticket: Ticket, masks: Masks | None) -> None:
        sample(self, ticket, masks)
        if not any(segment.sampled for segment in ticket.segments):
            ticket.tokens = SimpleNamespace(get=list)

    monkeypatch.setattr(TorchExecutor, "sample", forgetting)


def job(seed: int, r: Assembly) -> None:
    """Long prompts, short answers, a few common beginnings."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> list[int]:
        return [rng.randrange(3, 199) for _ in range(rng.randrange(least, most))]

    heads = [words(17, 60) for _ in range(3)]
    rows = [rng.choice(heads) + words(5, 60) for _ in range(14)]
    longest = [rng.choice([1, 1, 1, 9]) for _ in rows]
    params = [SamplingParams(max_tokens=most, stop_token_ids=STOPS) for most in longest]
    run(r, rows, params, check=False)


def failure(seed: int, *, collects: bool = True) -> str:
    """What is told of a job with little memory, if anything."""
    model, rng = loaded("llama"), random.Random(seed)
    shape = {"max_num_batched_tokens": rng.choice([8, 12, 16]), "max_num_seqs": rng.choice([1, 3])}
    budget = bytes_per_token(model) * rng.randrange(120, 260)
    try:
        with (
            SlowDevice().installed() as device,
            rig(device, model, kv_budget=budget, collects=collects, **shape) as r,
        ):
            job(seed, r)
    except (TooEarlyError, EngineError) as error:
        return str(error)
    return ""


def test_jobs_with_little_memory_break_no_rule() -> None:
    assert {failure(seed) for seed in range(10)} == {""}


@pytest.mark.usefixtures("forgetful")
def test_a_step_that_samples_nothing_and_is_not_waited_for_is_found() -> None:
    assert {failure(seed) for seed in range(3)} == {"a step was collected before it was over"}


@pytest.mark.usefixtures("forgetful")
def test_so_is_an_event_that_was_recorded_again() -> None:
    """Although the last step before it was waited for."""
    found = {failure(seed, collects=False) for seed in range(10)}
    assert "the device failed: CUDA error: device not ready" in found


@pytest.mark.usefixtures("forgetful")
def test_so_is_memory_unmapped_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "elapsed_time", lambda *_: 0.0)
    found = {failure(seed, collects=False) for seed in range(10)}
    assert "memory was unmapped under a step that is not over" in found


def test_pages_that_go_a_step_too_early_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    close = KVArena.close

    def too_early(self: KVArena, slot: int, step: int, keep: int = 0) -> None:
        close(self, slot, step - 1, keep)

    monkeypatch.setattr(KVArena, "close", too_early)
    found = {failure(seed) for seed in range(10)}
    assert "memory was unmapped under a step that is not over" in found


def test_copies_that_run_beside_a_step_they_depend_on_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = TorchExecutor.launch
    monkeypatch.setattr(
        TorchExecutor, "launch", lambda self, plan: launch(self, replace(plan, copies_after=0))
    )
    found = {failure(seed) for seed in range(10)}
    assert "a copy reads a page under a step that writes it" in found


def end_at_work() -> None:
    """An engine that is closed while a step is on its way."""
    with SlowDevice().installed() as device, rig(device, loaded("llama")) as r:
        r.engine.add(Request(0, 0, (5, 6, 7), SamplingParams(max_tokens=9), 0))
        r.engine.step()


def test_an_engine_that_ends_without_waiting_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    end_at_work()
    monkeypatch.setattr(CudaTransfers, "drain", lambda self: None)
    with pytest.raises(TooEarlyError, match="unmapped under"):
        end_at_work()


def kept_view(self: TorchExecutor, segments: Sequence[Segment]) -> torch.Tensor:
    """Logits as they were returned: a recorded step's own."""
    with self._step():
        logits = self._logits(segments)
    self.transfers.drain()
    return logits


def verify() -> float:
    """The canary, as before a job: decode steps are recorded by then."""
    with (
        SlowDevice().installed() as device,
        rig(device, loaded("llama"), graphs=(1, 2, 4), max_num_seqs=4) as r,
    ):
        return gates.verify(loaded("llama"), r.executor, r.arena, 64)


def test_the_canary_passes_over_recorded_steps() -> None:
    assert verify() < 1e-4


def test_logits_that_the_next_step_overwrites_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchExecutor, "logits", kept_view)
    with pytest.raises(ModelError, match="logits over contiguous slots are not finite"):
        verify()
