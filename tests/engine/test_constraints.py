"""Constrained answers: they fit, and they are the same tokens however they are computed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchrun.engine.build import Assembly
from batchrun.engine.constraints import Constraints, _allows
from batchrun.engine.core import Completion, FinishReason, Request, SamplingParams
from batchrun.engine.model import loading
from batchrun.engine.model.prepare import LoadedModel
from batchrun.grammars.constraint import constraint_of, problem
from tests.engine import invariants
from tests.grammars.walks import allowed, errors, matchers, schemas, tokenizer
from tests.parity import runner
from tests.parity.test_generate import bytes_per_token
from tests.slow_device.shapes import Shape
from tests.tiny import write_tiny_model

FEWER = 3 if os.environ.get("BATCHRUN_TEST_MEMORY") == "fake-cuda" else 1
PROMPTS = ["one", "another prompt, somewhat longer", "one more", "{", "x" * 40]
Shaped = tuple[str, Any]  # a shape and its value


@cache
def tiny() -> LoadedModel:
    folder = write_tiny_model(Path(mkdtemp()))
    return loading.load(
        str(folder),
        name="tiny",
        dtype="float32",
        quantize=None,
        device="cpu",
        trust_remote_code=False,
        max_model_len=None,
    )


def rig(**more: Any) -> AbstractContextManager[Assembly]:
    return runner.rig(tiny(), **{"attention": "auto", **more})


def fits(shape: Shaped, text: str) -> bool:
    name, value = shape
    if name == "json_schema":
        return errors(value, text) == []
    if name == "json_object":
        return isinstance(json.loads(text), dict)
    if name == "regex":
        return re.fullmatch(value, text) is not None
    return text in value


def made(shape: Shaped) -> str | None:
    name, value = shape
    try:
        found = constraint_of(name, json.dumps(value) if name == "json_schema" else value)
    except ValueError:
        return None
    return found if problem(found) is None else None


REGEXES = st.sampled_from(
    ["[0-9]{3}", "(ab|cd)+e", r"[a-c]{1,5}, [A-Z]", "yes|no", r"(\d\d:)+x", "", "é+"]
)
CHOICES = st.sampled_from(
    [("yes", "no", "maybe not"), ("a", "ab", "abc"), ("é", "ü"), ("one, two", "\n")]
)
SHAPES = st.one_of(
    schemas().map(lambda schema: ("json_schema", schema)),
    st.just(("json_object", True)),
    REGEXES.map(lambda regex: ("regex", regex)),
    CHOICES.map(lambda choices: ("choices", choices)),
)


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[Request, Shaped | None]]:
    """Rows, of which most are constrained."""
    found = []
    for row in range(draw(st.integers(1, 5))):
        shape = draw(SHAPES) if draw(st.integers(0, 4)) else None
        constraint = made(shape) if shape is not None else None
        params = SamplingParams(
            max_tokens=draw(st.sampled_from([3, 20, 90])),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            top_k=draw(st.sampled_from([0, 5])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.2])),
            logprobs=draw(st.sampled_from([None, 2])),
            constraint=constraint,
        )
        prompt = tiny().tokenizer(PROMPTS[row])["input_ids"]
        request = Request(row, 0, tuple(prompt), params, draw(st.integers(0, 9)))
        found.append((request, shape if constraint else None))
    return found


def run(r: Assembly, wanted: Sequence[Request]) -> list[Completion]:
    done: dict[int, Completion] = {}
    for request in wanted:
        r.engine.add(request)
    while r.engine.has_work:
        for completion in r.engine.step():
            done[completion.request.row] = completion
        invariants.check(r.scheduler)
    return [done[request.row] for request in wanted]


def alone(wanted: Sequence[Request]) -> list[Completion]:
    """The completions, one row at a time and one token a step, each chosen under its mask."""
    with rig(max_num_seqs=1, drafts=False, share_prefixes=False) as r:
        r.executor.on_host = False
        return [done for request in wanted for done in run(r, [request])]


def seen(completion: Completion) -> tuple[Any, ...]:
    logprobs = tuple((round(own, 3)) for own, _ in completion.logprobs)
    return completion.token_ids, completion.text, completion.finish_reason, logprobs


@settings(max_examples=30 // FEWER, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests(), st.sampled_from([None, 40]), st.sampled_from([3, 17, 256]))
def test_answers_fit_and_are_the_same_with_guesses_in_any_batch(
    rows: list[tuple[Request, Shaped | None]], tokens: int | None, chunk: int
) -> None:
    wanted = [request for request, _ in rows]
    want = alone(wanted)
    for done, (_, shape) in zip(want, rows, strict=True):
        assert done.error is None
        if shape is not None and done.finish_reason is FinishReason.STOP:
            assert done.text is not None
            assert fits(shape, done.text), (shape, done.text)
    budget = None if tokens is None else max(160, tokens) * bytes_per_token(tiny())
    with rig(max_num_batched_tokens=chunk, kv_budget=budget) as r:
        found = run(r, wanted)
    assert list(map(seen, found)) == list(map(seen, want))


@settings(max_examples=30 // FEWER, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests(), st.booleans(), st.booleans(), st.integers(3, 60), st.integers(0, 9))
def test_on_a_device_that_computes_by_itself(
    rows: list[tuple[Request, Shaped | None]], graphs: bool, drafts: bool, chunk: int, seed: int
) -> None:
    """A step's masks need all tokens before it; the device computes its logits meanwhile."""
    wanted = [request for request, _ in rows]
    want = alone(wanted)
    shape = Shape(graphs=graphs, drafts=drafts, chunk=chunk, seed=seed, early=0.1)
    with shape.rig(tiny()) as r:
        found = run(r, wanted)
    assert list(map(seen, found)) == list(map(seen, want))


@settings(max_examples=20 // FEWER, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests(), st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_an_answer_goes_on_where_it_stopped(
    rows: list[tuple[Request, Shaped | None]], lives: list[int]
) -> None:
    wanted = [request for request, _ in rows]
    want = alone(wanted)
    done: dict[int, Completion] = {}
    left = {request.row: request for request in wanted}
    for steps in (*lives, 10_000):
        with rig() as r:
            for request in left.values():
                r.engine.add(request)
            while r.engine.has_work and (steps := steps - 1) >= 0:
                for completion in r.engine.step():
                    done[completion.request.row] = completion
                    del left[completion.request.row]
            left |= {request.row: request for request in r.engine.partials()}
    assert [seen(done[row]) for row in sorted(done)] == list(map(seen, want))


RECORD = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Bob"]},
        "a_long_property_name": {"type": "boolean"},
        "third": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["name", "a_long_property_name", "third"],
}


@settings(max_examples=100 // FEWER, deadline=None, suppress_health_check=list(HealthCheck))
@given(SHAPES, st.randoms(use_true_random=False))
def test_a_token_is_allowed_just_where_a_mask_says_so(shape: Shaped, rng: Any) -> None:
    """Tokens chosen without masks are checked alone: no answer may differ by that."""
    constraint = made(shape)
    if constraint is None:
        return
    found, masked = matchers().start(constraint), matchers().start(constraint)
    for _ in range(30):
        if found.is_stopped() or found.is_error():
            break
        tokens = allowed(masked)
        assert tokens
        assert [token for token in range(len(tokenizer())) if _allows(found, token)] == tokens
        token = rng.choice(tokens)
        assert (found.consume_token(token), masked.consume_token(token)) == (True, True)
    assert (found.is_stopped(), found.is_error()) == (masked.is_stopped(), masked.is_error())


def masks_for(
    rows: Sequence[Request], *, on_host: bool, drafts: bool = False
) -> tuple[list[Completion], int]:
    """The completions, and how many masks were computed for them."""
    count, masks_of = 0, Constraints.masks_of

    def counted(self: Constraints, wanted: Any) -> Any:
        nonlocal count
        count += sum(matcher is not None for matcher in wanted)
        return masks_of(self, wanted)

    with rig(drafts=drafts) as r, patch.object(Constraints, "masks_of", counted):
        r.executor.on_host = on_host
        return run(r, rows), count


@pytest.mark.parametrize("drafts", [True, False])
def test_masks_are_computed_only_where_a_likely_token_is_not_allowed(drafts: bool) -> None:
    constraint = made(("json_schema", RECORD))
    rows = [asking(constraint, row) for row in range(3)] + [asking(None, 3, max_tokens=9)]
    rows.append(asking(made(("regex", "(.|\\n)*x")), 4))
    found, fewer = masks_for(rows, on_host=True, drafts=drafts)
    want, count = masks_for(rows, on_host=False, drafts=drafts)
    assert list(map(seen, found)) == list(map(seen, want))
    assert 0 < fewer < count


def test_a_token_that_is_drawn_takes_a_mask() -> None:
    request = asking(made(("regex", r"(.|\n)*")), temperature=1.0, ignore_eos=True)
    (done,), count = masks_for([request], on_host=True)
    assert count == len(done.token_ids)


def asking(constraint: str | None, row: int = 0, **params: Any) -> Request:
    given = SamplingParams(**{"max_tokens": 120, "constraint": constraint, **params})
    return Request(row, 0, tuple(tiny().tokenizer("one")["input_ids"]), given, 0)


def test_forced_tokens_take_no_steps_and_no_logits() -> None:
    constraint = made(("json_schema", RECORD))
    with rig() as r:
        chosen = r.executor.sampler.prepare
        places = list[int]()

        def counted(segments: Any) -> Any:
            found = chosen(segments)
            places.extend(row.end for row in found)
            return found

        r.executor.sampler.prepare = counted  # type: ignore[method-assign]
        (done,) = run(r, [asking(constraint)])
        forced, stats = r.engine.stats.forced_tokens, r.engine.stats
        assert forced > 40
        assert len(places) == len(set(places)) + stats.drafted_tokens - stats.accepted_tokens
        assert len(set(places)) == len(done.token_ids) - forced
        assert stats.decode_tokens < len(done.token_ids)  # what ends it is not even computed
        steps = stats.steps
    with rig(drafts=False) as r:
        (plain,) = run(r, [asking(constraint)])
        assert (plain.token_ids, r.engine.stats.forced_tokens) == (done.token_ids, 0)
        assert steps < r.engine.stats.steps / 4
    assert done.text is not None
    assert errors(RECORD, done.text) == []


def test_where_log_probabilities_are_wanted_forced_tokens_are_drafts() -> None:
    constraint = made(("json_schema", RECORD))
    with rig() as r:
        (done,) = run(r, [asking(constraint, scored=True)])
        assert (r.engine.stats.forced_tokens, len(done.token_ids) > 50) == (0, True)
        assert r.engine.stats.accepted_tokens > 40
        assert r.engine.stats.steps < len(done.token_ids) / 3


@pytest.mark.parametrize(
    ("constraint", "params"),
    [
        (("regex", "a{40}"), {"max_tokens": 7}),
        (("regex", "a{20}(b|c)d{20}"), {"stop": ("dd",)}),
        (("regex", "a{20}(b|c)d{20}"), {"stop": ("aab", "aac"), "min_tokens": 30}),
        (("regex", "(b|c)d{20}"), {"stop_token_ids": (None,)}),
        (("choices", ("abcabcabc", "abcabcabd")), {}),
        (("choices", ("abcabcabc",)), {"repetition_penalty": 1.5}),
        (("regex", "(ab|cd){3}xyz"), {"temperature": 1.5}),
    ],
)
@pytest.mark.parametrize("lag", [0, 1])
def test_an_answer_may_end_within_what_is_forced(
    constraint: Shaped, params: dict[str, Any], lag: int
) -> None:
    if "stop_token_ids" in params:
        params = {"stop_token_ids": (tiny().tokenizer.convert_tokens_to_ids("d"),)}
    rows = [asking(made(constraint), row, **params) for row in range(3)]
    rows.append(asking(None, 3, max_tokens=15))
    want = alone(rows)
    with Shape(drafts=True).rig(tiny()) if lag else rig() as r:
        assert list(map(seen, run(r, rows))) == list(map(seen, want))
        assert (r.engine.stats.forced_tokens > 0) == ("repetition_penalty" not in params)


@pytest.mark.parametrize("graphs", [False, True])
def test_forced_tokens_save_steps_on_a_device_that_computes_by_itself(graphs: bool) -> None:
    """Beside a row without a shape, which takes as long as ever."""
    rows = [asking(made(("json_schema", RECORD))), asking(None, 1, max_tokens=60)]
    found, steps = [], []
    for drafts in (False, True):
        with Shape(graphs=graphs, drafts=drafts).rig(tiny()) as r:
            ended, replayed = [], 0
            if graphs:
                fitting = r.executor.graphs.fitting

                def counted(segments: Any, fitting: Any = fitting) -> Any:
                    nonlocal replayed
                    singles = fitting(segments)
                    replayed += singles is not None and len(singles) > len(segments)
                    return singles

                r.executor.graphs.fitting = counted
            for request in rows:
                r.engine.add(request)
            while r.engine.has_work:
                for completion in r.engine.step():
                    ended.append((completion.request.row, completion.token_ids))
                    steps.append(r.engine.stats.steps)
            found.append(dict(ended))
            assert (r.engine.stats.forced_tokens > 30) == drafts
            assert (replayed > 2) == (graphs and drafts)  # a short prompt is, too
    assert found[0] == found[1]
    assert min(steps[2:]) < max(steps[:2]) / 3
    assert max(steps[2:]) <= 65


def test_an_answer_ends_as_soon_as_nothing_can_follow() -> None:
    """Without an end token, which would take a step of its own."""
    with rig() as r:
        (done,) = run(r, [asking(made(("regex", "[ab]{3}")))])
    assert (len(done.token_ids), done.finish_reason) == (3, FinishReason.STOP)


@pytest.mark.parametrize(
    "params",
    [
        {"min_tokens": 50},
        {"ignore_eos": True},
        {"min_tokens": 50, "temperature": 1.0, "logprobs": 1},
    ],
)
def test_a_shape_wins_over_bans(params: dict[str, Any]) -> None:
    """An end token is banned, and nothing else may come."""
    with rig() as r:
        found = run(r, [asking(made(("regex", "(ab)*c?")), **params)])
        assert found[0].error is None
        ended = run(r, [asking(made(("choices", ("no", "nope"))), **params)])
        assert ended[0].text in {"no", "nope"}


def test_a_grammar_that_ends_nowhere_is_an_error_in_its_row() -> None:
    grammar = 'start: "a" start'
    with rig() as r:
        done, other = run(r, [asking(grammar), asking(None, 1, max_tokens=5)])
    assert (done.error_kind, other.error) == ("constraint", None)
    assert "shape" in str(done.error)


def test_nothing_is_kept_of_rows_that_have_ended() -> None:
    with rig() as r:
        run(r, [asking(made(("json_schema", RECORD)), row) for row in range(4)])
        assert r._constraints._held == {}


def test_log_probabilities_are_those_of_the_model_itself() -> None:
    """Of the tokens that a shape forces, too."""
    with rig() as r:
        (forced,) = run(r, [asking(made(("choices", ("xyz",))), logprobs=0, scored=True)])
        assert forced.text == "xyz"
        ids = [*forced.request.prompt_ids, *forced.token_ids]
        import torch  # noqa: PLC0415

        from batchrun.engine.model.hook import set_attention  # noqa: PLC0415

        set_attention(tiny().model, "eager")
        with torch.inference_mode():
            logits = tiny().model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    at = len(forced.request.prompt_ids) - 1
    want = [logits[at + i, token].item() for i, token in enumerate(forced.token_ids)]
    assert [own for own, _ in forced.logprobs] == pytest.approx(want, abs=1e-3)
    assert forced.logprob == pytest.approx(sum(want), abs=1e-3)
