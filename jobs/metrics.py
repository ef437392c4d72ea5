"""The figures of a job's runs, in one table, a row each.

The table determines what a run records, how the figures of a job's runs are merged, and what
`stats.json` and `batchrun stats` show. To add a figure, add a row here and measure it in one place:
a field of `EngineStats`, or a name in what `Assembly`, `UsageIntegral` or the worker measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

Figures = dict[str, Any]  # by metric name


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a run, since the run's start.

    Attributes:
        name: Its name among a run's figures.
        unit: "s", "bytes", "bytes*s", "text" or "tokens by position" (a list), or what it counts.
        merge: Merges the figures of a job's runs, given in order.
        key: Its place in `stats.json`, "section.name"; "" if it has none.
        label: Names it on its own line of `batchrun stats`; "" if it is part of a sentence.
        sampled: Whether the journal keeps it over time.
    """

    name: str
    unit: str
    merge: Callable[[list[Any]], Any]
    key: str = ""
    label: str = ""
    sampled: bool = False

    @property
    def zero(self) -> Any:
        """Its value before anything was measured."""
        if self.unit == "tokens by position":
            return []
        return {"text": "", "s": 0.0, "bytes*s": 0.0}.get(self.unit, 0)


def _latest(values: list[Any]) -> Any:
    """The last value that is not zero."""
    return next(filter(None, reversed(values)), values[0])


def _each(values: list[list[int]]) -> list[int]:
    """Sums by position."""
    return [sum(column) for column in zip_longest(*values, fillvalue=0)]


# Figures of KV memory, and their labels in `batchrun stats`.
_KV = {
    "live": "bytes holding tokens",
    "mapped": "physical memory used",
    "shared": "more, if prefixes were not shared",
    "paged": "16-token blocks would hold",
    "static": "max-length slots would hold",
    "reserved": "address space, costs nothing",
}

METRICS = (
    Metric("model", "text", _latest, "model"),
    Metric("device", "text", _latest, "device"),
    Metric("attention", "text", _latest, "attention"),
    # Whether both leave answers independent of the batch: see `batchrun.jobs.determinism`.
    Metric("arithmetic", "text", _latest, "arithmetic"),
    Metric("varies", "text", _latest),
    # The reader, the engine and the journal work at the same time.
    Metric("wall_s", "s", sum, "time.wall_s", sampled=True),
    Metric("load_s", "s", sum, "time.load_s", "load the model"),
    Metric("tokenise_s", "s", sum, "time.tokenise_s", "tokenise"),
    Metric("plan_s", "s", sum, "time.plan_s", "plan"),
    Metric("engine_s", "s", sum, "time.engine_s", "engine"),
    Metric("journal_s", "s", sum, "time.journal_s", "journal"),
    Metric("export_s", "s", sum, "time.export_s", "export"),
    # A duplicate's result is copied from a row that asked the same: `completions` counts it,
    # `completion_tokens` does not.
    Metric("completions", "samples", sum, sampled=True),
    Metric("completion_tokens", "tokens", sum),
    Metric("duplicates", "samples", sum, "duplicates.rows"),
    Metric("duplicate_tokens", "tokens", sum, "duplicates.tokens"),
    # A step that mixes prefill and decode splits its time by tokens.
    Metric("prefill_tokens", "tokens", sum, "tokens.prefilled", sampled=True),
    Metric("decode_tokens", "tokens", sum, "tokens.decoded", sampled=True),
    Metric("recomputed_tokens", "tokens", sum, "tokens.recomputed"),
    Metric("drafted_tokens", "tokens", sum, "tokens.drafted"),
    Metric("accepted_tokens", "tokens", sum, "tokens.accepted"),
    Metric("forced_tokens", "tokens", sum, "tokens.forced"),  # without log-probabilities
    # Guesses by their place among a row's draft tokens.
    Metric("guessed_at", "tokens by position", _each, "drafts.guessed"),
    Metric("right_at", "tokens by position", _each, "drafts.right"),
    Metric("drafts_saved_s", "s", sum, "drafts.saved_s"),  # estimated; below 0 if they cost more
    Metric("drafts_bytes", "bytes", max, "drafts.table_bytes"),
    Metric("shared_tokens", "tokens", sum, "tokens.shared"),
    Metric("generated_tokens", "tokens", sum, sampled=True),  # including unfinished samples
    Metric("prefill_s", "s", sum),
    Metric("decode_s", "s", sum),
    # Estimated extra cost of the file's order; 0 for a run that ended early.
    Metric("saved_prompt_tokens", "tokens", sum, "saved.prompt_tokens"),
    Metric("saved_steps", "steps", sum, "saved.steps"),
    Metric("saved_tail_s", "s", sum, "saved.tail_s"),
    # The tail is the engine's time after at least half the average number of sequences ran for the
    # last time; `sequence_s` is the number of running sequences, integrated over `kv_s`.
    Metric("steps", "steps", sum, "batch.steps", sampled=True),
    Metric("max_num_seqs", "sequences", max, "batch.max_num_seqs"),
    Metric("sequence_s", "s", sum),
    Metric("tail_s", "s", sum, "batch.tail_s"),
    Metric("preemptions", "preemptions", sum, "preemptions"),
    Metric("running", "sequences", _latest, sampled=True),
    Metric("waiting", "sequences", _latest, sampled=True),
    # KV memory as it is, at its peak, and integrated over the engine's time.
    *(Metric(f"kv_{name}", "bytes", _latest, sampled=True) for name in _KV),
    Metric("kv_s", "s", sum),
    *(Metric(f"kv_{name}_s", "bytes*s", sum) for name in _KV),
    *(
        Metric(f"peak_kv_{name}", "bytes", max, f"kv.peak.{name}", label)
        for name, label in _KV.items()
    ),
    Metric("map_calls", "calls", sum, "kv.map_calls"),
    Metric("map_s", "s", sum, "kv.map_s"),
    Metric("unmap_calls", "calls", sum, "kv.unmap_calls"),
    Metric("unmap_s", "s", sum, "kv.unmap_s"),
    Metric("create_calls", "calls", sum, "kv.create_calls"),
    Metric("create_s", "s", sum, "kv.create_s"),
    Metric("destroy_calls", "calls", sum, "kv.destroy_calls"),
    Metric("destroy_s", "s", sum, "kv.destroy_s"),
    Metric("map_hidden_s", "s", sum, "kv.map_hidden_s"),
    Metric("map_exposed_s", "s", sum, "kv.map_exposed_s"),
    Metric("map_stalls", "stalls", sum, "kv.map_stalls"),
    Metric("device_s", "s", sum, "device_time.busy_s"),
    Metric("idle_s", "s", sum, "device_time.idle_s"),
    Metric("rss", "bytes", _latest, sampled=True),
    Metric("peak_rss", "bytes", max, "peak_rss"),
    Metric("weights_bytes", "bytes", max, "weights_bytes"),
    Metric("peak_activations", "bytes", max, "peak_activations"),
)

SAMPLED = tuple(metric.name for metric in METRICS if metric.sampled)

# Ratios of two figures of a job, by their place in `stats.json`.
RATIOS = {
    "throughput.prefill_tokens_per_s": ("prefill_tokens", "prefill_s"),
    "throughput.decode_tokens_per_s": ("decode_tokens", "decode_s"),
    "throughput.completion_tokens_per_s": ("completion_tokens", "engine_s"),
    "throughput.rows_per_s": ("completed_rows", "engine_s"),
    "batch.mean_occupancy": ("sequence_s", "kv_s"),
    **{f"kv.time_averaged.{name}": (f"kv_{name}_s", "kv_s") for name in _KV},
    "kv.utilisation": ("kv_live_s", "kv_mapped_s"),
    "kv.static_utilisation": ("kv_live_s", "kv_static_s"),
    "kv.paged_utilisation": ("kv_live_s", "kv_paged_s"),
}


def recorded(measured: Mapping[str, Any]) -> Figures:
    """A run's figures: what was measured, and zeros for the rest.

    Raises:
        KeyError: A measured name is not a metric.
    """
    figures = {metric.name: metric.zero for metric in METRICS}
    unknown = measured.keys() - figures.keys()
    if unknown:
        raise KeyError(f"no metric: {', '.join(sorted(unknown))}")
    return figures | dict(measured)


def merged(runs: Iterable[Mapping[str, Any]]) -> Figures:
    """A job's figures, merged from those of its runs; a figure that a run lacks is zero."""
    runs = list(runs)
    return {m.name: m.merge([m.zero, *(run.get(m.name, m.zero) for run in runs)]) for m in METRICS}


def placed(summary: dict[str, Any], figures: Mapping[str, Any]) -> None:
    """Put figures and ratios into a summary by key; a ratio is None if its divisor is 0."""
    values = {metric.key: figures[metric.name] for metric in METRICS if metric.key}
    for key, (of, by) in RATIOS.items():
        values[key] = figures[of] / figures[by] if figures[by] else None
    for key, value in values.items():
        *sections, name = key.split(".")
        place = summary
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
