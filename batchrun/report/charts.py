"""Lines and bars as SVG paths, in a plot of 1000 by 1000 that a page stretches to any size.

Axes and labels are no part of it: a page sets them as text beside the plot, at a share of its width
or height, so that they stay readable on a phone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from batchrun.report.text import size

_SIDE = 1000
_NICE_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400)
_LEAST = 1e-9  # values below count as 0
_TICKS = 4  # on an axis, about
_DECADES = 6  # of a logarithmic axis, at most
_WHOLE = re.compile(r"\.0(?!\d)")  # of `1.0 MiB`, not of `0.05`

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        label: What it shows.
        pieces: Its points, by run.
    """

    label: str
    pieces: list[Points]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in percent from the left or the top, and its text."""

    at: float
    text: str


@dataclass
class Chart:
    """A chart, ready to be drawn.

    Attributes:
        title: What it shows.
        note: Says more, in a line.
        lines: Label and path of each.
        area: The path of what is filled beneath the first line, or "".
        xs, ys: Ticks.
        marks: Where runs begin that continued the job, in percent.
        text: The chart in words.
    """

    title: str
    note: str = ""
    lines: list[tuple[str, str]] = field(default_factory=list)
    area: str = ""
    xs: list[Tick] = field(default_factory=list)
    ys: list[Tick] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)
    text: str = ""


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    width_s: float,
    shown: Callable[[float], str],
    note: str = "",
    marks: Iterable[float] = (),
    log: bool = False,
    filled: bool = True,
) -> Chart | None:
    """A chart over time, from 0 up; None if there is nothing to draw.

    Args:
        title: What it shows.
        lines: Its lines; those without a value that is not 0 are left out.
        width_s: Seconds on the axis of time.
        shown: Writes a value.
        note: Says more.
        marks: Seconds at which a run continued the job.
        log: Whether the axis of values is logarithmic; zeros are left out.
        filled: Whether the area beneath the first line is filled; not with `log`.
    """
    lines = [line for line in lines if any(y > _LEAST for piece in line.pieces for _, y in piece)]
    known = [y for line in lines for piece in line.pieces for _, y in piece]
    values = [y for y in known if y > _LEAST or not log]
    if not values or width_s <= 0:
        return None
    binary = shown is size
    ticks = _log_ticks(values, binary) if log else _ticks(max(values), binary)
    low, high = (math.log(ticks[0]), math.log(ticks[-1])) if log else (0.0, ticks[-1])

    def y_of(value: float) -> float:
        value = math.log(value) if log else value
        return _SIDE * (1 - (value - low) / ((high - low) or 1))

    chart = Chart(title, note, text=_in_words(lines, shown))
    for line in lines:
        pieces = [[(x, y) for x, y in piece if y > _LEAST or not log] for piece in line.pieces]
        placed = [[(_SIDE * x / width_s, y_of(y)) for x, y in piece] for piece in pieces if piece]
        chart.lines.append((line.label, " ".join(map(_path, placed))))
        if filled and not chart.area and not log:
            chart.area = " ".join(map(_area, placed))
    chart.ys = [Tick(y_of(tick) / 10, _WHOLE.sub("", shown(tick))) for tick in ticks]
    chart.xs = [Tick(100 * x / width_s, clock(x)) for x in _time_ticks(width_s)]
    chart.marks = [100 * mark / width_s for mark in marks]
    return chart


def bar_chart(title: str, lengths: Mapping[str, Any], note: str) -> Chart:
    """A histogram of lengths.

    Args:
        title: What it shows.
        lengths: The `least` and `max`; how many lengths a bar covers (`width`), and the `counts`.
        note: Says more.
    """
    least, width, most = lengths["least"], lengths["width"], lengths["max"]
    counts: list[int] = lengths["counts"]
    step, ticks = _SIDE / len(counts), _ticks(max(counts))
    gap = min(2.0, step / 8)
    bars = [
        f"M{_n(i * step + gap)} {_SIDE}V{_n(_SIDE * (1 - count / ticks[-1]))}"
        f"H{_n((i + 1) * step - gap)}V{_SIDE}Z"
        for i, count in enumerate(counts)
        if count
    ]
    chart = Chart(title, note, area=" ".join(bars))
    chart.ys = [Tick(100 * (1 - y / ticks[-1]), f"{y:,.0f}") for y in ticks if y == int(y)]
    ends = {0: least, len(counts): most} if most > least else {0: least}
    if len(counts) > 2:
        ends[len(counts) // 2] = least + len(counts) // 2 * width
    chart.xs = [Tick(100 * i / len(counts), f"{ends[i]:,}") for i in sorted(ends)]
    top = max(range(len(counts)), key=counts.__getitem__)
    chart.text = (
        f"{sum(counts):,} in all, from {least:,} to {most:,} tokens; {counts[top]:,} of them have "
        f"{least + top * width:,} to {least + (top + 1) * width - 1:,}, the tallest bar"
    )
    return chart


def steps(at: Sequence[float], rates: Sequence[float | None]) -> Points:
    """Rates, each of the time before, as a line through the middle of these times."""
    spans = [(x, end, y) for (x, end), y in zip(pairwise(at), rates[1:], strict=True)]
    known = [(x, end, y) for x, end, y in spans if y is not None]
    if not known:
        return []
    middles = [((x + end) / 2, y) for x, end, y in known]
    return [(known[0][0], known[0][2]), *middles, (known[-1][1], known[-1][2])]


def levels(at: Sequence[float], values: Sequence[Any]) -> Points:
    """Amounts, where they are known."""
    return [(x, y) for x, y in zip(at, values, strict=True) if y is not None]


def clock(value: float) -> str:
    """A tick of time: `0`, `30 s` or `1 h 30 min`, without what is 0."""
    if value < 60:
        return f"{value:g} s" if value else "0"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


def _ticks(most: float, binary: bool = False) -> list[float]:
    """Round numbers from 0 to at least `most`."""
    if most <= 0:
        return [0.0, 1.0]
    base = 1024.0 ** int(math.log(most, 1024)) if binary and most >= 1 else 1.0
    rough = most / base / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = base * next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(most / step - 1e-9) + 1)]


def _log_ticks(values: Sequence[float], binary: bool) -> list[float]:
    """Powers of 32 or 10 around all values, which are above 0."""
    base = 32 if binary else 10
    low = math.floor(math.log(min(values), base) + 1e-9)
    high = max(low + 1, math.ceil(math.log(max(values), base) - 1e-9))
    every = -(-(high - low) // _DECADES)
    return [float(base) ** i for i in range(low, high + every, every)]


def _time_ticks(width_s: float) -> Iterator[float]:
    rough = width_s / (_TICKS + 1)
    nice = (0.1, 0.2, 0.5, *_NICE_S)
    step: float = next((s for s in nice if s >= rough), 86400 * math.ceil(rough / 86400))
    yield from (i * step for i in range(int(width_s / step) + 1))


def _path(points: Points) -> str:
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)


def _area(points: Points) -> str:
    return f"{_path(points)}L{_n(points[-1][0])} {_SIDE}L{_n(points[0][0])} {_SIDE}Z"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _in_words(lines: Sequence[Line], shown: Callable[[float], str]) -> str:
    told = []
    for line in lines:
        points = [y for piece in line.pieces for _, y in piece]
        told.append(f"{line.label}: {shown(max(points))} at most, {shown(points[-1])} at the end")
    return "; ".join(told)
