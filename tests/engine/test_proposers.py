"""Guesses of tokens to come: which, how many, and that they change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.engine.core import Request, SamplingParams, Segment
from batchrun.engine.core import Sequence as Row
from batchrun.engine.plan import StepPlan
from batchrun.engine.speculation.lookup import LONGEST, Lookup, PromptLookup
from batchrun.engine.speculation.proposers import DraftBatch, add_drafts
from tests.engine.echo import VOCAB, Oracle
from tests.engine.test_scheduler import MAX_LEN, Rig


def row(prompt: Sequence[int], **params: object) -> Row:
    return Row(Request(0, 0, tuple(prompt), SamplingParams(**params), 0))  # type: ignore[arg-type]


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


@given(st.lists(_IDS, min_size=1, max_size=40), st.lists(_IDS, max_size=20), st.integers(1, 15))
def test_what_followed_the_last_tokens_is_guessed(
    prompt: list[int], output: list[int], most: int
) -> None:
    sequence = row(prompt)
    lookup = Lookup(sequence)
    for token in output:  # it reads what is new only
        lookup.draft(most)
        sequence.output_ids.append(token)
    assert lookup.draft(most) == reference([*prompt, *output], most)


def test_trust_follows_what_was_right() -> None:
    sequence = row([1, 2, 3, 4, 5, 6, 7, 8] * 9)
    lookup = Lookup(sequence)
    trusted = []
    for number in range(5):
        guess = lookup.draft(max(1, lookup.trust))
        sequence.output_ids += guess if number < 4 else [*guess[:5], 99]
        lookup.settle()
        lookup.settle()  # again, of a step without a guess: nothing new is known
        trusted.append(lookup.trust)
    assert trusted == [1, 3, 7, 15, 5]
    assert lookup.draft(3) == []
    lookup.settle()
    assert lookup.trust == 5


def test_a_rate_follows_what_was_right() -> None:
    sequence = row([1, 2, 3, 4] * 9, max_tokens=100)
    proposer = PromptLookup(100, 16)
    paid = []
    for number in range(24):
        batch = DraftBatch([], 1, 1, 100, watched=[sequence])
        assert proposer.propose(batch) == []
        sequence.output_ids.append(sequence.known_ids[-4] if number < 12 else 50 + number)
        proposer.settle([sequence])
        paid.append(proposer.pays(sequence))
    assert paid == [False] * 9 + [True] * 6 + [False] * 9
    assert proposer.lookups[sequence].rate < 0.2


def segments(*rows: Row) -> list[Segment]:
    found = []
    for slot, each in enumerate(rows):
        each.slot = slot
        last = each.num_known_tokens - 1
        found.append(Segment(slot, last, 1, True, each.token_ids(last, 1), key=slot))
    return found


def extend(proposer: PromptLookup, plan: list[Segment], rows: list[Row], **limits: Any) -> None:
    limits = {"budget": 100, "max_model_len": 1000, "ensure": lambda *_: True, **limits}
    add_drafts(proposer, plan, rows, **limits)


def test_what_costs_nothing_is_shared_out_and_the_rest_is_for_those_trusted() -> None:
    given_: list[tuple[int, int]] = []

    def ensure(slot: int, num_tokens: int) -> bool:
        given_.append((slot, num_tokens))
        return slot != 1

    rows = [row([1, 2] * 5, max_tokens=40) for _ in range(4)]
    plan = segments(*rows)
    proposer = PromptLookup(100, 16)
    extend(proposer, plan, rows, ensure=ensure)
    # Of 16 tokens 12 are free: 3 each, but for the one without memory.
    assert [(s.slot, s.drafts) for s in plan] == [(1, ()), *((i, (1, 2, 1)) for i in (0, 2, 3))]
    assert [s.length for s in plan] == [1, 4, 4, 4]
    assert given_ == [(0, 13), (1, 13), (2, 13), (3, 13)]
    for each in rows:
        proposer.lookups[each].trust = LONGEST
    for logits, budget, wanted in ((100, 100, 15), (24, 100, 5), (100, 8, 2), (4, 100, 0)):
        plan = segments(*rows)
        proposer.num_logits = logits
        extend(proposer, plan, rows, budget=budget)
        assert [len(s.drafts) for s in plan] == [wanted] * 4


def test_no_guess_goes_beyond_a_rows_end() -> None:
    short, full = row([1, 2] * 3, max_tokens=3), row([1, 2] * 5)
    last, penalised = row([1, 2] * 5, max_tokens=1), row([1, 2] * 5, presence_penalty=0.5)
    rows = [short, full, last, penalised]
    plan = segments(*rows)
    extend(PromptLookup(100, 16), plan, rows, max_model_len=12)
    assert {s.slot: len(s.drafts) for s in plan} == {0: 2, 1: 1, 2: 0, 3: 0}


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(seqs=4, batched=64, pages=None, proposer=PromptLookup(64, 16, Oracle))
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


class Wrong(Lookup):
    """Guesses that are never right."""

    def draft(self, most: int) -> list[int]:
        super().draft(most)
        self._drafts = [VOCAB] * most
        return self._drafts


@pytest.mark.parametrize("lag", [1, 2])
def test_with_steps_in_flight_guesses_save_steps_where_they_are_right(lag: int) -> None:
    def steps(lookup: type[Lookup] | None) -> int:
        proposer = PromptLookup(64, 64, lookup) if lookup else None
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
    class Half(Oracle):
        def __init__(self, sequence: Row) -> None:
            super().__init__(sequence)
            self.rate = float(sequence.request.row % 2)

        def settle(self) -> bool:
            return True

    made = Rig(seqs=4, batched=64, pages=None, lag=1, proposer=PromptLookup(64, 64, Half))
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
            assert {0, 2} <= drafts.keys()
            verified.append(sum(count > 0 for count in drafts.values()))
        return found

    made.scheduler.plan = spy  # type: ignore[method-assign]
    made.drain()
    made.verify()
    made.close()
    assert set(verified[4:12]) == {0, 2}


class Recording(PromptLookup):
    """A proposer that has something of each sequence from `open` to `close`, as one with KV has."""

    def __init__(self) -> None:
        super().__init__(64, 16, Oracle)
        self.held: set[Row] = set()
        self.asked = 0

    def open(self, sequence: Row) -> None:
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
    assert not proposer.lookups
    made.close()
