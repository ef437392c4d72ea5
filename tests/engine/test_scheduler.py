"""The scheduler and the engine loop over real memory, with an executor that checks it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from batchrun.allocator.arena import KVArena
from batchrun.allocator.host import HostMemory
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.tensor import layer_views, slab_bytes
from batchrun.engine.core import Completion, FinishReason, Request, SamplingParams
from batchrun.engine.engine import Engine
from batchrun.engine.prefixes import KEPT
from batchrun.engine.scheduler import Scheduler
from batchrun.engine.scores import Scores, Scoring
from batchrun.engine.speculation.proposers import Proposer
from batchrun.engine.speculation.speculator import Speculator
from batchrun.engine.speculation.table import AnswerTable
from tests.allocator.invariants import check_arena
from tests.engine import invariants
from tests.engine.echo import Costs, EchoExecutor, Oracle, expected, expected_of_beams, score_of

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
        share: bool = True,
        proposer: Proposer | None = None,
        scored: int = 1 << 30,
    ) -> None:
        self.memory = HostMemory(PAGE)
        layout = KVLayout((LayerKV(1, 37, 37),), 8, PAGE, MAX_LEN, 1)
        budget = None if pages is None else pages * PAGE
        self.arena = KVArena(self.memory, layout, num_slots=seqs + KEPT, budget=budget)
        self.scheduler = Scheduler(
            self.arena,
            max_num_seqs=seqs,
            max_num_batched_tokens=batched,
            max_model_len=MAX_LEN,
            max_scored_tokens=scored,
            share=share,
            proposer=proposer,
            overlap=lag > 0,
        )
        views = layer_views(self.arena, 0, torch.float64)
        executor = EchoExecutor(*views, slab_bytes(self.arena, 0), lag, eos)
        self.eos = eos
        self.engine = Engine(executor, self.scheduler, None, eos)
        self.done: dict[int, Completion] = {}
        self.requests: list[Request] = []

    def add(
        self, prompt: list[int], max_tokens: int, scoring: Scoring | None = None, **more: Any
    ) -> None:
        row = len(self.requests)
        params = SamplingParams(max_tokens=max_tokens, scoring=scoring is not None, **more)
        request = Request(row, 0, tuple(prompt), params, 0, scoring=scoring)
        self.requests.append(request)
        self.engine.add(request)

    def step(self) -> None:
        for completion in self.engine.step():
            row = completion.request.row
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
        invariants.check(self.scheduler)
        check_arena(self.arena)

    def verify(self) -> None:
        assert sorted(self.done) == list(range(len(self.requests)))
        for row, completion in self.done.items():
            request = self.requests[row]
            room = MAX_LEN - len(request.prompt_ids)
            if completion.finish_reason is FinishReason.ERROR:
                if completion.error_kind == "bad_parameter":
                    assert request.params.num_beams > self.scheduler.max_num_seqs
                    continue
                assert completion.error_kind in {"prompt_too_long", "kv_budget"}
                need = len(request.prompt_ids) + min(request.params.max_tokens, max(1, room)) - 1
                if request.scoring is not None:
                    need = max(need, request.scoring.span(len(request.prompt_ids))[1] + 1)
                assert need >= MAX_LEN or not self.arena.can_fit(need)
            else:
                assert completion.scores == expected_scores(request)
                length = min(request.params.max_tokens, room)
                if request.params.beams:
                    want = expected_of_beams(request, length, self.eos)
                else:
                    want = expected(request.prompt_ids, length)
                    ends = [i for i, token in enumerate(want, 1) if token in self.eos]
                    want = want[: ends[0] if ends else length]
                assert list(completion.token_ids) == want
                scored_only = completion.finish_reason is FinishReason.SCORED
                assert scored_only == (not request.params.max_tokens)

    def close(self) -> None:
        self.arena.release()
        self.memory.close()


def expected_scores(request: Request) -> Scores | None:
    scoring, end = request.scoring, len(request.prompt_ids)
    if scoring is None:
        return None
    ids = request.prompt_ids + scoring.text_ids
    return (
        tuple(score_of(ids[:i], ids[i]) for i in range(scoring.first, len(ids))),
        tuple(score_of(ids[:end], label) for label in scoring.labels),
    )


class EngineMachine(RuleBasedStateMachine):
    """Any requests, any limits, any order: each row ends once, with the tokens that are its own."""

    rig: Rig

    @initialize(
        seqs=st.integers(1, 6),
        batched=st.integers(1, 40),
        pages=st.one_of(st.none(), st.integers(9, 16)),
        lag=st.integers(0, 2),
        logits=st.sampled_from([0, 0, 1, 7, 40]),
        eos=st.sampled_from([frozenset(), frozenset(range(0, 997, 11))]),
        scored=st.sampled_from([1, 3, 20, 1 << 30]),
    )
    def start(
        self,
        *,
        seqs: int,
        batched: int,
        pages: int | None,
        lag: int,
        logits: int,
        eos: frozenset[int],
        scored: int,
    ) -> None:
        proposer = None
        if logits:
            table = AnswerTable(bits=6)  # entries are in each other's way
            proposer = Speculator(
                *(logits, Costs(), None, table, Oracle), overlap=lag > 0, rate=1.0
            )
        limits = {"seqs": seqs, "batched": batched, "pages": pages, "scored": scored}
        self.rig = Rig(**limits, lag=lag, eos=eos, proposer=proposer)  # type: ignore[arg-type]

    @rule(
        common=st.integers(0, 40),
        own=st.integers(1, 9),
        text=st.integers(0, 15),
        whole=st.booleans(),
        labels=st.sampled_from([(), (5,), (8, 3)]),
        max_tokens=st.sampled_from([0, 0, 1, 9]),
        rows=st.integers(1, 3),
    )
    def add_scored(
        self,
        *,
        common: int,
        own: int,
        text: int,
        whole: bool,
        labels: tuple[int, ...],
        max_tokens: int,
        rows: int,
    ) -> None:
        """Rows that begin alike and are scored: a text, a whole prompt, labels; some also go on."""
        for _ in range(rows):
            number = len(self.rig.requests)
            prompt = [*range(common), *range(number, number + own)]
            first = 1 if whole else len(prompt)
            scoring = Scoring(() if whole else tuple(range(text)), first, labels)
            self.rig.add(prompt, max_tokens, scoring)

    @rule(
        length=st.integers(1, MAX_LEN + 3), first=st.integers(0, 900), max_tokens=st.integers(1, 40)
    )
    def add(self, length: int, first: int, max_tokens: int) -> None:
        self.rig.add([(first + i) % 997 for i in range(length)], max_tokens)

    @rule(
        family=st.integers(0, 2),
        common=st.integers(15, 50),
        own=st.integers(0, 9),
        max_tokens=st.integers(1, 30),
        rows=st.integers(1, 4),
    )
    def add_family(self, family: int, common: int, own: int, max_tokens: int, rows: int) -> None:
        """Rows that begin alike, with each other and with other families of the same number."""
        for row in range(rows):
            prompt = [*range(family, family + common), *range(500 + row, 500 + row + own)]
            self.rig.add(prompt, max_tokens)

    @rule(
        length=st.integers(1, 50),
        max_tokens=st.integers(1, 40),
        rows=st.integers(1, 3),
        search=st.fixed_dictionaries(
            {
                "num_beams": st.integers(2, 5),
                "length_penalty": st.sampled_from([-1.0, 0.5, 1.0, 2.0]),
                "early_stopping": st.sampled_from([False, True, "never"]),
            }
        ),
    )
    def add_beams(self, length: int, max_tokens: int, rows: int, search: dict[str, Any]) -> None:
        for row in range(rows):
            self.rig.add([*range(row // 2, length), row], max_tokens, **search)

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
TestEngine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


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
    kinds = [rig.done[i].error_kind for i in range(5)]
    assert kinds == [None, "prompt_too_long", "kv_budget", "kv_budget", None]
    assert "59" not in rig.done[1].error
    assert f"{MAX_LEN} tokens" in rig.done[1].error
    assert "--kv-budget" in rig.done[3].error


def test_each_step_stays_within_the_token_budget(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=6, batched=7, pages=None)
    for i in range(6):
        rig.add(list(range(i, i + 20)), 9)
    largest = 0
    plan = rig.scheduler.plan

    def spy():  # type: ignore[no-untyped-def]
        nonlocal largest
        made = plan()
        largest = max(largest, sum(s.length for s in made.segments))
        return made

    rig.scheduler.plan = spy
    rig.drain()
    rig.verify()
    assert largest == 7


def prefilled(rig: Rig) -> int:
    return rig.engine.stats.prefill_tokens


@pytest.mark.parametrize("lag", [0, 1])
def test_a_common_prefix_is_computed_once(make_rig, lag):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=4, batched=16, pages=None, lag=lag)
    for row in range(12):
        rig.add([*range(48), 100 + row, 200 + row], 5)
    rig.drain()
    rig.verify()
    assert prefilled(rig) == 48 + 12 * 2
    assert rig.scheduler.stays.num_shared_tokens == 11 * 48
    # By three of four rows, in 4 steps of 3 rounds: 12 parts of 4 tokens.
    assert rig.engine.executor.num_shared_parts == 3 * 4 * 3 * 12


def test_a_prefix_of_a_prefix_is_shared_too(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=8, batched=64, pages=None)
    for row in range(12):
        document = [row % 3] * 20
        rig.add([*range(20), *document, 300 + row], 5)
    rig.drain()
    rig.verify()
    assert prefilled(rig) == 20 + 3 * 20 + 12


def test_samples_of_a_row_compute_its_prompt_once(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=8, batched=64, pages=None)
    for _ in range(8):
        rig.add(list(range(48)), 6)
    rig.drain()
    rig.verify()
    assert prefilled(rig) == 48 + 7  # each computes the last token itself: its logits are wanted


def test_rows_that_begin_alike_are_admitted_together(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=1, batched=64, pages=None)
    for row in range(12):
        rig.add([*range(row % 3, row % 3 + 30), 100 + row], 5)
    order = []
    rig.engine.on_admit = lambda request: order.append(request.row % 3)
    rig.drain()
    assert order == [0] * 4 + [1] * 4 + [2] * 4


def test_a_prefix_is_kept_for_rows_to_come_and_given_up_for_memory(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=1, batched=64, pages=10)
    rig.add([*range(40), 900], 3)
    rig.add([*range(40), 901], 3)
    while not rig.done:
        rig.step()
    assert rig.arena.held_tokens(next(iter(rig.scheduler._prefixes._kept))) >= 32
    rig.drain()
    assert prefilled(rig) == 42
    assert not rig.scheduler._prefixes._kept
    rig.add([*range(32), 900], 3)
    rig.add([7] * 30, 30)
    rig.add([*range(32), 901], 3)
    rig.drain()
    rig.verify()


def test_an_idle_engine_gives_its_memory_back_and_takes_it_again(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=4, batched=64, pages=None)
    for _ in range(2):
        for row in range(6):
            rig.add([*range(40), row], 5)
        rig.step()
        assert rig.arena.pool.created > 0
        rig.drain()
        assert rig.arena.pool.created == 0
    rig.verify()


def test_nothing_is_shared_where_it_is_switched_off(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=4, batched=64, pages=None, share=False)
    for row in range(4):
        rig.add([*range(40), row], 5)
    rig.drain()
    rig.verify()
    assert (prefilled(rig), rig.scheduler.stays.num_shared_tokens) == (4 * 41, 0)


def test_more_than_memory_holds_recomputes_little(make_rig):  # type: ignore[no-untyped-def]
    rig = make_rig(seqs=24, batched=64, pages=60)
    for first in range(0, 600, 10):
        rig.add([first, first + 1], 20 + first // 20)
    rig.drain()
    rig.verify()
    stats = rig.engine.stats
    assert 0 < stats.recomputed_tokens < 0.15 * (stats.prefill_tokens + stats.decode_tokens)
