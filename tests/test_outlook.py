"""How long a run will still take: against simulated runs, and against recorded ones."""

import gzip
import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from batchrun.estimate.measured import StepSampler
from batchrun.estimate.outlook import Countdown, InFlight, Left, Lengths, Outlook
from benchmarks.outlook import FIGURES, judged, replayed

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json.gz"))
STEP, TOKEN, PREFILL = 0.02, 0.002, 0.0005  # seconds


def simulated(lengths, allowed, places, *, earlier=None, stops=True, speed=lambda at: 1.0):
    """A recording of a run with rows of these lengths, in a time that is a formula."""
    waiting, running = list(zip(lengths, allowed, strict=True)), []
    figures = dict.fromkeys(FIGURES, 0) | {"engine_s": 0.0}
    entries, ended, looked = [], [], 0.0
    while waiting or running:
        while waiting and len(running) < places:
            length, most = waiting.pop(0)
            running.append([0, length, most])
            figures["prefill_tokens"] += 100
            figures["engine_s"] += 100 * PREFILL
        took = (STEP + TOKEN * len(running)) * speed(figures["engine_s"])
        for row in running:
            row[0] += 1
        figures["engine_s"] += took
        figures["kv_s"] += took
        figures["kv_live_s"] += took * len(running) * 1000
        figures["steps"] += 1
        figures["decode_tokens"] += len(running)
        figures["generated_tokens"] += len(running)
        figures["sequence_s"] += took * len(running)
        ended += [[row[0], row[2]] for row in running if row[0] >= row[1]]
        running = [row for row in running if row[0] < row[1]]
        if figures["engine_s"] >= looked:
            looked = figures["engine_s"] + 1.0
            rows = {
                "generated": [row[0] for row in running],
                "allowed": [row[2] for row in running],
                "coming": len(waiting),
                "prompt_tokens": 100,
                "most_tokens": float(np.mean([most for _, most in waiting] or [0])),
            }
            entries.append({"figures": dict(figures), "rows": rows, "ended": ended})
            ended = []
    start = {"earlier": earlier, "places": places, "stops": stops, "alike": 1}
    return {**start, "seconds": figures["engine_s"], "entries": entries}


def lognormal(rows, median, most, seed=0):
    drawn = np.random.default_rng(seed).lognormal(np.log(median), 0.7, rows)
    return np.clip(drawn, 1, most).astype(int).tolist()


RUNS = {
    "many waves of chats": simulated(lognormal(600, 60, 512), [512] * 600, 32),
    "all as long as they may be": simulated([200] * 300, [200] * 300, 32, stops=False),
    "all alike, and short": simulated([40] * 600, [400] * 600, 32),
    "one in a hundred ten times as long": simulated(
        [600] * 3 + [60] * 297, [600] * 3 + [60] * 297, 32, stops=False
    ),
    "a machine that becomes slower": simulated(
        lognormal(600, 60, 512), [512] * 600, 32, speed=lambda at: 1.0 if at < 25 else 1.2
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_time_left_is_right_from_a_tenth_of_a_job_on(name):
    found = judged(RUNS[name])
    assert found["within"] >= 0.9, found
    assert found["in_range"] >= 0.65, found


@pytest.mark.parametrize("name", [n for n in RUNS if "slower" not in n])
def test_the_time_left_does_not_saw(name):
    """It rises by no more than a few percent of the job, and not often."""
    recording = RUNS[name]
    shown = [left.seconds for at, left in replayed(recording) if at > 0.1 * recording["seconds"]]
    rises = [after - before for before, after in pairwise(shown)]
    assert max(rises) < 0.05 * recording["seconds"]
    assert sum(rise > 0 for rise in rises) <= 0.25 * len(rises)


# Real answers to the prompts of the examples; the others are answers to random words, in which the
# luck of draft tokens changes from one second to the next.
CHATS = ("waves", "one-batch")


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.partition(".")[0])
def test_the_time_left_of_a_recorded_run(path):
    """Recorded by `python -m benchmarks.outlook --record`, on two cores of a Xeon with AMX."""
    found = judged(json.loads(gzip.decompress(path.read_bytes())))
    chats = path.name.partition(".")[0] in CHATS
    assert found["within"] >= (0.95 if chats else 0.7), found
    assert found["in_range"] >= (0.8 if chats else 0.5), found


def test_there_are_recorded_runs():
    assert len(RECORDED) == 5


def test_the_first_estimate_comes_at_once_and_earlier_jobs_make_it_better():
    run = RUNS["all alike, and short"]
    sampler = StepSampler()
    for entry in run["entries"]:
        sampler.observe(entry["figures"])
    known = replace(sampler.measured, share=0.1)
    with_earlier = {**run, "earlier": asdict(known)}
    at, first = replayed(run)[0]
    assert at < 3
    better = replayed(with_earlier)[0][1]
    truth = run["seconds"] - at
    assert abs(better.seconds - truth) < abs(first.seconds - truth)
    assert first.least <= truth  # unknown lengths: a wide range


def test_nothing_is_said_before_anything_is_measured():
    outlook = Outlook(None, 4)
    figures = dict.fromkeys(FIGURES, 0)
    assert outlook.left(figures, InFlight((), (), 10, 5, 5)) is None


def test_rows_in_flight_are_lives_of_which_the_beginning_is_known():
    """Short answers end first: the mean of those that ended is too low by far."""
    lengths = np.array(lognormal(4000, 60, 512))
    told = Lengths(0.5)
    begun = np.minimum(lengths, 40)
    for length in lengths[lengths <= 40]:
        told.add(int(length), 512)
    running = begun[lengths > 40] / 512
    mean, _ = told.moments(told.ended_by(running))
    of_ended = lengths[lengths <= 40].mean() / 512
    ended_share = float(told.ended_by(running)[told._bins(np.array([40 / 512]))[0] - 1])
    assert ended_share == pytest.approx((lengths <= 40).mean(), abs=0.03)
    assert mean > 2 * of_ended


def test_what_is_drawn_is_spread_as_the_lengths_are():
    told = Lengths(0.5)
    lengths = np.array(lognormal(3000, 60, 512))
    for length in lengths:
        told.add(int(length), 512)
    by = told.ended_by(np.zeros(0))
    drawn = told.draw(by, np.zeros(1000)) * 512
    assert drawn.mean() == pytest.approx(lengths.mean(), rel=0.06)
    assert np.quantile(drawn, 0.9) == pytest.approx(np.quantile(lengths, 0.9), rel=0.08)
    rest = told.draw(by, np.full(1000, 100 / 512)) * 512
    longer = lengths[lengths > 100] - 100
    assert rest.mean() == pytest.approx(longer.mean(), rel=0.2)
    assert told.draw(by, np.ones(3)).tolist() == [0, 0, 0]


def test_a_countdown_counts_down_and_follows_what_is_real():
    countdown = Countdown()
    shown = [
        countdown.shown(float(at), Left(100.0 - at + at % 2 * 3, 0, 200)) for at in range(1, 50)
    ]
    assert [round(a.seconds - b.seconds, 6) for a, b in pairwise(shown)] == ([1.0] * 48)
    after = [countdown.shown(50.0 + at, Left(100.0 - at, 0, 200)).seconds for at in range(20)]
    assert after[0] < 70
    assert after[-1] == pytest.approx(81, rel=0.12)


def test_a_job_of_a_week_keeps_no_more_figures_than_one_of_an_hour():
    outlook = Outlook(None, 4)
    for second in range(0, 7 * 86_400, 60):
        now = {name: float(second) for name in FIGURES}
        outlook.left(now, InFlight((1,), (10,), 100, 5, 10))
    assert len(outlook._past) < 200
