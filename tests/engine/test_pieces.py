"""Steps recorded in pieces: which sizes there are, what is captured, and that tokens stay."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchrun.engine.core import SamplingParams
from batchrun.engine.graphs import Recorded
from batchrun.engine.pieces import Apart, CudaPieces, size_for
from tests.parity.runner import outputs, rig, run, spoiled
from tests.parity.test_generate import MAX_TOKENS, loaded, prompts, wanted


@given(st.integers(1, 20_000), st.integers(0, 20_000))
def test_steps_are_filled_up_by_little(num_tokens: int, more: int) -> None:
    most = num_tokens + more
    size = size_for(num_tokens, most)
    assert num_tokens <= size <= most
    assert size - num_tokens < max(16, num_tokens / 4)
    assert size_for(size, most) == size


def test_there_are_few_sizes() -> None:
    assert len({size_for(count, 8192) for count in range(1, 8193)}) < 40


class Graphs:
    """In the place of `torch.cuda.CUDAGraph`: what is captured is what happens in between."""

    def __init__(self) -> None:
        self.captured: list[str] | None = None
        self.happened: list[str] = []

    def made(self) -> Any:
        owner = self

        class Graph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                assert owner.captured is None, "one capture within another"
                assert (pool, capture_error_mode) == ("pool", "thread_local")
                assert not gc.isenabled()
                self.own = owner.captured = []

            def capture_end(self) -> None:
                assert owner.captured is self.own
                owner.captured = None
                if "broken" in self.own:
                    raise RuntimeError("capture was invalidated")

            def replay(self) -> None:
                assert owner.captured is None
                owner.happened += self.own

        return Graph()

    def kernel(self, name: str) -> None:
        """Launch something: it is captured, or happens."""
        (self.happened if self.captured is None else self.captured).append(name)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    made = Graphs()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", made.made)
    return made


def test_what_is_called_apart_is_launched_between_the_pieces(graphs: Graphs) -> None:
    lengths = ["short"]

    def layers(apart: Apart) -> torch.Tensor:
        for layer in "ab":
            graphs.kernel(f"before {layer}")
            apart(lambda layer=layer: graphs.kernel(f"attention {layer} {lengths[-1]}"))
        graphs.kernel("head")
        return torch.ones(2)

    replay, logits = CudaPieces("pool")(layers)
    assert graphs.happened == ["attention a short", "attention b short"]
    assert gc.isenabled()
    graphs.happened.clear()
    lengths.append("long")
    replay()
    attended = ["before a", "attention a long", "before b", "attention b long"]
    assert graphs.happened == [*attended, "head"]
    assert logits.shape == (2,)


def test_a_capture_that_fails_is_ended(graphs: Graphs) -> None:
    def waits(apart: Apart) -> torch.Tensor:
        apart(lambda: graphs.kernel("attention"))
        graphs.kernel("broken")
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaPieces("pool")(waits)
    assert graphs.captured is None
    assert gc.isenabled()


def wrong(function: Callable[[Apart], torch.Tensor]) -> Recorded:
    """A recording whose replay forgets the first layer's attention."""
    output = torch.empty_like(function(lambda call: call()))

    def replay() -> None:
        calls: list[Callable[[], None]] = []
        output.copy_(function(lambda call: calls.append(call) if not calls else call()))

    return replay, output


def refused(function: Callable[[Apart], torch.Tensor]) -> Recorded:
    raise RuntimeError("no graph of this\nat line 5")


@pytest.mark.parametrize("record", [spoiled, refused, wrong])
@pytest.mark.parametrize("name", ["llama", "gemma2-softcap", "mixtral-moe"])
def test_steps_in_pieces_equal_generate(name: str, record: Any) -> None:
    model, log, sizes = loaded(name), [], Counter[int]()
    with rig(model, lag=1, max_num_seqs=9, max_num_batched_tokens=40) as r:
        scratch = r.arena.open(1)
        assert scratch is not None
        assert r.arena.ensure(scratch, 1)
        r.scheduler.max_num_seqs = 8
        r.executor.record_pieces(scratch, most=40, sampled=8, record=record, log=log.append)
        pieces = r.executor.pieces
        assert pieces is not None
        compute = pieces.compute

        def counting(size: int, num_tokens: int) -> torch.Tensor:
            sizes[size] += 1
            return compute(size, num_tokens)

        pieces.compute = counting  # type: ignore[method-assign]
        done = run(r, prompts(), SamplingParams(max_tokens=MAX_TOKENS))
    assert outputs(done) == wanted(name)
    if record is spoiled:
        assert not log
        assert set(sizes) == {16, 32, 40}
    else:
        why = (
            r"\(no graph of this\)" if record is refused else r"\(a replay's logits differ by .*\)"
        )
        (line,) = log
        assert re.fullmatch("steps with prompts are launched kernel by kernel " + why, line)
        assert pieces.limit == 0
