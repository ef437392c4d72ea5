"""Any job over the slow device gives what it gives elsewhere, and breaks no rule of the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batchrun.engine.core import Request, SamplingParams, Segment
from batchrun.engine.model.hook import HOOK, set_attention
from batchrun.engine.scores import Scoring
from tests.allocator.invariants import check_arena
from tests.engine import invariants
from tests.parity import runner, test_beams
from tests.parity.runner import outputs, run
from tests.parity.test_generate import MAX_TOKENS, families, loaded, wanted_of_families
from tests.parity.test_out_of_memory import failing
from tests.slow_device.shapes import Shape, shapes

FEWER = 3 if os.environ.get("BATCHRUN_TEST_MEMORY") == "fake-cuda" else 1
LEAST = 100  # tokens of memory for the longest row, of whose pages some hold less than others


@st.composite
def rows(draw: st.DrawFn, most: int) -> list[tuple[int, int]]:
    """Prompts by number, in any order, and how many tokens are wanted after each."""
    numbers = st.integers(0, len(families()) - 1)
    wanted = st.sampled_from([1, 1, 3, MAX_TOKENS])
    return draw(st.lists(st.tuples(numbers, wanted), min_size=1, max_size=most))


@settings(max_examples=60 // FEWER, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows(14), shapes(LEAST), st.lists(st.integers(1, 12), max_size=2))
@example([(9, 14)], Shape(tokens=LEAST, chunk=3, sequences=1, graphs=True), [])  # the longest
def test_any_job_equals_generate(
    job: list[tuple[int, int]], shape: Shape, lives: list[int]
) -> None:
    """In one life of the engine or in several: what was generated in one, the next goes on with."""
    model, want = loaded("llama"), wanted_of_families("llama")
    answers = dict(zip(map(tuple, families()), want, strict=True))
    params = [SamplingParams(max_tokens=count) for _, count in job]
    done: dict[int, list[int]] = {}
    begun: dict[int, tuple[int, ...]] = {}
    for steps in (*lives, 10_000):
        with shape.rig(model, answers) as r:
            for row, (number, _) in enumerate(job):
                if row not in done:
                    prompt = tuple(families()[number])
                    r.engine.add(Request(row, 0, prompt, params[row], 0, begun.get(row, ())))
            while r.engine.has_work and (steps := steps - 1) >= 0:
                for completion in r.engine.step():
                    done[completion.request.row] = list(completion.token_ids)
                invariants.check(r.scheduler)
                check_arena(r.arena)
            begun = {left.row: left.generated_ids for left in r.engine.partials()}
    for row, (number, count) in enumerate(job):
        assert done[row] == want[number][:count]


@cache
def log_softmax_of(number: int) -> torch.Tensor:
    """The model's own log-probabilities after each token of a prompt, `[T, V]`."""
    model = loaded("llama").model
    set_attention(model, "eager")
    try:
        with torch.inference_mode():
            return model(torch.tensor([families()[number]])).logits[0].log_softmax(-1)
    finally:
        set_attention(model, HOOK)


@settings(max_examples=40 // FEWER, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows(12), shapes(LEAST), st.integers(1, 40), st.integers(1, 30))
def test_known_text_has_its_scores(
    job: list[tuple[int, int]], shape: Shape, most: int, share: int
) -> None:
    """The ends of prompts, scored behind their beginnings; some rows then go on to generate."""
    model, want, done = loaded("llama"), wanted_of_families("llama"), {}
    answers = dict(zip(map(tuple, families()), want, strict=True))
    with shape.rig(model, answers) as r:
        r.scheduler.max_scored_tokens = most
        for row, (number, count) in enumerate(job):
            ids = tuple(families()[number])
            cut = max(1, len(ids) * share // 30) if row % 3 else len(ids)
            scoring = Scoring(ids[cut:], 1 if row % 3 == 0 else cut, (5, 6) if row % 2 else ())
            tokens = count if cut == len(ids) and row % 2 else 0
            params = SamplingParams(max_tokens=tokens, scoring=True)
            r.engine.add(Request(row, 0, ids[:cut], params, 0, scoring=scoring))
        while r.engine.has_work:
            for completion in r.engine.step():
                done[completion.request.row] = completion
            invariants.check(r.scheduler)
            check_arena(r.arena)
    for row, (number, _) in enumerate(job):
        request, scores = done[row].request, done[row].scores
        ids, logprobs = families()[number], log_softmax_of(number)
        first, end = request.scoring.first, len(request.prompt_ids)
        own = [logprobs[i - 1, ids[i]].item() for i in range(first, len(ids))]
        assert scores[0] == pytest.approx(own, abs=1e-3)
        labels = [logprobs[end - 1, label].item() for label in request.scoring.labels]
        assert scores[1] == pytest.approx(labels, abs=1e-3)
        assert list(done[row].token_ids) == want[number][: request.params.max_tokens]


@cache
def beams_elsewhere() -> list[list[int]]:
    everything = [test_beams.params(row) for row in range(len(test_beams.prompts()))]
    with runner.rig(test_beams.loaded("llama")) as r:
        return outputs(run(r, test_beams.prompts(), everything, seed=3))


@settings(max_examples=20 // FEWER, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sets(st.integers(0, 25), min_size=1, max_size=8), shapes(170, least_sequences=4))
@example({1, 17, 21, 24}, Shape(chunk=33, sequences=4, layers_per_slab=1))  # copy after copy
def test_beams_and_draws_are_the_same(chosen: set[int], shape: Shape) -> None:
    prompts, done = test_beams.prompts(), {}
    answers = dict(zip(map(tuple, prompts), beams_elsewhere(), strict=True))
    with shape.rig(test_beams.loaded("llama"), answers) as r:
        for row in chosen:
            r.engine.add(Request(row, 0, tuple(prompts[row]), test_beams.params(row), 3))
        while r.engine.has_work:
            for completion in r.engine.step():
                done[completion.request.row] = list(completion.token_ids)
            invariants.check(r.scheduler)
            check_arena(r.arena)
    assert done == {row: beams_elsewhere()[row] for row in chosen}


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_shapes_come_to_what_they_are_for(graphs: bool, drafts: bool) -> None:
    """Rows are preempted, computed again, and share what they have in common; graphs run."""
    shape = Shape(tokens=190, greedy=True, graphs=graphs, drafts=drafts)
    answers = dict(zip(map(tuple, families()), wanted_of_families("llama"), strict=True))
    with shape.rig(loaded("llama"), answers) as r:
        done = run(r, families(), SamplingParams(max_tokens=MAX_TOKENS))
        assert r.scheduler.num_preemptions > 0
        assert r.scheduler.stays.num_shared_tokens > 400
        stats = r.engine.stats
        assert stats.recomputed_tokens > 0
        if drafts:
            assert 0 < stats.accepted_tokens < stats.drafted_tokens
        else:
            assert not stats.drafted_tokens
    assert outputs(done) == wanted_of_families("llama")


@pytest.mark.parametrize("place", ["_forward", "sample"])
def test_what_a_step_without_memory_gives_back_no_other_step_uses(place: str) -> None:
    """It is not over itself, and the one before it may run until then."""
    with Shape(tokens=200, greedy=True).rig(loaded("llama")) as r:
        owner = r.executor if place == "_forward" else r.executor.sampler
        every_third = (i % 3 == 0 for i in range(1000))
        setattr(owner, place, failing(getattr(owner, place), every_third))
        unmapped = r.arena.usage().work["unmap"].calls
        done = run(r, families(), SamplingParams(max_tokens=MAX_TOKENS))
        assert r.arena.usage().work["unmap"].calls > unmapped
    assert outputs(done) == wanted_of_families("llama")


@pytest.mark.parametrize("most_reread", [0, 1 << 20])
def test_steps_with_draft_tokens_are_recorded_ones(most_reread: int) -> None:
    """As single tokens; as prompts are, where too many keys would be read again."""
    answers = dict(zip(map(tuple, families()), wanted_of_families("llama"), strict=True))
    replayed = 0
    with Shape(graphs=True, drafts=True, sequences=3).rig(loaded("llama"), answers) as r:
        graphs = r.executor.graphs
        assert graphs is not None
        graphs._most_reread = most_reread
        fitting = graphs.fitting

        def counted(segments: Sequence[Segment]) -> Sequence[Segment] | None:
            nonlocal replayed
            found = fitting(segments)
            replayed += found is not None and len(found) > len(segments)
            return found

        graphs.fitting = counted  # type: ignore[method-assign]
        done = run(r, families(), SamplingParams(max_tokens=MAX_TOKENS))
        assert r.engine.stats.accepted_tokens > 50
    assert outputs(done) == wanted_of_families("llama")
    assert (replayed > 10) == bool(most_reread)
