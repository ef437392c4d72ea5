"""Rows with different contexts have nothing in common, though their prompts are equal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from batchrun.engine import prefixes
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.prefixes import BLOCK, blocks_of
from batchrun.estimate.savings import Savings
from batchrun.jobs.journal.results import CopiedResult, Result
from batchrun.runner.duplicates import Duplicates
from batchrun.runner.planner import Planner, Waiting, common_blocks
from tests.engine.test_scheduler import Rig

PROMPT = tuple(range(3, 3 + 2 * BLOCK + 5))
CONTEXTS = ((), ("adapter", "a"), ("adapter", "b"))


def asked(row: int, context: tuple[str, ...], max_tokens: int = 4) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(row, 0, PROMPT, params, 0, context=context)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(seqs=8, batched=64, pages=None)
    yield made
    made.close()


def shared(rig: Rig, contexts: list[tuple[str, ...]]) -> int:
    """Tokens that rows with one prompt share."""
    for context in contexts:
        request = asked(len(rig.requests), context)
        rig.requests.append(request)
        rig.engine.add(request)
    rig.drain()
    rig.verify()
    return rig.scheduler.stays.num_shared_tokens


def test_memory_is_shared_within_a_context(rig: Rig) -> None:
    assert shared(rig, [*CONTEXTS]) == 0
    assert 3 * 2 * BLOCK <= shared(rig, [*CONTEXTS] * 2) <= 6 * len(PROMPT)


def test_a_hash_of_the_context_is_not_believed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "blocks_of", lambda ids, namespace: blocks_of(ids, namespace=b""))
    assert shared(rig, [*CONTEXTS]) == 0


def test_answers_are_copied_within_a_context() -> None:
    known = Duplicates(1)
    for row, context in enumerate(CONTEXTS):
        assert known.claim(Waiting.of(asked(row, context))) is True
    for row, context in enumerate(CONTEXTS):
        assert known.claim(Waiting.of(asked(row + 10, context))) is False
        result = Result(row, 0, "ok", "text", (1, 2), "stop", 9, 2)
        assert [each.row for each in known.settle(asked(row, context), result)] == [row + 10]
        found = known.claim(Waiting.of(asked(row + 20, context)))
        assert isinstance(found, CopiedResult)
        assert known.claim(Waiting.of(asked(row + 30, (*context, "more")))) is True


def test_a_plan_leaves_each_context_once() -> None:
    rows = [Waiting.of(asked(row, CONTEXTS[row % 3])) for row in range(30)]
    planned = [w.rest.context for w in Planner().planned(rows, lambda: False)]
    changes = sum(a != b for a, b in pairwise(planned))
    assert changes == 2
    assert common_blocks(rows[0].identity, rows[1].identity) == 0
    assert all(row.request() == asked(i, CONTEXTS[i % 3]) for i, row in enumerate(rows))


def test_savings_count_what_a_context_shares() -> None:
    def computed(contexts: list[tuple[str, ...]]) -> int:
        savings = Savings(4, 64, share=True)
        for row, context in enumerate(contexts):
            savings.read(Waiting.of(asked(row, context)), 4)
        return savings._file.prompt_tokens

    assert computed([CONTEXTS[1]] * 2) == computed([()] * 2) == 2 * len(PROMPT) - 2 * BLOCK
    assert computed([*CONTEXTS]) == 3 * len(PROMPT)
