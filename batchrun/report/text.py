"""The figures of a job as text: where the rows, the time and the memory went.

`batchrun stats` shows them line by line, the page of `batchrun report` in its tables. Figures are
measured while the job runs. Two need explaining: the time of a step that mixes prefill and decode
is split by token count; "static" and "paged" are what those two ways of allocating would have held
for the very same sequences at the same moments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from batchrun.jobs.metrics import METRICS
from batchrun.terminal import printable

Cells = tuple[str, ...]
_LABEL = 11  # characters of a line's label, which two spaces follow


class Section(NamedTuple):
    """Figures that belong together, in lines of cells; nothing in them is escaped.

    `table` says that the first line has the columns' names. Else a line has a label, which is empty
    where the line above goes on, and a figure; a third cell says what that one is.
    """

    name: str
    lines: list[Cells]
    table: bool = False


# Lines with placeholders for figures; a line with a ? is left out if all of its figures are 0.
_TOKENS = """\
tokens       {tokens.prompt} prompt, {tokens.completion} completion
computed     {tokens.prefilled} prefilled, {tokens.decoded} decoded, \
{tokens.recomputed} recomputed after {preemptions} preemptions
shared ?     {tokens.shared} prompt tokens
forced ?     {tokens.forced} tokens that the output's structure determined
drafts ?     {tokens.drafted} draft tokens, \
{tokens.accepted} accepted{tokens.accepted/tokens.drafted}
           ? by position {drafts.shares}
           ? {drafts.effect}
duplicates ? {duplicates.rows} rows, {duplicates.tokens} completion tokens
planned ?    saved about {saved.prompt_tokens} prompt tokens, {saved.steps} steps, \
{saved.tail_s} of tail
throughput   {throughput.completion_tokens_per_s} completion tokens/s, \
{throughput.rows_per_s} rows/s
             prefill {throughput.prefill_tokens_per_s} tokens/s, \
decode {throughput.decode_tokens_per_s} tokens/s (mixed steps are split by token count)
batch        {batch.mean_occupancy} of {batch.max_num_seqs} sequences running on average, \
{batch.steps} steps
           ? fewer than half of that in the last {batch.tail_s}"""
_PAGING = """\
paging       {kv.map_calls} map calls in {kv.map_s}, {kv.unmap_calls} unmap calls in \
{kv.unmap_s}, {kv.create_calls} create calls in {kv.create_s}
           ? {kv.destroy_calls} destroy calls in {kv.destroy_s}"""
_CPU = "peak RSS     {peak_rss}, of which {weights_bytes} weights"
_GPU = """\
             {kv.map_hidden_s} hidden behind compute, {kv.map_exposed_s} not\
{kv.map_exposed_s/time.wall_s}, {kv.map_stalls} stalls
GPU time     {device_time.busy_s} in steps, \
{device_time.idle_s} between them{device_time.idle_s/device_time}
GPU memory   {weights_bytes} weights, {peak_activations} activations at most
peak RSS     {peak_rss}"""
_POSITIONS = 8  # of draft tokens whose shares are told
_FIGURE = re.compile(r"{([\w.]+)(?:/([\w.]+))?}")
_UNIT_OF = {metric.key: metric.unit for metric in METRICS}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def render(summary: Mapping[str, Any]) -> str:
    """Format the result of `batchrun.jobs.stats.summarise` for a terminal of 80 columns or more.

    Raises:
        KeyError: `summary` lacks a figure of its documented schema.
    """
    head = f"job {summary['job']}: {summary['state']}, {circumstances(summary)}"
    return "\n\n".join([printable(head), *map(_aligned, sections(summary))])


def circumstances(summary: Mapping[str, Any]) -> str:
    """A job's model and device, and how often it was continued."""
    told = f"model {summary['model']}"
    told += f" on {summary['device']}" if summary["device"] else ""
    told += f" ({summary['attention']})" if summary["attention"] else ""
    return told + (f", {summary['runs']} runs" if summary["runs"] > 1 else "")


def sections(summary: Mapping[str, Any]) -> list[Section]:
    """All figures of a summary, in the order in which they are shown.

    Raises:
        KeyError: `summary` lacks a figure of its documented schema.
    """
    figures = dict(flat(summary))
    figures["drafts.shares"] = _by_position(figures["drafts.guessed"], figures["drafts.right"])
    saved = figures["drafts.saved_s"]
    figures["drafts.effect"] = (
        f"about {seconds(abs(saved))} {'saved' if saved >= 0 else 'lost'} by drafts"
        if figures["tokens.drafted"]
        else ""
    )
    tokens = _TOKENS + _others("", "tokens", "batch", "duplicates", "saved")
    found = [_rows(summary), _filled("tokens", tokens, figures), _time(figures)]
    if summary["devices"]:
        found.append(_devices(summary["devices"], figures["time.engine_s"]))
    if figures["batch.steps"]:
        busy = figures["device_time.busy_s"]
        figures["device_time"] = busy + figures["device_time.idle_s"]
        memory = f"{_PAGING}{_others('kv', 'device_time')}\n{_GPU if busy else _CPU}"
        found += [_kv(figures), _filled("memory", memory, figures)]
        found.append(_latency(summary["row_seconds"]))
    return found


def _rows(summary: Mapping[str, Any]) -> Section:
    rows, reasons = summary["rows"], summary["finish_reasons"]
    total = "?" if rows["total"] is None else f"{rows['total']:,}"
    done = f"{rows['done']:,} of {total} done"
    words = {"failed": "failed", "skipped": "skipped", "remaining": "remaining"}
    for name, word in {**words, "resumed": "kept from earlier runs"}.items():
        done += f", {rows[name]:,} {word}" if rows.get(name) else ""
    lines: list[Cells] = [("rows", done)]
    lines += [("", f"{count:,} failed: {kind}") for kind, count in rows["failed_by_reason"].items()]
    if summary["deterministic"] is not None:
        how = f"deterministic, computed with {summary['arithmetic']}"
        varies = f"not deterministic: {summary['varies']}"
        lines.append(("answers", how if summary["deterministic"] else varies))
    if reasons:
        listed = ", ".join(f"{name} {count:,}" for name, count in reasons.items())
        lines.append(("finished by", listed))
    if reasons.get("length"):
        truncated = f"{reasons['length']:,} completions were cut off at --max-tokens"
        lines.append(("", f"note: {truncated} or the context length"))
    return Section("rows", lines)


def flat(summary: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """All figures of a summary, by their keys: "section.name"."""
    for name, value in summary.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{section}{name}.")
        else:
            yield section + name, value


def _filled(name: str, template: str, figures: Mapping[str, Any]) -> Section:
    """Fill in a template's lines; `{part/whole}` becomes a share in parentheses."""
    lines: list[Cells] = []
    for line in template.splitlines():
        if "?" not in line or any(figures[key] for key, whole in _FIGURE.findall(line)):
            told = _FIGURE.sub(lambda key: written(figures, *key.groups()), line[_LABEL + 2 :])
            lines.append((line[:_LABEL].rstrip(" ?"), told))
    return Section(name, lines)


def written(figures: Mapping[str, Any], key: str, whole: str | None = None) -> str:
    """A figure with its unit; with `whole`, its share of that one."""
    value, unit = figures[key], _UNIT_OF.get(key)
    if whole is not None:
        return _share(value, figures[whole])
    if isinstance(value, str):
        return value
    if unit in {"s", "bytes"}:
        return seconds(value) if unit == "s" else size(value)
    return f"{value:,}" if isinstance(value, int) else rate(value)


def _others(*sections: str) -> str:
    """Template lines for labelled figures of sections that consist of sentences otherwise."""
    return "".join(f"\n           ? {{{key}}} {label}" for key, label in labels(*sections))


def labels(*sections: str) -> list[tuple[str, str]]:
    """Keys and labels of the figures in `sections` that have a line of their own."""
    return [(m.key, m.label) for m in METRICS if m.label and m.key.rpartition(".")[0] in sections]


def _time(figures: Mapping[str, Any]) -> Section:
    wall = figures["time.wall_s"]
    lines: list[Cells] = [
        ("time", seconds(wall), "wall clock; reader, engine and journal run in parallel")
    ]
    for key, label in labels("time"):
        lines.append(("", seconds(figures[key]), f"{label}{_share(figures[key], wall)}"))
    return Section("time", lines)


def _devices(devices: Sequence[Mapping[str, Any]], engine_s: float) -> Section:
    """A line for each device; those that were lost say why."""
    hosts = {device["host"] for device in devices if device["host"]}
    lines: list[Cells] = [("devices", "rows", "tokens", "idle", "load", "peak KV", "weights", "")]
    for device in devices:
        where = f"{device['host']} " * (len(hosts) > 1) + device["device"]
        idle = seconds(device["idle_s"]) + _share(device["idle_s"], engine_s)
        counts = (f"{device[name]:,}" for name in ("rows", "generated_tokens"))
        sizes = (size(device[name]) for name in ("peak_kv_mapped", "weights_bytes"))
        lost = "" if device["lost"] is None else f"lost: {device['lost']}"
        lines.append((f"  {where}", *counts, idle, seconds(device["load_s"]), *sizes, lost))
    return Section("devices", lines, table=True)


def _kv(figures: Mapping[str, Any]) -> Section:
    shares = {"mapped": "utilisation", "static": "static_utilisation", "paged": "paged_utilisation"}
    lines: list[Cells] = [("KV memory", "average", "peak", "live share", "")]
    for key, label in labels("kv.peak"):
        name = key.removeprefix("kv.peak.")
        average, peak = figures[f"kv.time_averaged.{name}"], figures[key]
        share = figures[f"kv.{shares[name]}"] if name in shares else None
        if name != "shared" or peak:
            cells = ("-" if average is None else size(average), size(peak))
            lines.append((f"  {name}", *cells, "" if share is None else f"{share:.1%}", label))
    return Section("kv", lines, table=True)


def _by_position(guessed: Sequence[int], right: Sequence[int]) -> str:
    """The share of right draft tokens, of the first ones in a row, the second ones and so on."""
    shares = [b / a for a, b in zip_longest(guessed, right, fillvalue=0)][:_POSITIONS]
    return " ".join(f"{share:.0%}" for share in shares)


def _latency(latency: Mapping[str, Mapping[str, float] | None]) -> Section:
    lines: list[Cells] = [("each row", "p50", "p90", "p99", "max")]
    for name, quantiles in latency.items():
        if quantiles is not None:
            values = (seconds(quantiles[key]) for key in ("p50", "p90", "p99", "max"))
            lines.append((f"  {name}", *values))
    return Section("latency", lines, table=True)


def _aligned(section: Section) -> str:
    """A section's lines, each column as wide as its widest cell."""
    rows = [[printable(cell) for cell in line] for line in section.lines]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    widths[0] = max(widths[0], _LABEL)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def rate(value: float | None) -> str:
    """A number that counts nothing: `1,234`, `12.3` or `0.12`."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _share(part: float, whole: float) -> str:
    return f" ({part / whole:.0%})" if whole > 0 else ""


def counted(number: int, what: str) -> str:
    """A number of things: `1 row`, `2 rows`."""
    return f"{number:,} {what}" + "s" * (number != 1)


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
