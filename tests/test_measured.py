"""What steps took, learned from runs' figures and remembered."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from batchrun.engine.settings import Limits, Settings
from batchrun.estimate.measured import Measured, StepSampler
from batchrun.jobs.options import ModelSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import JobSpec

COSTS = (0.004, 0.0003, 0.0007, 2e-11)


def spec(**changes: Any) -> JobSpec:
    fields: dict[str, Any] = {
        "inputs": (),
        "input_format": "jsonl",
        "prompt": PromptSpec(),
        "model": ModelSpec("m", "/m", "abc", "float32"),
        "sampling": SamplingSpec(),
        "runtime": RuntimeSpec(max_num_seqs=8),
    }
    return JobSpec(**{**fields, **changes})


def intervals(costs: tuple[float, ...], count: int = 50) -> Measured:
    rng, measured = random.Random(2), Measured(runs=1)
    for _ in range(count):
        steps = rng.randint(1, 9)
        tokens = steps * rng.uniform(1, 64), steps * rng.uniform(1, 64)
        amounts = (float(steps), *tokens, steps * rng.uniform(0, 5e8))
        seconds = sum(c * a for c, a in zip(costs, amounts, strict=True))
        measured.add(amounts, seconds * rng.uniform(0.98, 1.02))
    return measured


def test_costs_are_found() -> None:
    assert intervals(COSTS).costs() == pytest.approx(COSTS, rel=0.2)
    assert intervals(COSTS).predict((1000.0, 1e5, 2e5, 2e11)) == pytest.approx(
        4 + 30 + 140 + 4, rel=0.05
    )


@given(st.lists(st.tuples(*[st.floats(0, 1e6)] * 5), min_size=1, max_size=5))
@example([(0.0, 1.0, 5.091303787598251e-161, 0.0, 0.0)])  # whose square is next to nothing
def test_whatever_was_measured_no_cost_is_below_zero(found: list[tuple[float, ...]]) -> None:
    measured = Measured()
    for *amounts, seconds in found:
        measured.add((amounts[0], amounts[1], amounts[2], amounts[3]), seconds)
    assert all(cost >= 0 for cost in measured.costs())


def test_steps_that_are_all_alike_predict_such_steps() -> None:
    measured = Measured()
    for _ in range(10):
        measured.add((5.0, 100.0, 200.0, 1e8), 2.0)
    assert measured.predict((50.0, 1000.0, 2000.0, 1e9)) == pytest.approx(20, rel=0.01)


def test_later_runs_count_more() -> None:
    old, new = Measured(runs=1), Measured(runs=1, load_s=3.0, share=0.5, accepted=0.4, rejected=0.1)
    old.add((1.0, 0.0, 0.0, 0.0), 1.0)
    new.add((1.0, 0.0, 0.0, 0.0), 4.0)
    both = new.after(old)
    assert both.predict((1.0, 0.0, 0.0, 0.0)) == pytest.approx(3.0)
    assert (both.runs, both.load_s, both.share, both.seconds) == (2, 3.0, 0.5, 5.0)
    assert (both.accepted, both.rejected) == (0.4, 0.1)
    assert new.after(None) is new


def test_a_step_has_the_tokens_that_make_its_own_cost_a_tenth() -> None:
    limits = Limits(256, 1024)
    assert intervals((0.06, 0.001, 0.001, 0.0)).step_cost == pytest.approx(60, rel=0.2)
    assert limits.step_tokens(60) == 512
    assert [limits.step_tokens(cost) for cost in (None, 1, 25, 1e9)] == [1024, 256, 256, 2048]
    assert intervals((0.0, 0.001, 0.001, 0.0)).step_cost is None


def test_a_large_gpu_runs_more_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings("", "tiny", "tiny", Path())
    assert settings.limits("cpu") == Limits(256, 1024)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gib, most in ((8, 256), (24, 256), (80, 512)):
        device = SimpleNamespace(total_memory=gib << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=device: found)
        assert settings.limits("cuda:0") == Limits(most, 8192)
        assert replace(settings, max_num_seqs=7).limits("cuda:0").max_num_seqs == 7


def test_figures_that_grow_become_intervals() -> None:
    sampler = StepSampler()
    figures = {"engine_s": 1.0, "steps": 4, "prefill_tokens": 90, "decode_tokens": 7}
    figures |= {
        "drafted_tokens": 5,
        "accepted_tokens": 2,
        "forced_tokens": 0,
    }  # 3 were computed in vain
    figures |= {"kv_s": 2.0, "kv_live_s": 600.0}  # 3 draft tokens were computed in vain
    sampler.observe(figures)
    sampler.observe(figures)  # nothing happened
    assert sampler.measured.moments[:4] == [16.0, 360.0, 40.0, 4800.0]
    assert sampler.measured.products == [4.0, 90.0, 10.0, 1200.0]
    sampler.observe({**figures, "engine_s": 3.0, "steps": 6, "kv_s": 3.0})
    assert sampler.measured.seconds == 3.0
    assert (sampler.measured.accepted, sampler.measured.rejected) == (2 / 7, 3 / 7)


def test_what_is_remembered_is_of_the_same_model_and_settings(tmp_path: Path) -> None:
    measured = intervals(COSTS)
    measured.save(tmp_path, spec())
    assert Measured.load(tmp_path, spec()) == measured
    model, runtime = spec().model, spec().runtime
    assert Measured.load(tmp_path, spec(model=replace(model, path="/elsewhere"))) == measured
    assert Measured.load(tmp_path, spec(runtime=replace(runtime, max_num_seqs=2))) == measured
    for same in ({"on_done": "true"}, {"keep_going": True}, {"reorder": False}):
        assert Measured.load(tmp_path, spec(runtime=replace(runtime, **same))) == measured
    assert Measured.load(tmp_path, spec(model=replace(model, dtype="bfloat16"))) is None
    assert Measured.load(tmp_path, spec(runtime=replace(runtime, device="cuda:0"))) is None
    [path] = (tmp_path / "measured").iterdir()
    path.write_text("{")
    assert Measured.load(tmp_path, spec()) is None
