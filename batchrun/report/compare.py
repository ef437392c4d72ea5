"""Figures and parameters of several jobs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from batchrun.jobs.metrics import METRICS, RATIOS
from batchrun.report.text import flat, rate, seconds, size

# What is compared first; all other figures follow, by their keys.
_FIRST = {
    "rows.done": "rows done",
    "rows.failed": "rows failed",
    "throughput.completion_tokens_per_s": "completion tokens/s",
    "throughput.rows_per_s": "rows/s",
    "throughput.prefill_tokens_per_s": "prefill tokens/s",
    "throughput.decode_tokens_per_s": "decode tokens/s",
    "time.wall_s": "wall clock",
    "time.engine_s": "engine",
    "tokens.prompt": "prompt tokens",
    "tokens.completion": "completion tokens",
    "tokens.shared": "prompt tokens shared",
    "tokens.drafted": "draft tokens",
    "tokens.accepted": "draft tokens accepted",
    "duplicates.rows": "duplicates",
    "batch.mean_occupancy": "sequences running on average",
    "batch.steps": "steps",
    "preemptions": "preemptions",
    "kv.time_averaged.mapped": "KV memory mapped, average",
    "kv.peak.mapped": "KV memory mapped, peak",
    "kv.utilisation": "live share of it",
    "peak_rss": "peak RSS",
    "row_seconds.decode.p50": "decoding a row, p50",
    "row_seconds.decode.p99": "decoding a row, p99",
}
_UNITS = {metric.key: metric.unit for metric in METRICS}
_UNITS |= {key: _UNITS.get(f"kv.peak.{key.rpartition('.')[2]}", "") for key in RATIOS}


class Figure(NamedTuple):
    """A figure of several jobs: each as text, and its ratio to that of the first."""

    label: str
    values: list[str]
    ratios: list[str]
    first: bool  # whether it belongs to what is compared first


def side_by_side(summaries: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The figures that some job has and that are not 0 in all."""
    figures = [
        {k: v for k, v in flat(summary) if isinstance(v, int | float) and not isinstance(v, bool)}
        for summary in summaries
    ]
    keys = dict.fromkeys([*_FIRST, *(key for found in figures for key in found)])
    shown = [key for key in keys if any(found.get(key) for found in figures)]
    return [_figure(key, [found.get(key) for found in figures]) for key in shown]


def differing(parameters: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The parameters that are not the same in all jobs, by their dotted names."""
    told = [dict(flat(each)) for each in parameters]
    names = dict.fromkeys(name for each in told for name in each)
    return [
        (name, [_given(each.get(name)) for each in told])
        for name in names
        if len({repr(each.get(name)) for each in told}) > 1
    ]


def _given(value: Any) -> str:
    if value is None:
        return "-"
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def ratio(value: float | None, base: float | None) -> str:
    """How many times `base` a value is; empty if that says nothing."""
    if value is None or not base:
        return ""
    found = value / base
    return f"{found:,.0f}x" if abs(found) >= 100 else f"{found:.2f}x"


def _figure(key: str, values: Sequence[float | None]) -> Figure:
    ratios = [ratio(value, values[0]) for value in values]
    return Figure(_FIRST.get(key, key), [_shown(key, v) for v in values], ratios, key in _FIRST)


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key.endswith("utilisation"):
        return f"{value:.1%}"
    unit = "s" if key.startswith("row_seconds.") else _UNITS.get(key)
    if unit in {"s", "bytes"}:
        return seconds(value) if unit == "s" else size(value)
    return f"{value:,}" if isinstance(value, int) else rate(value)
