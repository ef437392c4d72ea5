"""What a whole engine asks of the CUDA driver; run by test_over_fake_cuda.py, in its process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from batchrun.allocator.vmm import AllocatorError
from batchrun.engine.build import Assembly
from batchrun.engine.core import EngineError, Request, SamplingParams
from tests.fake_cuda.control import (
    CONTEXT,
    CREATE,
    FAKE,
    FREE,
    INVALID_CONTEXT,
    MAP,
    OUT_OF_MEMORY,
    SET_ACCESS,
    Asked,
    asked,
    fail,
)
from tests.parity.runner import outputs, run
from tests.parity.test_generate import (
    MAX_TOKENS,
    bytes_per_token,
    families,
    loaded,
    wanted_of_families,
)
from tests.slow_device.calls import DriverCalls
from tests.slow_device.device import SlowDevice
from tests.slow_device.rig import rig
from tests.slow_device.shapes import Shape

ROWS, PROMPT, ANSWER = 6, 20, 60


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert (FAKE.fake_committed(), FAKE.fake_mappings(), FAKE.fake_reservations()) == (0, 0, 0)


@contextmanager
def decoding(**settings: Any) -> Iterator[tuple[Assembly, SlowDevice]]:
    """An engine in which all rows decode, and go on to for longer than anybody looks."""
    with (
        SlowDevice().installed() as device,
        rig(device, loaded("llama"), share_prefixes=False, **settings) as r,
    ):
        params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
        for row in range(ROWS):
            length = PROMPT + 16 * row  # 16 tokens fill 3 pages: all rows grow in the same steps
            ids = tuple(range(3 + row, 3 + row + length))
            r.engine.add(Request(row, 0, ids, params, 0))
        while len(r.engine.partials()) < ROWS:
            r.engine.step()
        r.engine.step()
        yield r, device
        while r.engine.has_work:
            r.engine.step()


def steps(r: Assembly, count: int = 30) -> Iterator[tuple[Asked, int]]:
    """What each step asks, and in how many slabs a sequence grew beyond its pages."""
    launch, grown = r.executor.launch, 0

    def watched(plan: Any) -> Any:
        nonlocal grown
        pages = r.arena.layout.pages_for
        for s in plan.segments:
            assert s.length == 1
            pairs = zip(pages(s.start), pages(s.start + 1), strict=True)
            grown += sum(before < after for before, after in pairs)
        return launch(plan)

    r.executor.launch = watched  # type: ignore[method-assign]
    for _ in range(count):
        grown = 0
        with asked() as made:
            assert r.engine.step() == []
        yield made, grown


@pytest.mark.parametrize("per_slab", [3, 1])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_step_in_which_nothing_grows_asks_nothing_of_the_driver(lag: int, per_slab: int) -> None:
    """But for pages that are made ahead. Others ask one set-access for each slab that grows."""
    budget, idle = bytes_per_token(loaded("llama")) * 2000, 0
    ahead = {CREATE, CONTEXT} if lag else set()
    with decoding(lag=lag, kv_budget=budget, layers_per_slab=per_slab) as (r, _):
        for made, grown in steps(r):
            assert made.calls[SET_ACCESS] == made.calls[MAP] == grown
            assert grown or made.calls.keys() <= ahead
            assert bool(made.calls) == bool(made.nanoseconds)
            idle += not made.calls
    assert 3 < idle < 30


def test_a_budget_that_is_measured_is_all_that_a_steady_step_asks_for() -> None:
    with decoding() as (r, _):
        for made, grown in steps(r):
            assert made.calls[FREE] <= 1
            assert grown or made.calls.keys() <= {FREE, CONTEXT, CREATE}


def test_no_mapping_call_is_exposed_in_steady_decode() -> None:
    """Pages are mapped while the step before computes, and were created before that."""
    with decoding() as (r, device):
        calls = DriverCalls(r, device)
        grown = sum(grown for _, grown in steps(r))
        assert calls.count(exposed=True) == calls.count({CREATE}, urgent=True) == 0
        assert calls.count({MAP}) == calls.count({SET_ACCESS}, urgent=True) == grown > 0
    with decoding(lag=0) as (r, device):
        calls = DriverCalls(r, device)
        grown = sum(grown for _, grown in steps(r))
        assert calls.count(exposed=False) == 0, "nothing is under way between steps without a lag"
        assert calls.count({MAP}) == grown


@pytest.mark.parametrize("nth", [1, 2, 7, 20, 33])
@pytest.mark.parametrize("function", [SET_ACCESS, CREATE, MAP])
def test_a_driver_without_memory_changes_no_token(function: str, nth: int) -> None:
    with Shape(tokens=230, greedy=True).rig(loaded("llama")) as r:
        fail(function, nth, OUT_OF_MEMORY)
        done = run(r, families(), SamplingParams(max_tokens=MAX_TOKENS))
    assert fail(function, 0, 0) == 0, "the call has failed"
    assert outputs(done) == wanted_of_families("llama")


@pytest.mark.parametrize("nth", [1, 5])
def test_a_driver_that_fails_ends_the_engine_which_gives_everything_back(nth: int) -> None:
    def go() -> None:
        with Shape().rig(loaded("llama")) as r:
            fail(SET_ACCESS, nth, INVALID_CONTEXT)
            run(r, families(), SamplingParams(max_tokens=MAX_TOKENS))

    with pytest.raises(AllocatorError, match=r"cuMemSetAccess failed with .* \(201\)"):
        go()


def test_too_few_addresses_are_told_before_any_row_is_lost() -> None:
    def go() -> None:
        with Shape().rig(loaded("llama")):
            pass

    with pytest.raises(EngineError, match="cannot set up KV memory for 9 sequences") as raised:
        go()
    assert "lower --max-num-seqs or --max-model-len" in str(raised.value.hint)
