"""Guesses of tokens to come: which, how many, and that they change nothing."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.engine.core import Request, SamplingParams, Segment
from batchrun.engine.core import Sequence as Row
from batchrun.engine.plan import StepPlan
from batchrun.engine.speculation.chances import Chances
from batchrun.engine.speculation.choice import Guess, Prices, worthwhile
from batchrun.engine.speculation.cost import StepCost
from batchrun.engine.speculation.lookup import Lookup
from batchrun.engine.speculation.modelguesses import ModelGuesses
from batchrun.engine.speculation.proposers import DraftBatch, add_drafts
from batchrun.engine.speculation.rest import Rest
from batchrun.engine.speculation.speculator import Speculator
from batchrun.engine.speculation.table import AnswerTable
from tests.engine.echo import VOCAB, Costs, Oracle, next_token
from tests.engine.test_scheduler import MAX_LEN, Rig


class Wrong(Lookup):
    """Guesses that are never right."""

    def find(self, most: int) -> list[int]:
        super().find(most)
        return [VOCAB] * most


def row(prompt: Sequence[int], *, context: tuple[str, ...] = (), **params: object) -> Row:
    return Row(Request(0, 0, tuple(prompt), SamplingParams(**params), 0, context=context))  # type: ignore[arg-type]


def reference(ids: list[int], most: int) -> list[int]:
    """Token by token, where `Lookup` searches bytes."""
    for length in (3, 2, 1):
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
    st.integers(1, 15),
)
def test_what_followed_the_last_tokens_is_guessed(
    prompt: list[int], output: list[int], most: int
) -> None:
    sequence = row(prompt)
    lookup = Lookup(sequence)
    for token in output:  # it reads what is new only
        lookup.find(most)
        sequence.output_ids.append(token)
    assert lookup.find(most) == reference([*prompt, *output], most)


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


def step(rows: int, drafts: int, others: int) -> list[Segment]:
    each = [drafts // rows + (i < drafts % rows) for i in range(rows)]
    made = [Segment(i, 100, 1 + n, True, (), n) for i, n in enumerate(each)]
    return [*made, Segment(rows, 0, others, False)] if others else made


# Milliseconds of a step, a row and another token, as on some CPUs and a GPU.
@pytest.mark.parametrize(
    ("fixed", "row", "token"), [(30, 0.3, 2.3), (14, 0.35, 0.1), (5, 0.01, 0.01)]
)
def test_what_a_step_costs_is_found_out_from_steps(fixed: float, row: float, token: float) -> None:
    """In spite of noise, outliers and a slow first step, and after the machine has slowed down."""
    numbers, cost = random.Random(1), StepCost(8)
    assert cost.of(50) == (1.0, 1 / 50)  # it is not known yet
    cost.observe(step(1, 0, 60), 9000.0)
    for factor in (1.0, 3.0):
        for number in range(200):
            rows, drafts = min(96, 8 + 8 * number), numbers.choice([0, 0, 20, 100])
            others = numbers.choice([0, 0, 0, 100]) if number > 12 else 900
            seconds = fixed + row * rows + token * (rows + drafts + others)
            noise = numbers.uniform(0.95, 1.1) if number % 40 < 39 else 20
            cost.observe(step(rows, drafts, others), factor * seconds * noise)
        whole, draft = cost.of(90)
        assert whole == pytest.approx(factor * (fixed + 90 * (row + token)), rel=0.2)
        assert draft == pytest.approx(factor * token, rel=0.5)


def test_a_draft_token_is_cheap_enough_to_be_tried() -> None:
    cost = StepCost(8)
    for number in range(100):
        others = 900 if number < 10 else 0
        cost.observe(step(96, 0, others), 30 + 0.3 * 96 + 2.3 * (96 + others))
    whole, draft = cost.of(96)
    assert whole == pytest.approx(30 + 2.6 * 96, rel=0.1)
    assert draft == pytest.approx(0.6 * whole / 96)  # 2.3 if any had been tried
    for _ in range(200):  # few rows are left: their tokens' mean cost says nothing of one more
        cost.observe(step(1, 0, 0), 32.6)
    assert cost.of(1) == (pytest.approx(32.6, rel=0.1), pytest.approx(2.4, rel=0.5))


def test_a_draft_token_that_costs_more_than_others_is_found_out_where_all_steps_have_some() -> None:
    numbers, cost = random.Random(1), StepCost(0)
    cost.observe(step(1, 0, 60), 150.0)
    cost.observe(step(28, 0, 150), 28 + 0.6 * 28 + 1.8 * 178)
    for rows in range(32, 8, -1):
        drafts = rows // 2 + numbers.randrange(-4, 4)
        seconds = 28 + 2.4 * (rows + drafts)
        cost.observe(step(rows, drafts, 0), numbers.uniform(0.95, 1.05) * seconds)
    whole, draft = cost.of(10)
    assert whole == pytest.approx(28 + 24, rel=0.1)
    assert draft == pytest.approx(2.4, rel=0.15)


def guess(*chances: float) -> Guess:
    count = len(chances)
    return Guess(list(range(count)), [None] * count, list(chances))


def brute_force(guesses: list[Guess], prices: Prices) -> float:
    """The most tokens a second, by the number of the likeliest draft tokens."""
    chances = sorted((c for g in guesses for c in g.chances), reverse=True)
    return max(
        (len(guesses) + sum(chances[:count])) / (prices.step + prices.spent(count))
        for count in range(min(len(chances), prices.places) + 1)
    )


@given(
    st.lists(st.lists(st.floats(0.05, 1), max_size=6), min_size=1, max_size=6),
    st.floats(0.001, 0.3),
    st.integers(0, 8),
    st.integers(0, 20),
)
def test_as_many_as_pay(each: list[list[float]], draft: float, free: int, places: int) -> None:
    guesses = [guess(*sorted(chances, reverse=True)) for chances in each]
    prices = Prices(1.0, draft, free, places, len(guesses))
    taken, expected = worthwhile(guesses, prices)
    assert sum(taken) <= places
    assert all(0 <= n <= len(g.chances) for n, g in zip(taken, guesses, strict=True))
    right = sum(sum(g.chances[:n]) for n, g in zip(taken, guesses, strict=True))
    assert expected == pytest.approx(len(guesses) + right)
    rate = expected / (prices.step + prices.spent(sum(taken)))
    assert rate == pytest.approx(brute_force(guesses, prices))


def test_what_hardly_pays_is_left() -> None:
    guesses = [guess(0.9, 0.4), guess(0.55)]
    assert worthwhile(guesses, Prices(1.0, 0.25, 0, 100, 2))[0] == [1, 0]
    assert worthwhile(guesses, Prices(1.0, 0.2, 0, 100, 2))[0] == [1, 1]
    assert worthwhile(guesses, Prices(1.0, 0.2, 0, 100, 2, margin=1.5))[0] == [1, 0]


def test_guesses_that_come_less_often_than_hoped_must_pay_more() -> None:
    proposer = Speculator(100, Costs(draft=0.001), rate=1.0)
    margins = []
    for _ in range(60):
        each = row([1, 2, 3, 1, 2], max_tokens=90)
        plan = segments(each)
        extend(proposer, plan, [each])
        each.output_ids.append(7)  # where 3 was guessed
        proposer.settle([each])
        proposer.close(each)
        margins.append(proposer._hoped / proposer._came)
    assert margins[0] < 1.2 < margins[-1]


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


def test_what_loses_time_rests_for_longer_and_longer() -> None:
    rest, saved = Rest(), 0.0

    def runs(steps: int, gain: float) -> list[int]:
        """For how many steps it guesses and rests, in turn."""
        nonlocal saved
        found = []
        for _ in range(steps):
            found.append(rest.rests(8, saved))
            saved += 0.0 if found[-1] else gain
        return [len(list(each)) for _, each in groupby(found)]

    assert runs(16 + 16 + 16 + 32 + 16 + 64 + 16 + 64, -0.1) == [16, 16, 16, 32, 16, 64, 16, 64]
    assert runs(160, 0.1) == [160]
    assert runs(16 + 16, -0.1) == [16, 16]


def test_as_the_batch_drains_guesses_are_tried_again() -> None:
    rest = Rest()
    assert [rest.rests(8, -float(i)) for i in range(17)] == [False] * 16 + [True]
    assert rest.rests(5, -17.0)
    assert not rest.rests(4, -17.0)
    assert not rest.is_resting


@pytest.mark.parametrize("overlap", [False, True])
def test_where_guesses_lose_time_few_rows_are_looked_at_until_they_are_right(overlap: bool) -> None:
    looked = 0

    class Looking(Wrong):
        def find(self, most: int) -> list[int]:
            nonlocal looked
            looked += 1
            return super().find(most)

    rows = [row([1, 2], max_tokens=900) for _ in range(40)]
    proposer = Speculator(100, Costs(0, draft=0.01), lookup=Looking, overlap=overlap)
    for sequence in rows:
        proposer.open(sequence)
    for number in range(300):
        proposer.propose(DraftBatch([(sequence, 100) for sequence in rows], 40, 40, 100))
        for sequence in rows:
            sequence.output_ids.append(3 if number < 200 else VOCAB)
        proposer.settle(rows)
        if number == 199:
            assert looked == 200 * 40 if overlap else looked < 100 * 40
            looked = 0
    assert looked > 85 * 40  # as soon as they are right


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


class Drafter:
    """A draft model that is always right, or never; each of its steps takes so many seconds."""

    def __init__(self, seconds: float, *, right: bool = True) -> None:
        self.seconds, self.right = seconds, right
        self.asked: list[int] = []
        self.open = self.close = self.settle = lambda *_: None

    def cost(self, sequences: Sequence[Row], step: float) -> float:
        return self.seconds * step

    def guess(self, wanted: Sequence[tuple[Row, int]]) -> list[tuple[int, ...]]:
        self.asked.append(max(count for _, count in wanted))
        found = []
        for sequence, count in wanted:
            ids = list(sequence.known_ids)
            for _ in range(count):
                ids.append(next_token(ids) + (not self.right))
            found.append(tuple(ids[len(ids) - count :]))
        return found


@pytest.mark.parametrize(
    ("seconds", "right", "most", "asked"),
    [(0.1, True, None, 15), (0.1, True, 3, 3), (0.1, False, None, 0), (2.0, True, None, 0)],
)
def test_a_draft_model_is_asked_while_that_pays(
    seconds: float, right: bool, most: int | None, asked: int
) -> None:
    drafter = Drafter(seconds, right=right)
    proposer = Speculator(64, Costs(0, draft=0.01), model=drafter, num_tokens=most)
    made = Rig(seqs=2, batched=64, pages=None, proposer=proposer)
    for row in range(6):
        made.add([row, 7, 9], 120)
    made.drain()
    made.verify()
    assert not proposer._rows
    made.close()
    assert max(drafter.asked[-9:], default=0) == asked or (not right and len(drafter.asked) < 30)
    stats = made.engine.stats
    assert bool(stats.accepted_tokens) == (right and seconds < 1)
    if asked == 15:
        assert stats.steps < 6 * 120 / 2 / 8


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


class Model:
    """A draft model that is never right, and costs a tenth of a step."""

    asked = 0

    def cost(self, sequences: list[Row], step: float) -> float:
        return step / 10

    def guess(self, wanted: list[tuple[Row, int]]) -> list[tuple[int, ...]]:
        self.asked += 1
        return [(0,) * count for _, count in wanted]


def test_a_draft_model_that_was_wrong_is_tried_again_much_later() -> None:
    model, chances = Model(), Chances()
    made = ModelGuesses(model, chances, 4)  # type: ignore[arg-type]
    sequence, prices = row([1, 2, 3]), Prices(1.0, 0.01, 0, 64, 1)
    when = []
    for step in range(2500):
        guess = Guess()
        before = model.asked
        made.improve([(sequence, 8, guess)], prices)
        if model.asked > before:
            when.append(step)
            chances.note(guess.kinds[0], right=False)
    assert len([step for step in when if step < 100]) > 3
    assert [step for step in when if step > 100] == [when[-2], when[-1]]
    assert when[-1] - when[-2] == 1001
