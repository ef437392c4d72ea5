"""A step for which the device has no memory is tried once more, and then ends the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from batchrun.engine.core import EngineError, SamplingParams
from tests.parity.runner import outputs, rig, run
from tests.parity.test_generate import loaded, prompts

PENALISED = SamplingParams(max_tokens=8, temperature=1.0, repetition_penalty=1.3, scored=True)


def failing(call: Callable[..., Any], fails: Iterator[bool]) -> Callable[..., Any]:
    """The call, which after doing its work finds no memory whenever `fails` says so."""

    def wrapped(*args: Any) -> Any:
        found = call(*args)
        if next(fails, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    return wrapped


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("place", ["_forward", "sample"])
def test_one_refusal_is_relieved_and_changes_no_token(place: str, lag: int) -> None:
    with rig(loaded("llama"), lag=lag) as r:
        want = outputs(run(r, prompts(), PENALISED, seed=3))
    with rig(loaded("llama"), lag=lag) as r:
        relieved: list[int] = []
        r.executor._relieve = lambda: relieved.append(r.scheduler.step)
        owner = r.executor if place == "_forward" else r.executor.sampler
        every_third = (i % 3 == 0 for i in range(1000))
        setattr(owner, place, failing(getattr(owner, place), every_third))
        assert outputs(run(r, prompts(), PENALISED, seed=3)) == want
        assert len(relieved) > 3
        assert len(set(relieved)) == len(relieved), "no step is tried three times"


def test_a_second_refusal_says_what_to_do() -> None:
    with rig(loaded("llama")) as r:
        relieved: list[None] = []
        r.executor._relieve = lambda: relieved.append(None)
        r.executor._forward = failing(r.executor._forward, iter([False, True, True]))  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="no memory left for activations") as caught:
            run(r, prompts(), PENALISED)
        assert len(relieved) == 1
        assert "batchrun resume" in str(caught.value.hint)


def test_what_can_t_be_done_twice_is_not() -> None:
    with rig(loaded("llama"), lag=1) as r:
        r.executor._relieve = lambda: pytest.fail("a step was tried again")
        r.executor.sampler.accept = failing(r.executor.sampler.accept, iter([False, True]))  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="no memory left"):
            run(r, prompts(), PENALISED)
