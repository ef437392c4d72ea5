"""The figures of a job's runs, in one table, a row each.

The table determines what a run records, how the figures of a job's runs are merged, and what
`stats.json` and `batchrun stats` show. To add a figure, add a row here and measure it in one place:
a field of `EngineStats`, or a name in what `Assembly`, `UsageIntegral` or the worker measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
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
        across: Merges the figures of engines that work at the same time; None if the run itself
            measures it, however many there are.
    """

    name: str
    unit: str
    merge: Callable[[list[Any]], Any]
    key: str = ""
    label: str = ""
    sampled: bool = False
    across: Callable[[list[Any]], Any] | None = None

    @property
    def zero(self) -> Any:
        """Its value before anything was measured."""
        if self.unit in ("tokens by position", "by device"):
            return []
        return {"text": "", "s": 0.0, "bytes*s": 0.0}.get(self.unit, 0)


def _latest(values: list[Any]) -> Any:
    """The last value that is not zero."""
    return next(filter(None, reversed(values)), values[0])


def _each(values: list[list[int]]) -> list[int]:
    """Sums by position."""
    return [sum(column) for column in zip_longest(*values, fillvalue=0)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_of_busy(values: list[float]) -> float:
    """The mean without engines that had nothing to do."""
    busy = [value for value in values if value]
    return _mean(busy) if busy else 0.0


def _any(values: list[str]) -> str:
    """The texts that are not empty, each once."""
    return ", ".join(dict.fromkeys(filter(None, values)))


def _by_device(values: list[list[Figures]]) -> list[Figures]:
    """The figures of each device in all runs; what is no sum is the latest."""
    found: dict[tuple[str, str], Figures] = {}
    for device in chain.from_iterable(values):
        known = found.get(key := (device["host"], device["device"]), {})
        sums = {n: known[n] + device[n] for n in _SUMS_BY_DEVICE if n in known}
        found[key] = {**known, **device, **sums}
    return list(found.values())


_SUMS_BY_DEVICE = ("rows", "generated_tokens", "steps", "idle_s", "load_s")
_sums = partial(Metric, across=sum)  # of all engines
# The time of the average engine that worked. What they did in it, divided by it, is their speed.
_busy = partial(Metric, across=_mean_of_busy)

# Figures of KV memory, and their labels in `batchrun stats`.
_KV = {
    "live": "bytes holding tokens",
    "mapped": "physical memory used",
    "shared": "saved by sharing prefixes",
    "paged": "16-token blocks would take",
    "static": "max-length slots would take",
    "reserved": "address space, costs nothing",
}

METRICS = (
    Metric("model", "text", _latest, "model", across=_any),
    Metric("device", "text", _latest, "device", across=_any),
    Metric("attention", "text", _latest, "attention", across=_any),
    # Whether both leave answers independent of the batch: see `batchrun.jobs.determinism`.
    Metric("arithmetic", "text", _latest, "arithmetic", across=_any),
    Metric("varies", "text", _latest, across=_any),
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
    _sums("prefill_tokens", "tokens", sum, "tokens.prefilled", sampled=True),
    _sums("decode_tokens", "tokens", sum, "tokens.decoded", sampled=True),
    _sums("recomputed_tokens", "tokens", sum, "tokens.recomputed"),
    _sums("drafted_tokens", "tokens", sum, "tokens.drafted"),
    _sums("accepted_tokens", "tokens", sum, "tokens.accepted"),
    _sums("forced_tokens", "tokens", sum, "tokens.forced"),  # without log-probabilities
    # Guesses by their place among a row's draft tokens.
    Metric("guessed_at", "tokens by position", _each, "drafts.guessed", across=_each),
    Metric("right_at", "tokens by position", _each, "drafts.right", across=_each),
    # Estimated; below 0 if they cost more.
    Metric("drafts_saved_s", "s", sum, "drafts.saved_s", across=_mean),
    _sums("drafts_bytes", "bytes", max, "drafts.table_bytes"),
    _sums("shared_tokens", "tokens", sum, "tokens.shared"),
    _sums("generated_tokens", "tokens", sum, sampled=True),  # including unfinished samples
    _busy("prefill_s", "s", sum),
    _busy("decode_s", "s", sum),
    # Estimated extra cost of the file's order; 0 for a run that ended early.
    Metric("saved_prompt_tokens", "tokens", sum, "saved.prompt_tokens"),
    Metric("saved_steps", "steps", sum, "saved.steps"),
    Metric("saved_tail_s", "s", sum, "saved.tail_s"),
    # The tail is the engine's time after at least half the average number of sequences ran for the
    # last time; `sequence_s` is the number of running sequences, integrated over `kv_s`.
    _sums("steps", "steps", sum, "batch.steps", sampled=True),
    _sums("max_num_seqs", "sequences", max, "batch.max_num_seqs"),
    _sums("sequence_s", "s", sum),
    Metric("tail_s", "s", sum, "batch.tail_s"),
    _sums("preemptions", "preemptions", sum, "preemptions"),
    _sums("running", "sequences", _latest, sampled=True),
    _sums("waiting", "sequences", _latest, sampled=True),
    # KV memory as it is, at its peak, and integrated over the engine's time: of several, over that
    # of the one which worked longest, else their average could exceed their peaks.
    *(_sums(f"kv_{name}", "bytes", _latest, sampled=True) for name in _KV),
    Metric("kv_s", "s", sum, across=max),
    *(_sums(f"kv_{name}_s", "bytes*s", sum) for name in _KV),
    *(
        _sums(f"peak_kv_{name}", "bytes", max, f"kv.peak.{name}", label)
        for name, label in _KV.items()
    ),
    _sums("map_calls", "calls", sum, "kv.map_calls"),
    _sums("map_s", "s", sum, "kv.map_s"),
    _sums("unmap_calls", "calls", sum, "kv.unmap_calls"),
    _sums("unmap_s", "s", sum, "kv.unmap_s"),
    _sums("create_calls", "calls", sum, "kv.create_calls"),
    _sums("create_s", "s", sum, "kv.create_s"),
    _sums("destroy_calls", "calls", sum, "kv.destroy_calls"),
    _sums("destroy_s", "s", sum, "kv.destroy_s"),
    _sums("map_hidden_s", "s", sum, "kv.map_hidden_s"),
    _sums("map_exposed_s", "s", sum, "kv.map_exposed_s"),
    _sums("map_stalls", "stalls", sum, "kv.map_stalls"),
    _sums("device_s", "s", sum, "device_time.busy_s"),
    _sums("idle_s", "s", sum, "device_time.idle_s"),
    Metric("devices", "by device", _by_device, "devices"),
    _sums("kv_budget", "bytes", _latest),
    _sums("rss", "bytes", _latest, sampled=True),
    _sums("peak_rss", "bytes", max, "peak_rss"),
    _sums("weights_bytes", "bytes", max, "weights_bytes"),
    _sums("peak_activations", "bytes", max, "peak_activations"),
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


def across(engines: Iterable[Mapping[str, Any]]) -> Figures:
    """The figures of engines that work at the same time, without those that the run measures."""
    all_ = list(engines)
    return {m.name: m.across([f[m.name] for f in all_]) for m in METRICS if m.across}


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
