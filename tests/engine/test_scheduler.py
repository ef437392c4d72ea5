"""The scheduler and the engine loop over real memory, with an executor that checks it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from allocator.arena import KVArena
from allocator.host import HostMemory
from allocator.layout import KVLayout, LayerKV
from allocator.tensor import layer_views
from batchrun.engine.core import FinishReason, Request, SamplingParams
from batchrun.engine.engine import Completion, Engine
from batchrun.engine.scheduler import Scheduler
from tests.engine.echo import EchoExecutor, expected

PAGE = 4096
MAX_LEN = 60


class Rig:
    """An engine with one layer of 37 float64 elements a head, so that pages cut tokens."""

    def __init__(
        self,
        *,
        seqs: int,
        batched: int,
        pages: int | None,
        lag: int = 0,
        eos: frozenset[int] = frozenset(),
    ) -> None:
        self.memory = HostMemory(PAGE)
        layout = KVLayout((LayerKV(1, 37, 37),), 8, PAGE, MAX_LEN, 1)
        budget = None if pages is None else pages * PAGE
        self.arena = KVArena(self.memory, layout, num_slots=seqs, budget=budget)
        self.scheduler = Scheduler(
            self.arena, max_num_seqs=seqs, max_num_batched_tokens=batched, max_model_len=MAX_LEN
        )
        executor = EchoExecutor(*layer_views(self.arena, 0, torch.float64), lag)
        self.eos = eos
        self.engine = Engine(executor, self.scheduler, None, eos)
        self.done: dict[int, Completion] = {}
        self.requests: list[Request] = []

    def add(self, prompt: list[int], max_tokens: int) -> None:
        row = len(self.requests)
        request = Request(row, 0, tuple(prompt), SamplingParams(max_tokens=max_tokens), 0)
        self.requests.append(request)
        self.engine.add(request)

    def step(self) -> None:
        for completion in self.engine.step():
            row = completion.sequence.request.row
            assert row not in self.done, f"row {row} ended twice"
            self.done[row] = completion
        self.check()

    def drain(self) -> None:
        steps = 0
        while self.engine.has_work:
            self.step()
            steps += 1
            assert steps < 20_000, "the engine makes no progress"

    def check(self) -> None:
        self.scheduler.check()
        self.arena.check()

    def verify(self) -> None:
        assert sorted(self.done) == list(range(len(self.requests)))
        for row, completion in self.done.items():
            request, sequence = self.requests[row], completion.sequence
            room = MAX_LEN - len(request.prompt_ids)
            if sequence.finish_reason is FinishReason.ERROR:
                assert sequence.error_kind in {"prompt_too_long", "kv_budget"}
                need = len(request.prompt_ids) + min(request.params.max_tokens, max(1, room)) - 1
                assert need >= MAX_LEN or not self.arena.can_fit(need)
            else:
                length = min(request.params.max_tokens, room)
                want = expected(request.prompt_ids, length)
                ends = [i for i, token in enumerate(want, 1) if token in self.eos]
                assert sequence.output_ids == want[: ends[0] if ends else length]
            assert sequence.num_pending == 0

    def close(self) -> None:
        self.arena.release()
        self.memory.close()


class EngineMachine(RuleBasedStateMachine):
    """Any requests, any limits, any order: each row ends once, with the tokens that are its own."""

    rig: Rig

    @initialize(
        seqs=st.integers(1, 6),
        batched=st.integers(1, 40),
        pages=st.one_of(st.none(), st.integers(9, 16)),
        lag=st.integers(0, 2),
        eos=st.sampled_from([frozenset(), frozenset(range(0, 997, 11))]),
    )
    def start(
        self, seqs: int, batched: int, pages: int | None, lag: int, eos: frozenset[int]
    ) -> None:
        self.rig = Rig(seqs=seqs, batched=batched, pages=pages, lag=lag, eos=eos)

    @rule(
        length=st.integers(1, MAX_LEN + 3), first=st.integers(0, 900), max_tokens=st.integers(1, 40)
    )
    def add(self, length: int, first: int, max_tokens: int) -> None:
        self.rig.add([(first + i) % 997 for i in range(length)], max_tokens)

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.rig.engine.has_work:
                self.rig.step()

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.drain()
            self.rig.verify()
            assert self.rig.arena.num_open == 0
            self.rig.close()


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


@pytest.fixture
def make_rig():  # type: ignore[no-untyped-def]
    rigs = []

    def make(**kwargs: int | None) -> Rig:
        rigs.append(Rig(**kwargs))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def test_a_long_prefill_does_not_delay_decodes(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=2, batched=8, pages=None)
    rig.add([1, 2], 30)
    rig.step()
    rig.add(list(range(40)), 5)
    decoding = rig.scheduler.running[0]
    for _ in range(5):
        before = len(decoding.output_ids)
        rig.step()
        assert len(decoding.output_ids) == before + 1


def test_the_youngest_is_preempted_and_still_right(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=4, batched=64, pages=10)
    for first in (0, 100, 200, 300):
        rig.add([first, first + 1, first + 2], 50)
    rig.step()
    oldest = rig.scheduler.running[0]
    while oldest.finish_reason is None:
        rig.step()
    assert oldest.request.row == 0
    assert oldest.finished is not None
    assert rig.scheduler.num_preemptions > 0
    rig.drain()
    assert rig.engine.stats.recomputed_tokens > 0
    rig.verify()


def test_pipelining_preempts_no_more(make_rig):  # type: ignore[no-untyped-def]
    preemptions = []
    for lag in (0, 1):
        rig = make_rig(seqs=4, batched=64, pages=10, lag=lag)
        for first in range(0, 800, 100):
            rig.add([first, first + 1, first + 2], 50)
        rig.drain()
        rig.verify()
        preemptions.append(rig.scheduler.num_preemptions)
    assert 0 < preemptions[1] <= preemptions[0]


def test_a_row_that_can_never_fit_is_its_own_error(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=2, batched=64, pages=5)
    rig.add([1, 2, 3], 4)
    rig.add(list(range(MAX_LEN)), 4)  # no room for an answer
    rig.add(list(range(50)), 4)  # its keys and values exceed the budget
    rig.add([5, 6, 7], 55)  # grows beyond the budget on the way
    rig.add([8, 9], 3)
    rig.drain()
    rig.verify()
    kinds = [rig.done[i].sequence.error_kind for i in range(5)]
    assert kinds == [None, "prompt_too_long", "kv_budget", "kv_budget", None]
    assert "59" not in rig.done[1].sequence.error
    assert f"{MAX_LEN} tokens" in rig.done[1].sequence.error
    assert "--kv-budget" in rig.done[3].sequence.error


def test_each_step_stays_within_the_token_budget(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=6, batched=7, pages=None)
    for i in range(6):
        rig.add(list(range(i, i + 20)), 9)
    largest = 0
    plan = rig.scheduler.plan

    def spy():  # type: ignore[no-untyped-def]
        nonlocal largest
        made = plan()
        largest = max(largest, made.num_tokens)
        return made

    rig.scheduler.plan = spy
    rig.drain()
    rig.verify()
    assert largest == 7
