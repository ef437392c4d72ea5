"""One HTML page about a job, or several side by side.

The page stands alone: no script, nothing from elsewhere. Whatever comes from data is escaped twice:
what would reverse text or hide in it by `visible`, what is HTML by Jinja, for every expression in
the template without exception.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from batchrun.report.charts import Chart, Line, bar_chart, levels, line_chart, steps
from batchrun.report.compare import differing, side_by_side
from batchrun.report.text import (
    Cells,
    Section,
    circumstances,
    flat,
    labels,
    rate,
    seconds,
    sections,
    size,
    written,
)
from batchrun.terminal import printable

_MOST = 1500  # characters of a prompt, an answer or an error
_RUNS = 20  # of a job's runs, the last ones
_SAVINGS = {"shared", "forced", "drafts", "duplicates", "planned"}  # labels of their lines
_ORDINARY = {"done", "running", "queued"}  # states that call for no attention
Jobs = Sequence[Mapping[str, Any]]


def render_page(jobs: Jobs) -> str:
    """The page.

    Args:
        jobs: What `collect` returned of each; the first is what the others are compared with.
    """
    names = [job["summary"]["job"] for job in jobs]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=", ".join(names),
            style=Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8")),
            jobs=[_view(job) for job in jobs],
            names=names,
            charts=_over_time(jobs[0]) if len(jobs) == 1 else _compared(jobs),
            figures=side_by_side([job["summary"] for job in jobs]) if len(jobs) > 1 else None,
            differing=differing([job["parameters"] for job in jobs]) if len(jobs) > 1 else None,
            examples=None
            if jobs[0]["examples"] is None
            else _paired([j["examples"] for j in jobs]),
        )
    )


def visible(value: Any) -> Any:
    """A value for the page: text without characters that hide or reverse others, but with lines."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    lines = value.replace("\r\n", "\n").split("\n")
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines)


def shortened(text: str, most: int = _MOST) -> str:
    """A long text's beginning and end, and how much is left out between them."""
    if len(text) <= most:
        return text
    head, tail = most * 3 // 4, most // 4
    left_out = len(text) - head - tail
    return f"{text[:head]}\n[... {left_out:,} characters left out ...]\n{text[-tail:]}"


def when(value: float | None) -> str:
    """A time on this machine's clock."""
    try:
        return "" if value is None else f"{datetime.fromtimestamp(value):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError, OSError):
        return "?"


def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"shortened": shortened, "when": when, "size": size, "seconds": seconds}
    found.filters["longest"] = lambda texts: max(texts, key=len, default="")  # sets a width
    return found


def _view(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job as the template shows it."""
    summary = job["summary"]
    told = {section.name: section for section in sections(summary)}
    work, saved = _divided(told["tokens"].lines)
    rows = summary["rows"]
    return {
        **job,
        "id": summary["job"],
        "circumstances": circumstances(summary),
        "calm": summary["state"] in _ORDINARY,
        "share": rows["done"] / rows["total"] if rows["total"] else None,
        "tiles": _tiles(summary),
        "rows": told["rows"],
        "work": Section("work", work),
        "saved": Section("saved", saved),
        "time": _time(summary, told["time"]),
        "told": told,
        "histograms": _histograms(job["lengths"]),
        "reasons": rows["failed_by_reason"],
        "runs": job["runs"][-_RUNS:],
        "older_runs": max(0, len(job["runs"]) - _RUNS),
        "setup": next((run["setup"] for run in reversed(job["runs"]) if run["setup"]), None),
        "setups": len({str(run["setup"]) for run in job["runs"] if run["setup"]}),
        "asked": list(_leaves(job["parameters"])),
    }


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The first figures that anybody looks for: what it is, the figure, and what belongs to it."""
    figures, rows = dict(flat(summary)), summary["rows"]
    total = "?" if rows["total"] is None else f"{rows['total']:,}"
    left = [f"{rows[name]:,} {name}" for name in ("failed", "remaining") if rows[name]]
    per_s = figures["throughput.completion_tokens_per_s"]
    runs = f"{summary['runs']} runs" if summary["runs"] > 1 else "of wall clock"
    tiles = [
        ("rows done", f"{rows['done']:,}", ", ".join([f"of {total}", *left])),
        ("tokens/s", rate(per_s), f"{rate(figures['throughput.rows_per_s'])} rows/s"),
        ("time", seconds(figures["time.wall_s"]), runs),
        (
            *("completion tokens", written(figures, "tokens.completion")),
            f"{written(figures, 'tokens.prompt')} prompt tokens",
        ),
    ]
    if (share := figures["kv.utilisation"]) is not None:
        peak = written(figures, "kv.peak.mapped")
        tiles.append(("KV memory in use", f"{share:.1%}", f"of what is mapped, {peak} at most"))
    if figures["peak_rss"]:
        weights = f"{written(figures, 'weights_bytes')} weights"
        tiles.append(("peak RSS", written(figures, "peak_rss"), weights))
    return tiles


def _divided(lines: Sequence[Cells]) -> tuple[list[Cells], list[Cells]]:
    """Lines of work, and of what was saved; one without a label goes with the line above."""
    work: list[Cells] = []
    saved: list[Cells] = []
    into = work
    for line in lines:
        if line[0]:
            into = saved if line[0] in _SAVINGS else work
        into.append(line)
    return work, saved


def _time(summary: Mapping[str, Any], told: Section) -> list[tuple[Cells, float]]:
    """The lines of time, each with its share of the whole."""
    figures = dict(flat(summary))
    wall = figures["time.wall_s"]
    shares = [1.0, *(figures[key] / wall if wall else 0.0 for key, _ in labels("time"))]
    return [(line, min(1.0, share)) for line, share in zip(told.lines, shares, strict=True)]


def _over_time(job: Mapping[str, Any]) -> list[Chart]:
    """What one job did over time."""

    def line(label: str, name: str, points: Callable[..., Any] = levels) -> Line:
        return Line(label, [points(run["at"], run[name]) for run in job["timeline"]["runs"]])

    def chart(title: str, shown: Callable[[float], str], *lines: Line, **more: Any) -> Chart | None:
        marks = [run["begin"] for run in job["timeline"]["runs"] if run["begin"]]
        return line_chart(
            title, lines, shown=shown, width_s=job["timeline"]["seconds"], marks=marks, **more
        )

    found = (
        chart(
            *("Tokens per second", rate),
            line("generated", "generated_per_s", steps),
            line("prompt tokens computed", "prefilled_per_s", steps),
        ),
        chart("Answers finished", _count, line("answers", "completions")),
        chart("Batch size", _count, line("running", "running"), line("waiting", "waiting")),
        chart("Steps per second", rate, line("steps", "steps_per_s", steps)),
        chart(
            *("KV memory", size, line("live", "kv_live"), line("mapped", "kv_mapped")),
            note="memory that holds tokens, and the physical memory mapped for it",
        ),
        chart(
            *("KV memory, log scale", size),
            *(line("live", "kv_live"), line("mapped", "kv_mapped")),
            *(line("max-length slots", "kv_static"), line("reserved", "kv_reserved")),
            note="max-length slots would take memory; reserved address space takes none",
            log=True,
        ),
    )
    return [drawn for drawn in found if drawn is not None]


def _compared(jobs: Jobs) -> list[Chart]:
    """What several jobs did, each from its own beginning on."""
    measures: tuple[tuple[str, str, Callable[[float], str], Callable[..., Any]], ...] = (
        ("Tokens generated per second", "generated_per_s", rate, steps),
        ("Answers finished", "completions", _count, levels),
        ("Sequences running", "running", _count, levels),
        ("Steps per second", "steps_per_s", rate, steps),
        ("KV memory mapped", "kv_mapped", size, levels),
        ("KV memory live", "kv_live", size, levels),
    )
    width = max(job["timeline"]["seconds"] for job in jobs)
    found = (
        line_chart(
            title,
            [
                Line(
                    job["summary"]["job"],
                    [points(run["at"], run[name]) for run in job["timeline"]["runs"]],
                )
                for job in jobs
            ],
            width_s=width,
            shown=shown,
            filled=False,
        )
        for title, name, shown, points in measures
    )
    return [drawn for drawn in found if drawn is not None]


def _histograms(lengths: Mapping[str, Any]) -> list[Chart]:
    return [
        bar_chart(
            f"Tokens of {name}s",
            found,
            note=f"half have {found['p50']:,} or fewer, 90% {found['p90']:,}, 99% {found['p99']:,}",
        )
        for name, found in lengths.items()
        if found is not None
    ]


def _paired(examples: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Examples of several jobs, those of the same row with the same prompt beside each other."""
    found: dict[Any, dict[str, Any]] = {}
    for number, of_job in enumerate(examples):
        for example in of_job:
            # Without a prompt nothing proves that two jobs' rows are the same.
            same = example["prompt"] if example["prompt"] is not None else number
            key = (example["row"], example["sample"], type(same), same)
            item = found.setdefault(key, {**example, "answers": {}})
            item["answers"][number] = example
    return sorted(found.values(), key=lambda item: (item["row"], item["sample"]))


def _leaves(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Parameters by their dotted names."""
    found: list[tuple[str, str]] = []
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            found += _leaves(inner, f"{prefix}{name}.")
        elif isinstance(inner, list):
            found.append((prefix + name, "\n".join(map(str, inner))))
        else:
            found.append((prefix + name, str(inner)))
    return found


def _count(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,g}"
