"""A job's figures over time, thinned to as many points as a chart can show.

The runs of a job lie one after the other on one axis of time; the hours between them are left out:

    run 1               run 2          run 3
    |----load----+++++++|--load--++++++|-load-+++++++++|
    0                   ^ a resume     ^ a resume

A point stands for all samples since the one before it: rates are averages over that time, which add
up to what was computed, and amounts (sequences, bytes) are the largest, so that no peak is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from batchrun.jobs.metrics import Figures

POINTS = 240  # of a job, whatever its length
_NEAR_S = 1.0  # samples are further apart; what was noted at a run's end may not be

# What is counted since a run began, by the name of its rate.
RATES = {
    "generated_per_s": "generated_tokens",
    "prefilled_per_s": "prefill_tokens",
    "steps_per_s": "steps",
}
AMOUNTS = (
    *("running", "waiting", "rss"),
    *("kv_live", "kv_mapped", "kv_reserved", "kv_static", "kv_paged"),
)


def timeline(
    runs: Sequence[Mapping[str, Any]],
    samples: Callable[[int], list[Figures]],
    points: int = POINTS,
) -> dict[str, Any]:
    """The figures of a job's runs over time.

    Args:
        runs: From `Readings.runs`.
        samples: Returns those of a run, by its number.
        points: About how many are kept; a run has two at least.

    Returns:
        JSON-able: `seconds` of all runs together, and for each of the `runs` in which something
        was sampled: its `run` number, `begin` (seconds on this axis), `at` (likewise, of the points
        and what they begin with) and figures by name: `AMOUNTS` and `completions` (of all runs so
        far) at those times, None where unknown; `RATES` until then from the time before.
    """
    walls = [float(run["stats"].get("wall_s") or 0) for run in runs]
    read = {run["id"]: _sorted(samples(run["id"])) for run in runs}
    for i, run in enumerate(runs):  # a run that was killed knows less than its samples
        walls[i] = max([walls[i], *(sample["wall_s"] for sample in read[run["id"]])])
    total = sum(walls)
    found, begin, completions = [], 0.0, 0
    for run, wall in zip(runs, walls, strict=True):
        if read[run["id"]]:
            kept = list(_thinned(_with_ends(run["stats"], read[run["id"]]), total / points))
            found.append({"run": run["id"], "begin": round(begin, 2)})
            found[-1] |= _series(kept, begin, completions)
        begin += wall
        completions += int(run["stats"].get("completions") or 0)
    return {"seconds": round(total, 2), "runs": found}


def _sorted(samples: list[Figures]) -> list[Figures]:
    """Samples that say when they were taken, in that order."""
    timed = [s for s in samples if isinstance(s.get("wall_s"), int | float)]
    return sorted(timed, key=lambda sample: float(sample["wall_s"]))


def _with_ends(stats: Figures, samples: list[Figures]) -> list[Figures]:
    """A run's samples, behind its beginning with nothing and before what it had in the end."""
    load, first = float(stats.get("load_s") or 0), samples[0]["wall_s"]
    counted = (*RATES.values(), "completions")
    begin: Figures = {"wall_s": min(load, first), **dict.fromkeys(counted, 0)}
    end: Figures = {name: stats[name] for name in counted if name in stats}
    end["wall_s"] = load + float(stats.get("engine_s") or 0)
    ends = [end] if end["wall_s"] > samples[-1]["wall_s"] else []
    return [begin, *samples, *ends]


def _thinned(samples: list[Figures], apart: float) -> Iterator[Figures]:
    """The first sample, and one for each span of time."""
    yield samples[0]
    kept: Figures | None = None
    for sample in samples[1:]:
        near = kept is not None and sample["wall_s"] - kept["wall_s"] < _NEAR_S
        if kept is None or near or _span(kept, apart) == _span(sample, apart):
            kept = _together(kept or {}, sample)
        else:
            yield kept
            kept = sample
    if kept is not None:
        yield kept


def _span(sample: Figures, apart: float) -> int:
    return int(sample["wall_s"] / apart) if apart > 0 else 0


def _together(one: Figures, later: Figures) -> Figures:
    most = {
        name: max(known)
        for name in AMOUNTS
        if (known := [s[name] for s in (one, later) if s.get(name) is not None])
    }
    return {**one, **later, **most}


def _series(kept: list[Figures], begin: float, completions: int) -> dict[str, list[Any]]:
    """Thinned samples as a list for each figure."""
    at = [sample["wall_s"] for sample in kept]
    series: dict[str, list[Any]] = {"at": [round(begin + seconds, 2) for seconds in at]}
    spans = [late - early for early, late in pairwise(at)]
    for name, counted in RATES.items():
        total = [sample.get(counted) or 0 for sample in kept]
        grown = [max(0, late - early) for early, late in pairwise(total)]
        rates = [more / span if span > 0 else 0.0 for more, span in zip(grown, spans, strict=True)]
        series[name] = [None, *(round(rate, 3) for rate in rates)]
    series["completions"] = [completions + int(s.get("completions") or 0) for s in kept]
    return series | {name: [sample.get(name) for sample in kept] for name in AMOUNTS}
