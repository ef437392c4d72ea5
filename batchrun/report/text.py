"""`batchrun stats` as text: where the rows, the time and the memory went.

Every figure was measured while the job ran. Two need a word, which the report says too: the time
of a step that mixes prefill and decode is split by token count, and "static" and "paged" are what
those two ways of allocating would have held for the very same sequences at the same moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from batchrun.jobs.metrics import METRICS
from batchrun.terminal import printable

Cells = tuple[str, ...]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def render(summary: Mapping[str, Any]) -> str:
    """Formats what `batchrun.jobs.stats.summarise` returns, for a terminal of 80 columns or more.

    Raises:
        KeyError: `summary` lacks a figure of its documented schema.
    """
    sections = [_rows(summary), _tokens(summary), _time(summary)]
    if summary["batch"]["steps"]:
        sections += [_kv(summary["kv"]), _memory(summary), _latency(summary["row_seconds"])]
    head = f"job {summary['job']}: {summary['state']}, model {summary['model']}"
    if summary["device"]:
        head += f" on {summary['device']}"
    if summary["attention"]:
        head += f" ({summary['attention']})"
    if summary["runs"] > 1:
        head += f", {summary['runs']} runs"
    return "\n\n".join([printable(head), *sections])


def _rows(summary: Mapping[str, Any]) -> str:
    rows, lines = summary["rows"], []
    done = f"{rows['done']:,} of {_count(rows['total'])} done"
    if rows["failed"]:
        done += f", {rows['failed']:,} failed"
    if rows["remaining"]:
        done += f", {rows['remaining']:,} remaining"
    if rows["resumed"]:
        done += f", {rows['resumed']:,} kept from earlier runs"
    lines.append(("rows", done))
    lines += [("", f"{count:,} failed: {kind}") for kind, count in rows["failed_by_reason"].items()]
    reasons = summary["finish_reasons"]
    if reasons:
        listed = ", ".join(f"{name} {count:,}" for name, count in reasons.items())
        lines.append(("finished by", listed))
    if reasons.get("length"):
        truncated = f"note: {reasons['length']:,} completions were cut off at --max-tokens"
        lines.append(("", truncated + " or the context length"))
    return _table(lines)


def _tokens(summary: Mapping[str, Any]) -> str:
    tokens, rate, batch = summary["tokens"], summary["throughput"], summary["batch"]
    same, tail = summary["duplicates"], batch["tail_s"]
    lines = [
        ("tokens", f"{tokens['prompt']:,} prompt, {tokens['completion']:,} completion"),
        (
            "computed",
            f"{tokens['prefilled']:,} prefilled, {tokens['decoded']:,} decoded, "
            f"{tokens['recomputed']:,} recomputed after {summary['preemptions']:,} preemptions",
        ),
        *([("shared", f"{tokens['shared']:,} prompt tokens")] if tokens["shared"] else []),
        *([("guessed", _guesses(tokens))] if tokens["drafted"] else []),
        *(
            [("duplicates", f"{same['rows']:,} rows, {same['tokens']:,} completion tokens")]
            if same["rows"]
            else []
        ),
        *([("planned", _saved(summary["saved"]))] if any(summary["saved"].values()) else []),
        (
            "throughput",
            f"{_rate(rate['completion_tokens_per_s'])} completion tokens/s, "
            f"{_rate(rate['rows_per_s'])} rows/s",
        ),
        (
            "",
            f"prefill {_rate(rate['prefill_tokens_per_s'])} tokens/s, "
            f"decode {_rate(rate['decode_tokens_per_s'])} tokens/s "
            "(mixed steps are split by token count)",
        ),
        (
            "batch",
            f"{_rate(batch['mean_occupancy'])} of {batch['max_num_seqs']:,} sequences running "
            f"on average, {batch['steps']:,} steps",
        ),
        *([("", f"under half of that in the last {seconds(tail)}")] if tail else []),
    ]
    return _table(lines)


def _saved(saved: Mapping[str, Any]) -> str:
    return (
        f"saved about {saved['prompt_tokens']:,} prompt tokens, {saved['steps']:,} steps, "
        f"{seconds(saved['tail_s'])} of tail"
    )


def _guesses(tokens: Mapping[str, int]) -> str:
    drafted, accepted = tokens["drafted"], tokens["accepted"]
    return f"{drafted:,} tokens from rows' own text, {accepted:,} right{_share(accepted, drafted)}"


def _time(summary: Mapping[str, Any]) -> str:
    time = summary["time"]
    wall = time["wall_s"]
    lines = [("time", seconds(wall), "wall clock; reader, engine and journal run side by side")]
    lines += [
        ("", seconds(time[name]), f"{label}{_share(time[name], wall)}")
        for name, label in _labels("time")
    ]
    return _table(lines)


def _kv(kv: Mapping[str, Any]) -> str:
    average, peak = kv["time_averaged"], kv["peak"]
    shares = {
        "mapped": kv["utilisation"],
        "static": kv["static_utilisation"],
        "paged": kv["paged_utilisation"],
    }
    lines = [("KV memory", "average", "peak", "live share", "")]
    lines += [
        (
            f"  {name}",
            _size(average[name]),
            size(peak[name]),
            _percent(shares.get(name)),
            meaning,
        )
        for name, meaning in _labels("kv.peak")
        if name != "shared" or peak[name]
    ]
    return _table(lines)


def _memory(summary: Mapping[str, Any]) -> str:
    kv = summary["kv"]
    calls = (
        f"{kv[f'{name}_calls']:,} {name} calls in {seconds(kv[f'{name}_s'])}"
        for name in ("map", "unmap", "create")
    )
    lines = [("paging", ", ".join(calls))]
    weights, rss = f"{size(summary['weights_bytes'])} weights", size(summary["peak_rss"])
    device, wall = summary["device_time"], summary["time"]["wall_s"]
    busy, idle = device["busy_s"], device["idle_s"]
    if not busy:
        return _table([*lines, ("peak RSS", f"{rss}, of which {weights}")])
    exposed = kv["map_exposed_s"]
    lines += [
        (
            "",
            f"{seconds(kv['map_hidden_s'])} hidden behind computing, {seconds(exposed)} not"
            f"{_share(exposed, wall)}, {kv['map_stalls']:,} stalls",
        ),
        (
            "GPU time",
            f"{seconds(busy)} in steps, {seconds(idle)} between them{_share(idle, busy + idle)}",
        ),
        ("GPU memory", f"{weights}, {size(summary['peak_activations'])} activations at most"),
        ("peak RSS", rss),
    ]
    return _table(lines)


def _labels(section: str) -> list[tuple[str, str]]:
    """Names and labels of the figures of a section that have a line of their own."""
    keys = ((metric.key.rpartition("."), metric.label) for metric in METRICS if metric.label)
    return [(name, label) for (place, _, name), label in keys if place == section]


def _latency(latency: Mapping[str, Mapping[str, float] | None]) -> str:
    lines: list[Cells] = [("each row", "p50", "p90", "p99", "max")]
    for name, quantiles in latency.items():
        if quantiles is not None:
            values = (seconds(quantiles[key]) for key in ("p50", "p90", "p99", "max"))
            lines.append((f"  {name}", *values))
    return _table(lines)


def _table(lines: Iterable[Cells]) -> str:
    """Lines of cells in aligned columns, each column as wide as its widest cell."""
    rows = [[printable(cell) for cell in row] for row in lines]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    widths[0] = max(widths[0], 11)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _size(value: float | None) -> str:
    return "-" if value is None else size(value)


def _share(part: float, whole: float) -> str:
    return f" ({part / whole:.0%})" if whole > 0 else ""


def size(value: float) -> str:
    """Bytes with a binary unit: `1.5 MiB`."""
    unit = 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def seconds(value: float) -> str:
    """A duration, in the unit that suits it: `12 ms`, `3.4 s`, `2 min 5 s`, `3 h 12 min`."""
    if value < 0.0995:
        return f"{value * 1000:.1f} ms" if value < 0.00995 else f"{value * 1000:.0f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
