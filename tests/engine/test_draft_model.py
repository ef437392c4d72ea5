"""Draft tokens of a second model: right where it says the same, and never in an answer if not."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from batchrun.allocator.arena import KVArena
from batchrun.engine.build import Assembly
from batchrun.engine.core import Completion, FinishReason, Request, SamplingParams
from batchrun.engine.core import Sequence as Row
from batchrun.engine.executor import Ticket
from batchrun.engine.model import loading
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.plan import StepPlan
from batchrun.engine.speculation.lookup import Lookup
from batchrun.engine.speculation.model import ModelDrafts
from batchrun.engine.speculation.speculator import Speculator
from batchrun.grammars.constraint import constraint_of
from tests.allocator.invariants import check_arena
from tests.engine import invariants
from tests.engine.echo import Costs
from tests.parity import runner
from tests.tiny import edit_weights, write_tiny_model

TEXTS = ["one", "another prompt, somewhat longer", "{", "x" * 40, "one, two, three, four"]
SCHEMA = '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "narrow": {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    "shaped": {"temperature": 1.0, "constraint": constraint_of("json_schema", SCHEMA)},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def tiny(
    dtype: str = "float32", seed: int = 7, copy: int = 0, noise: float = 0.0, **sizes: int
) -> LoadedModel:
    """A model; another `copy` is a model of its own, with the same weights if there's no noise."""
    folder = write_tiny_model(Path(mkdtemp()), seed=seed, **sizes)

    def wider(weights: dict[str, Any]) -> dict[str, Any]:
        every = {n: w * (4 if w.dim() > 1 else 1) for n, w in weights.items()}
        return {n: w + noise * w.std() * torch.randn_like(w) for n, w in every.items()}

    edit_weights(folder, wider)
    return loading.load(str(folder), name="tiny", dtype=dtype)


@cache
def nearly(dtype: str = "float32") -> LoadedModel:
    """A draft model that is right about as often as it is wrong."""
    return tiny(dtype, noise=0.03)


@cache
def other(dtype: str = "float32") -> LoadedModel:
    """A smaller draft model, which knows nothing."""
    return tiny(dtype, 8, layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)


class Nothing(Lookup):
    """Nothing but the draft model guesses."""

    def find(self, most: int) -> list[int]:
        return []


@contextmanager
def rig(
    dtype: str = "float32",
    draft: LoadedModel | None = None,
    model: LoadedModel | None = None,
    **settings: Any,
) -> Iterator[Assembly]:
    """An engine whose draft model costs nothing, so that it is always asked."""
    defaults = {"attention": "native", "optimize": True, "draft_model": "small", "draft_tokens": 3}
    with runner.rig(model or tiny(dtype), draft=draft, **{**defaults, **settings}) as made:
        asked = made.scheduler.stays.proposer
        if isinstance(asked, Speculator) and asked._model is not None:
            asked.cost, asked._make, asked._table = Costs(0, draft=1e-9), Nothing, None
            asked._model.model.cost = lambda *_: 0.0  # type: ignore[method-assign]
        yield made


def rows(count: int = 8, samples: int = 1, begin: str = "", **params: Any) -> list[Request]:
    """Rows of different lengths."""
    rng, found = random.Random(3), []
    for row in range(count):
        ids = tuple(tiny().tokenizer(begin + TEXTS[row % len(TEXTS)] + str(row))["input_ids"])
        most = rng.choice([5, 20, 40])
        own = SamplingParams(**{"max_tokens": most, "ignore_eos": True, **params})
        found += [Request(row, sample, ids, own, 11) for sample in range(samples)]
    return found


def compute(r: Assembly, wanted: Sequence[Request], most_steps: int = 1 << 30) -> list[Completion]:
    """The completions so far, in order; what must hold between steps is checked."""
    done: dict[tuple[int, int], Completion] = {}
    for request in wanted:
        r.engine.add(request)
    while r.engine.has_work and most_steps:
        for completion in r.engine.step():
            done[completion.request.row, completion.request.sample] = completion
        invariants.check(r.scheduler)
        check_arena(r.arena)
        most_steps -= 1
    return [done[key] for q in wanted if (key := (q.row, q.sample)) in done]


def seen(completions: Sequence[Completion]) -> list[Any]:
    return [(c.token_ids, c.text, c.finish_reason, c.logprobs, c.error) for c in completions]


def alone(wanted: Sequence[Request], dtype: str = "float32") -> list[Any]:
    """What the model says without draft tokens."""
    with rig(dtype, drafts=False) as r:
        return seen(compute(r, wanted))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in PARAMS), ("greedy", "bfloat16"), ("narrow", "bfloat16")],
)
def test_answers_are_those_of_the_model_alone(name: str, dtype: str) -> None:
    wanted = rows(logprobs=1, **PARAMS[name])
    want, right = alone(wanted, dtype), []
    for draft in (tiny(dtype, copy=1), nearly(dtype), other(dtype)):
        with rig(dtype, draft) as r:
            assert seen(compute(r, wanted)) == want
            stats = r.engine.stats
        right.append(stats.accepted_tokens / stats.drafted_tokens)
    assert right[0] == 1  # a model that is its own draft model
    assert 1 > right[1] > right[2]


Guess = tuple[Request, tuple[int, ...]]  # a row with its answer so far, and its draft tokens


@pytest.fixture
def guesses(monkeypatch: pytest.MonkeyPatch) -> list[Guess]:
    """What draft models guess, though not in every step, and not all of it is used."""
    found: list[Guess] = []
    guess, turns = ModelDrafts.guess, cycle(["all", "none", "all", "one"])

    def noted(self: ModelDrafts, wanted: Sequence[tuple[Row, int]]) -> list[tuple[int, ...]]:
        turn = next(turns) if wanted else "none"
        if turn == "none":
            return [()] * len(wanted)
        drafts = guess(self, wanted)
        so_far = [replace(s.request, generated_ids=tuple(s.output_ids)) for s, _ in wanted]
        found.extend(zip(so_far, drafts, strict=True))
        return drafts if turn == "all" else [ids[:1] for ids in drafts]

    monkeypatch.setattr(ModelDrafts, "guess", noted)
    return found


def check_guesses(guesses: Sequence[Guess], draft: LoadedModel) -> None:
    """Draft tokens must be what the draft model itself would say after what is known."""
    every = [guess for guess in guesses if guess[1]]
    some = random.Random(1).sample(every, min(len(every), 12))
    with rig(model=draft, drafts=False) as r:
        for begun, drafts in some:
            [done] = compute(r, [begun])
            assert done.token_ids[len(begun.generated_ids) :][: len(drafts)] == drafts


@pytest.mark.parametrize(
    "settings", [{"max_num_batched_tokens": 16}, {"max_num_seqs": 2, "layers_per_slab": 99}]
)
def test_chunks_and_common_prefixes_cost_the_draft_model_nothing(
    guesses: list[Guess], settings: dict[str, int]
) -> None:
    wanted = rows(4, samples=2, begin="What begins alike is computed once, " * 2, temperature=1.0)
    with rig(draft=nearly(), **settings) as r:
        assert seen(compute(r, wanted)) == alone(wanted)
        assert r.engine.stats.accepted_tokens > 0
        assert r.scheduler.stays.num_shared_tokens > 0
    check_guesses(guesses, nearly())


def test_what_a_row_shares_need_not_be_known_to_the_draft_model(guesses: list[Guess]) -> None:
    first, second = rows(2, begin="What begins alike is computed once, " * 2, temperature=1.0)
    # Without draft tokens of its own: the draft model has not seen what the second row takes.
    first = replace(first, params=replace(first.params, repetition_penalty=1.1))
    second = replace(second, prompt_ids=first.prompt_ids)
    with rig(draft=nearly()) as r:
        compute(r, [first, second])
        assert r.scheduler.stays.num_shared_tokens == len(first.prompt_ids) - 1
    check_guesses(guesses, nearly())


def test_memory_that_runs_out_costs_draft_tokens_and_no_answer(
    guesses: list[Guess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVArena, "has_room", lambda *_: True)  # admit whatever fits now
    wanted = rows(temperature=1.0)
    with rig(draft=nearly()) as r:
        budget = r.arena.layout.total_pages_for(60) * r.arena.layout.page_bytes * 2
    with rig(draft=nearly(), kv_budget=budget) as r:
        proposer = r.scheduler.stays.proposer
        assert isinstance(proposer, Speculator)
        assert proposer._model is not None
        ensure, turns = r.arena.ensure, cycle([True, True, False])  # who refuses when depends
        proposer._model.model._ensure = lambda *slot: next(turns) and ensure(*slot)
        assert seen(compute(r, wanted)) == alone(wanted)
        assert r.scheduler.num_preemptions > 0
        assert r.engine.stats.accepted_tokens > 0
        assert r.arena.usage().live == 0
    check_guesses(guesses, nearly())


def test_a_job_goes_on_with_another_draft_model_or_none() -> None:
    wanted = left = rows(temperature=1.0)
    done: dict[int, Any] = {}
    for draft in (nearly(), None, other(), tiny(copy=1), None):
        with rig(draft=draft) as r:
            ended = compute(r, left, 3 if draft is not None or len(done) < 2 else 1 << 30)
            done |= {c.request.row: c for c in ended}
            begun = {q.row: q for q in r.engine.partials()}
        left = [begun.get(q.row, q) for q in wanted if q.row not in done]
    with rig() as r:
        done |= {c.request.row: c for c in compute(r, left)}
    assert [c.token_ids for _, c in sorted(done.items())] == [ids for ids, *_ in alone(wanted)]


def test_stop_strings_end_an_answer_among_draft_tokens() -> None:
    wanted = rows(temperature=1.0, stop=("a", "1", "Q", "}"), ignore_eos=False, max_tokens=40)
    want = alone(wanted)
    assert {reason for _, _, reason, *_ in want} == set(FinishReason) - {"scored", "error"}
    for draft in (tiny(copy=1), nearly()):
        with rig(draft=draft) as r:
            assert seen(compute(r, wanted)) == want


def test_a_draft_model_reads_no_further_than_it_can() -> None:
    wanted, short = rows(), tiny(copy=1, max_position_embeddings=30)
    with rig(draft=short) as r:
        assert r.drafter is not None
        launch, ends = r.drafter.launch, []

        def watched(plan: StepPlan) -> Ticket:
            ends.extend(segment.end for segment in plan.segments)
            return launch(plan)

        r.drafter.launch = watched  # type: ignore[method-assign]
        assert seen(compute(r, wanted)) == alone(wanted)
        stats = r.engine.stats
    assert max(ends) == 30
    assert stats.accepted_tokens == stats.drafted_tokens > 0


def test_tokens_that_only_one_model_knows_are_not_drafted() -> None:
    wanted = rows(temperature=1.0)
    for size in (240, 300):  # of 259
        with rig(draft=tiny(vocab_size=size)) as r:
            assert seen(compute(r, wanted)) == alone(wanted)
            assert r.engine.stats.drafted_tokens > 0


def test_a_tokens_memory_is_that_of_both_models() -> None:
    with rig() as r, rig(draft=other()) as both, rig(draft=tiny(copy=1)) as twice:
        own = r.arena.layout.bytes_per_token
        assert twice.arena.layout.bytes_per_token == 2 * own
        assert twice.arena.layout.planes == 2 * r.arena.layout.planes
        assert own < both.arena.layout.bytes_per_token < 2 * own
        assert len(both.arena.layout.layers) == len(tiny().layers) + 1
        weights = [made.measurements()["weights_bytes"] for made in (r, both, twice)]
        assert weights[2] == 2 * weights[0] > weights[1] > weights[0]
