"""Guesses of tokens to come: which, how many, and that they change nothing."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.engine.core import Request, SamplingParams, Segment
from batchrun.engine.core import Sequence as Row
from batchrun.engine.plan import StepPlan
from batchrun.engine.speculation.chances import Chances
from batchrun.engine.speculation.cost import StepCost
from batchrun.engine.speculation.lookup import Lookup
from batchrun.engine.speculation.proposers import DraftBatch, add_drafts
from batchrun.engine.speculation.speculator import Guess, Speculator, worthwhile
from batchrun.engine.speculation.table import AnswerTable
from tests.engine.echo import VOCAB, Costs, Oracle
from tests.engine.test_scheduler import MAX_LEN, Rig


def row(prompt: Sequence[int], *, context: tuple[str, ...] = (), **params: object) -> Row:
    return Row(Request(0, 0, tuple(prompt), SamplingParams(**params), 0, context=context))  # type: ignore[arg-type]


def reference(ids: list[int], most: int) -> list[int]:
    """Token by token, where `Lookup` searches bytes."""
    for length in (3, 2):
        tail = ids[-length:]
        for at in range(len(ids) - length - 1, -1, -1):
            if len(ids) > length and ids[at : at + length] == tail:
                found = list(ids)
                for i in range(at + length, at + length + most):
                    found.append(found[i])
                return found[len(ids) :]
    return []


# Ids whose bytes are others' bytes too, one or two further on.
_IDS = st.sampled_from([0, 1, 256, 65536, 1 << 24, 257, 65537])


@given(
    st.lists(_IDS, min_size=1, max_size=40),
    st.lists(_IDS, max_size=20),
    st.lists(_IDS, max_size=4),
    st.integers(1, 15),
)
def test_what_followed_the_last_tokens_is_guessed(
    prompt: list[int], output: list[int], more: list[int], most: int
) -> None:
    sequence = row(prompt)
    lookup = Lookup(sequence)
    for token in output:  # it reads what is new only
        lookup.find(most, more)
        sequence.output_ids.append(token)
    assert lookup.find(most, more) == reference([*prompt, *output, *more], most)


def test_the_table_has_what_followed_most_reliably() -> None:
    table = AnswerTable(bits=12)
    for _ in range(9):
        table.learn(1, [1, 2, 3, 4, 5], 0)
    table.learn(1, [9, 9, 9, 4, 6], 0)
    assert table.find(1, [1, 2, 3, 4]) == [(5, 4, 4), (5, 2, 4), (5, 1, 3)]
    assert table.find(1, [8, 9, 9, 4]) == [(6, 2, 1), (5, 1, 3)]
    assert table.find(1, [8, 9, 9, 8]) == []
    assert table.find(2, [1, 2, 3, 4]) == []
    assert table.find(1, [4]) == [(5, 1, 3)]
    assert table.find(1, []) == []


def test_the_table_takes_no_more_memory_for_more_answers() -> None:
    table, numbers = AnswerTable(bits=8), random.Random(0)
    size = table.nbytes
    for _ in range(200):
        table.learn(0, [numbers.randrange(50_000) for _ in range(20)], 0)
    assert table.nbytes == size == 9 << 8
    for _ in range(9):  # what comes again and again has a place all the same
        table.learn(0, [1, 2, 3], 0)
    assert (3, 2) in [found[:2] for found in table.find(0, [1, 2])]


def test_a_chance_is_that_of_the_last_ones() -> None:
    chances = Chances()
    assert chances.of("new") == 0.5
    for number in range(20_000):
        chances.note("kind", right=number % 4 > 0)
    assert chances.of("kind") == pytest.approx(0.75, abs=0.01)
    for _ in range(3_000):
        chances.note("kind", right=False)
    assert chances.of("kind") < 0.02


def step(rows: int, drafts: int, others: int, attended: int) -> list[Segment]:
    each = [drafts // rows + (i < drafts % rows) for i in range(rows)]
    made = [Segment(i, attended // rows, 1 + n, True, (), n) for i, n in enumerate(each)]
    return [*made, Segment(rows, 0, others, False)] if others else made


def test_what_a_step_costs_is_found_out_from_steps() -> None:
    """In spite of noise, and after the machine has become slower."""
    numbers, cost = random.Random(1), StepCost(8)
    assert cost.of(50, 5000) == (1.0, 1 / 50)  # it is not known yet
    for factor in (1.0, 3.0):
        for _ in range(150):
            rows, drafts = numbers.randint(80, 96), numbers.randint(0, 200)
            others, attended = numbers.choice([0, 0, 100, 800]), 100 * rows
            seconds = 0.02 + 0.0004 * rows + 0.0002 * (drafts + others) + 1e-6 * attended
            plan = step(rows, drafts, others, attended)
            cost.observe(plan, factor * seconds * numbers.uniform(0.9, 1.1))
        whole, draft = cost.of(90, 9000)
        assert whole == pytest.approx(factor * (0.02 + 0.036 + 0.009), rel=0.15)
        assert draft == pytest.approx(factor * 0.0002, rel=0.3)


def test_what_was_never_tried_is_tried() -> None:
    """Steps without draft tokens tell little of what they would cost."""
    cost = StepCost(8)
    for _ in range(100):
        cost.observe(step(96, 0, 0, 9600), 0.06)
    whole, draft = cost.of(96, 9600)
    assert whole == pytest.approx(0.06, rel=0.1)
    assert 0 < draft < 0.7 * whole / 96


def guess(*chances: float, forced: int = 0) -> Guess:
    count = forced + len(chances)
    return Guess(list(range(count)), [None] * count, [1.0] * forced + list(chances), forced)


def brute_force(
    guesses: list[Guess], seconds: float, draft: float, *, free: int, places: int
) -> float:
    """The most tokens a second, by the number of the likeliest draft tokens."""
    chances = sorted((c for g in guesses for c in g.chances), reverse=True)
    return max(
        (len(guesses) + sum(chances[:count])) / (seconds + draft * max(0, count - free))
        for count in range(min(len(chances), places) + 1)
    )


@given(
    st.lists(st.lists(st.floats(0.05, 1), max_size=6), min_size=1, max_size=6),
    st.floats(0.001, 0.3),
    st.integers(0, 8),
    st.integers(0, 20),
)
def test_as_many_as_pay(each: list[list[float]], draft: float, free: int, places: int) -> None:
    guesses = [guess(*sorted(chances, reverse=True)) for chances in each]
    limits = {"free": free, "places": places}
    rows = len(guesses)
    taken = worthwhile(guesses, 1.0, draft, rows=rows, **limits)
    assert sum(taken) <= places
    assert all(0 <= n <= len(g.chances) for n, g in zip(taken, guesses, strict=True))
    expected = len(guesses) + sum(sum(g.chances[:n]) for n, g in zip(taken, guesses, strict=True))
    rate = expected / (1.0 + draft * max(0, sum(taken) - free))
    assert rate == pytest.approx(brute_force(guesses, 1.0, draft, **limits))


def test_what_is_forced_comes_first() -> None:
    guesses = [guess(0.9, 0.1), guess(0.9, 0.3, forced=3), guess(forced=4)]
    assert worthwhile(guesses, 1.0, 0.1, free=0, places=100, rows=3) == [1, 4, 4]
    assert worthwhile(guesses, 1.0, 0.1, free=0, places=5, rows=3) == [0, 3, 2]
    assert worthwhile(guesses, 1.0, 9.0, free=0, places=100, rows=3) == [0, 3, 4]
    assert worthwhile(guesses, 1.0, 9.0, free=9, places=100, rows=3) == [1, 4, 4]


def segments(*rows: Row) -> list[Segment]:
    found = []
    for slot, each in enumerate(rows):
        each.slot = slot
        last = each.num_known_tokens - 1
        found.append(Segment(slot, last, 1, True, each.token_ids(last, 1), key=slot))
    return found


def extend(proposer: Speculator, plan: list[Segment], rows: list[Row], **limits: Any) -> None:
    limits = {"budget": 100, "max_model_len": 1000, "ensure": lambda *_: True, **limits}
    for each in rows:
        if each not in proposer._rows:
            proposer.open(each)
    add_drafts(proposer, plan, rows, **limits)


def test_no_guess_goes_beyond_what_memory_logits_and_the_step_hold() -> None:
    given_: list[tuple[int, int]] = []

    def ensure(slot: int, num_tokens: int) -> bool:
        given_.append((slot, num_tokens))
        return slot != 1

    rows = [row([1, 2] * 5, max_tokens=40) for _ in range(4)]
    plan = segments(*rows)
    proposer = Speculator(100, Costs(draft=0.0))
    extend(proposer, plan, rows, ensure=ensure)
    assert [s.slot for s in plan] == [1, 0, 2, 3]  # single tokens are in front
    drafts = [len(s.drafts) for s in plan]
    assert drafts[0] == 0 < min(drafts[1:]) - 1
    assert [s.length for s in plan] == [1 + n for n in drafts]
    assert plan[1].drafts[:3] == (1, 2, 1)
    assert given_ == [(i, 10 + max(drafts)) for i in range(4)]
    for logits, budget, wanted in ((100, 9, 9), (10, 100, 6), (4, 100, 0), (2, 100, 0)):
        plan = segments(*rows)
        proposer.num_logits = logits
        extend(proposer, plan, rows, budget=budget)
        assert sum(len(s.drafts) for s in plan) == wanted


def test_no_guess_goes_beyond_a_rows_end() -> None:
    short, full = row([1, 2] * 3, max_tokens=3), row([1, 2] * 5)
    last, penalised = row([1, 2] * 5, max_tokens=1), row([1, 2] * 5, presence_penalty=0.5)
    rows = [short, full, last, penalised]
    plan = segments(*rows)
    extend(Speculator(100, Costs(draft=0.0)), plan, rows, max_model_len=12)
    assert {s.slot: len(s.drafts) for s in plan} == {0: 2, 1: 1, 2: 0, 3: 0}


@pytest.mark.parametrize("context", [(), ("adapter",)])
def test_what_one_row_answered_is_guessed_for_others_like_it(context: tuple[str, ...]) -> None:
    answer = list(range(100, 140))
    proposer = Speculator(100, Costs(draft=0.001), table=AnswerTable(bits=12))
    for number in range(4):
        first = row([number, 50, 60], max_tokens=100)
        proposer.open(first)
        for token in answer:
            first.output_ids.append(token)
            proposer.settle([first])
        proposer.close(first)
    other = row([77, 50, 60], max_tokens=100, context=context)
    other.output_ids += answer[:3]
    most = 0
    for _ in range(6):  # it trusts what turns out right
        plan = segments(other)
        extend(proposer, plan, [other])
        found = list(plan[0].drafts)
        if context:
            assert not found
        at = other.output_ids.index(other.output_ids[-1])
        other.output_ids += answer[at + 1 : at + 2 + len(found)]
        proposer.settle([other])
        assert found == answer[at + 1 : at + 1 + len(found)]
        most = max(most, len(found))
    assert bool(most > 3) == (not context)


def test_answers_of_an_earlier_run_are_guessed_too() -> None:
    proposer = Speculator(100, Costs(draft=0.001), table=AnswerTable(bits=12))
    for _ in range(3):
        proposer.learn((), None, [5, 6, 7, 8, 9])
        proposer.learn((), "a schema", [5, 6, 1, 2, 3])
    other = row([3, 4, 5, 6])
    plan = segments(other)
    extend(proposer, plan, [other])
    assert plan[0].drafts[:1] == (7,)


def test_wrong_guesses_become_few_and_right_ones_many() -> None:
    lucky, unlucky = row([1, 2] * 8, max_tokens=9000), row([5, 6, 7, 8, 5, 6])
    rows, drafts = [lucky, unlucky], []
    proposer = Speculator(100, Costs(0, draft=0.2))
    for number in range(30):
        for token in (100 + number, 5, 6):  # something else each time
            plan = segments(*rows)
            extend(proposer, plan, rows, max_model_len=9999)
            drafts.append([len(s.drafts) for s in sorted(plan, key=lambda s: s.slot)])
            for _ in range(1 + drafts[-1][0]):
                lucky.output_ids.append(lucky.known_ids[-2])
            unlucky.output_ids.append(token)
            proposer.settle(rows)
    assert drafts[-3][1] == 0
    assert drafts[-1][0] > 8
    assert sum(right for right, _ in drafts) > 4 * sum(wrong for _, wrong in drafts)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(seqs=4, batched=64, pages=None, proposer=Speculator(64, Costs(), lookup=Oracle))
    yield made
    made.close()


def test_guesses_save_steps_and_change_no_token(rig: Rig) -> None:
    for first in (0, 100, 200, 300):
        rig.add([first, first + 1], MAX_LEN - 4)
    rig.drain()
    rig.verify()
    stats = rig.engine.stats
    assert stats.steps < 30
    assert stats.generated_tokens == 4 * (MAX_LEN - 4)
    assert stats.decode_tokens == stats.generated_tokens - 4
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.recomputed_tokens == 0


def test_guesses_behind_a_prompts_last_token_are_counted(rig: Rig) -> None:
    rig.add([1], 30)
    rig.drain()
    stats = rig.engine.stats
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.prefill_tokens + stats.decode_tokens == 30  # each token once, but for the last


def test_a_row_waits_for_guesses_that_were_right_lately() -> None:
    sequence = row([1, 2, 3, 4] * 9, max_tokens=100)
    proposer = Speculator(100, Costs(), overlap=True)
    proposer.open(sequence)
    paid = []
    for number in range(24):
        batch = DraftBatch([], 1, 1, 100, watched=[sequence])
        assert proposer.propose(batch) == []
        sequence.output_ids.append(sequence.known_ids[-4] if number < 12 else 50 + number)
        proposer.settle([sequence])
        paid.append(proposer.pays(sequence))
    assert paid == [False] * 9 + [True] * 6 + [False] * 9
    assert proposer._rows[sequence].rate < 0.2


class Wrong(Lookup):
    """Guesses that are never right."""

    def find(self, most: int, more: Iterable[int] = ()) -> list[int]:
        super().find(most, more)
        return [VOCAB] * most


@pytest.mark.parametrize("lag", [1, 2])
def test_with_steps_in_flight_guesses_save_steps_where_they_are_right(lag: int) -> None:
    def steps(lookup: type[Lookup] | None) -> int:
        proposer = (
            Speculator(64, Costs(64), lookup=lookup, overlap=True, rate=1.0) if lookup else None
        )
        made = Rig(seqs=4, batched=64, pages=None, lag=lag, proposer=proposer)
        for first in (0, 100, 200, 300):
            made.add([first, first + 1], MAX_LEN - 4)
        made.drain()
        made.verify()
        assert made.scheduler.stays.num_recomputed_tokens == 0
        made.close()
        return made.engine.stats.steps

    plain = steps(None)
    assert steps(Wrong) == plain
    assert steps(Oracle) < plain / 2


def test_rows_that_guess_do_so_together_and_others_go_on() -> None:
    def half(sequence: Row) -> Lookup:
        return (Oracle if sequence.request.row % 2 else Wrong)(sequence)

    proposer = Speculator(64, Costs(64), lookup=half, overlap=True, rate=1.0)
    made = Rig(seqs=4, batched=64, pages=None, lag=1, proposer=proposer)
    for first in (0, 100, 200, 300):
        made.add([first, first + 1], 50)
    verified: list[int] = []
    plan = made.scheduler.plan

    def spy() -> StepPlan:
        found = plan()
        owners = made.scheduler.stays.owners(found.segments)
        drafts = {
            s.request.row: each.num_drafts
            for each, s in zip(found.segments, owners, strict=True)
            if s
        }
        if not made.done:
            assert len(verified) < 24 or {0, 2} <= drafts.keys()  # they have tried by then
            verified.append(sum(count > 0 for count in drafts.values()))
        return found

    made.scheduler.plan = spy  # type: ignore[method-assign]
    made.drain()
    made.verify()
    made.close()
    assert set(verified[24:36]) == {0, 2}


class Recording(Speculator):
    """A proposer that has something of each sequence from `open` to `close`, as one with KV has."""

    def __init__(self) -> None:
        super().__init__(64, Costs(), lookup=Oracle)
        self.held: set[Row] = set()
        self.asked = 0

    def open(self, sequence: Row) -> None:
        super().open(sequence)
        assert sequence not in self.held
        assert sequence.slot is not None
        self.held.add(sequence)

    def close(self, sequence: Row) -> None:
        super().close(sequence)
        self.held.remove(sequence)

    def propose(self, batch: DraftBatch) -> list[tuple[int, ...]]:
        self.asked += len(batch.sequences)
        assert {sequence for sequence, _ in batch.sequences} <= self.held
        return super().propose(batch)

    def settle(self, sequences: Iterable[Row]) -> None:
        settled = list(sequences)
        assert set(settled) <= self.held
        super().settle(settled)


@pytest.mark.parametrize("pages", [12, 34])  # too few, and enough for all
def test_a_proposer_is_told_of_the_sequences_that_it_may_be_asked_for(pages: int) -> None:
    proposer = Recording()
    made = Rig(seqs=4, batched=64, pages=pages, proposer=proposer)
    for row in range(12):
        made.add([row, row + 1, row + 2] * 5, 20)
    made.drain()
    made.verify()
    assert bool(made.scheduler.num_preemptions) == (pages == 12)
    assert bool(proposer.asked) == (pages == 34)
    assert not proposer.held
    assert not proposer._rows
    made.close()
