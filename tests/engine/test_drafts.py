"""Guesses of tokens to come: which, how many, and that they change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.engine.core import Request, SamplingParams, Segment
from batchrun.engine.core import Sequence as Row
from batchrun.engine.drafts import LONGEST, Drafts, Lookup
from tests.engine.echo import Oracle
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
        lookup.guess(most)
        sequence.output_ids.append(token)
    assert lookup.guess(most) == reference([*prompt, *output], most)


def test_trust_follows_what_was_right() -> None:
    sequence = row([1, 2, 3, 4, 5, 6, 7, 8] * 9)
    lookup = Lookup(sequence)
    trusted = []
    for number in range(5):
        guess = lookup.guess(max(1, lookup.trust))
        sequence.output_ids += guess if number < 4 else [*guess[:5], 99]
        lookup.settle()
        lookup.settle()  # again, of a step without a guess: nothing new is known
        trusted.append(lookup.trust)
    assert trusted == [1, 3, 7, 15, 5]
    assert lookup.guess(3) == []
    lookup.settle()
    assert lookup.trust == 5


def segments(*rows: Row) -> list[Segment]:
    found = []
    for slot, each in enumerate(rows):
        each.slot = slot
        last = each.num_known_tokens - 1
        found.append(Segment(slot, last, 1, True, each.token_ids(last, 1), key=slot))
    return found


def test_what_costs_nothing_is_shared_out_and_the_rest_is_for_those_trusted() -> None:
    given_: list[tuple[int, int]] = []

    def ensure(slot: int, num_tokens: int) -> bool:
        given_.append((slot, num_tokens))
        return slot != 1

    rows = [row([1, 2] * 5, max_tokens=40) for _ in range(4)]
    plan = segments(*rows)
    Drafts(100, 16).extend(plan, dict(enumerate(rows)), 100, 1000, ensure)
    # Of 16 tokens 12 are free: 3 each, and what the one without memory leaves.
    assert [len(s.drafts) for s in plan] == [3, 0, 4, 5]
    assert [s.length for s in plan] == [4, 1, 5, 6]
    assert plan[0].drafts == (1, 2, 1)
    assert given_ == [(0, 13), (1, 13), (2, 14), (3, 15)]
    assert sum(s.length for s in plan) == 16
    for each in rows:
        assert each.lookup is not None
        each.lookup.trust = LONGEST
    for logits, budget, wanted in ((100, 100, 15), (24, 100, 5), (100, 8, 2), (4, 100, 0)):
        plan = segments(*rows)
        Drafts(logits, 16).extend(plan, dict(enumerate(rows)), budget, 1000, lambda *_: True)
        assert [len(s.drafts) for s in plan] == [wanted] * 4


def test_no_guess_goes_beyond_a_rows_end() -> None:
    short, full = row([1, 2] * 3, max_tokens=3), row([1, 2] * 5)
    last, penalised = row([1, 2] * 5, max_tokens=1), row([1, 2] * 5, presence_penalty=0.5)
    rows = [short, full, last, penalised]
    plan = segments(*rows)
    Drafts(100, 16).extend(plan, dict(enumerate(rows)), 100, 12, lambda *_: True)
    assert [len(s.drafts) for s in plan] == [2, 1, 0, 0]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(seqs=4, batched=64, pages=None, drafts=Drafts(64, 16, Oracle))
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
