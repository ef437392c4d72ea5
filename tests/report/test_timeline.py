"""Figures over time: runs lie one after the other, and thinning loses neither sum nor peak."""

import json
import random

import pytest

from batchrun.report.timeline import AMOUNTS, RATES, timeline
from tests.report.pages import figures


def ran(number, samples, **stats):
    return {"id": number, "stats": {**(samples[-1] if samples else {}), **stats}}


def of(*runs, points=240):
    """The timeline of runs with these samples."""
    told = [ran(i, samples) for i, samples in enumerate(runs, 1)]
    found = timeline(told, lambda number: list(runs[number - 1]), points)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for run in found["runs"]:
        assert len({len(run[name]) for name in ("at", "completions", *RATES, *AMOUNTS)}) == 1
        assert run["at"] == sorted(run["at"])
    return found


def computed(run, name):
    spans = [late - early for early, late in zip(run["at"], run["at"][1:], strict=False)]
    return sum(rate * span for rate, span in zip(run[name][1:], spans, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 50, 2000])
@pytest.mark.parametrize("points", [1, 7, 240])
def test_what_was_computed_is_the_area_under_the_rates(count, points):
    drawn = random.Random(count)
    samples, at, tokens = [], 1.0, 0
    for _ in range(count):
        at, tokens = at + drawn.choice((2.0, 2.5, 9.0)), tokens + drawn.randrange(400)
        samples.append(figures(at, engine_s=at - 1, generated_tokens=tokens, steps=tokens // 7))
    [run] = of(samples, points=points)["runs"]
    assert computed(run, "generated_per_s") == pytest.approx(tokens, rel=0.01, abs=1)
    assert computed(run, "steps_per_s") == pytest.approx(tokens // 7, rel=0.01, abs=1)
    assert len(run["at"]) <= points + 2


def test_no_peak_is_lost():
    samples = [figures(2.0 * i, running=i % 97, kv_mapped=(i == 700) * 123) for i in range(1, 1500)]
    [run] = of(samples, points=20)["runs"]
    assert max(filter(None, run["running"])) == 96
    assert max(filter(None, run["kv_mapped"])) == 123


def test_runs_lie_one_after_the_other_without_the_time_between():
    one = [figures(2.0 * i, completions=i) for i in range(1, 6)]
    two = [figures(2.0 * i, completions=2 * i) for i in range(1, 4)]
    found = of(one, [], two)
    assert found["seconds"] == 16.0
    assert [(run["run"], run["begin"]) for run in found["runs"]] == [(1, 0.0), (3, 10.0)]
    first, last = found["runs"]
    assert (first["at"][0], first["at"][-1]) == (1.0, 10.0)  # once the model is loaded
    assert (last["at"][0], last["at"][-1]) == (11.0, 16.0)
    assert (first["completions"][-1], last["completions"][0], last["completions"][-1]) == (5, 5, 11)


def test_a_run_ends_with_its_engine_not_with_its_last_sample():
    samples = [figures(2.0), figures(4.0)]
    stats = figures(9.0, engine_s=6.0, generated_tokens=900)
    [run] = timeline([{"id": 1, "stats": stats}], lambda _: samples)["runs"]
    assert run["at"][-1] == 7.0
    assert run["running"][-1] is None  # what was running then was not sampled
    assert computed(run, "generated_per_s") == pytest.approx(900)


def test_what_an_older_program_did_not_sample_is_unknown():
    found = of([{"wall_s": 2.0, "steps": 4}, {"wall_s": 4.0, "steps": 8, "new": 1}, {"steps": 9}])
    [run] = found["runs"]
    assert run["kv_live"] == [None] * len(run["at"])
    assert computed(run, "generated_per_s") == 0


def test_nothing_sampled_is_nothing():
    assert of([]) == {"seconds": 0, "runs": []}
    assert timeline([], lambda _: []) == {"seconds": 0, "runs": []}
