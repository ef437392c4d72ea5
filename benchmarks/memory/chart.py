"""The memory comparison as one SVG file, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from batchrun.report.text import size
from benchmarks.memory.trace import TITLES, Case, Moment, Run

Point = tuple[float, float]

_WIDTH, _HEIGHT = 960, 640
_POINTS = 200  # of a curve; more could not be seen
_GIB = 1 << 30
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2933 }
.head { font-weight: 600; font-size: 15px }
.soft { fill: #5f6b7a }
.page { fill: #ffffff } .axis { stroke: #9aa5b1 } .grid { stroke: #e4e7eb }
.budget { stroke: #1f2933; stroke-dasharray: 2 4 }
.static { --hue: #c2570c } .paged { --hue: #2563eb } .batchrun { --hue: #0b7a6b }
.any { --hue: #5f6b7a }
.used { fill: var(--hue); fill-opacity: .22 } .live { fill: var(--hue); fill-opacity: .8 }
.line { fill: none; stroke: var(--hue); stroke-width: 2 }
.line.paged { stroke-dasharray: 5 5 } .line.batchrun { stroke-width: 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e7eb } .soft { fill: #9aa5b1 }
  .page { fill: #10161d } .axis { stroke: #7b8794 } .grid { stroke: #26313d }
  .budget { stroke: #e4e7eb }
  .static { --hue: #f2994a } .paged { --hue: #8fbcff } .batchrun { --hue: #26a69a }
  .any { --hue: #9aa5b1 }
}
"""


@dataclass(frozen=True)
class _Axes:
    """A rectangle of the picture, in pixels from its upper left corner, and the data's ranges."""

    left: float
    top: float
    width: float
    height: float
    x_max: float
    y_max: float

    def at(self, x: float, y: float) -> Point:
        """Pixels of a point of the data."""
        across, up = x / self.x_max, y / self.y_max
        return self.left + across * self.width, self.top + self.height * (1 - up)

    def frame(self, x_label: str, y_label: str) -> Iterable[str]:
        """Ticks, grid and labels; no numbers beside the y axis where it has no label."""
        bottom = self.top + self.height
        for tick in _ticks(self.y_max):
            _, y = self.at(0, tick)
            yield f'<path class="grid" d="M{self.left:.1f} {y:.1f}h{self.width:.1f}"/>'
            if y_label:
                yield _text(self.left - 6, y + 4, f"{tick:,g}", "soft", anchor="end")
        for tick in _ticks(self.x_max, 4):
            x, _ = self.at(tick, 0)
            yield f'<path class="axis" d="M{x:.1f} {bottom:.1f}v4"/>'
            yield _text(x, bottom + 18, f"{tick:,g}", "soft", anchor="middle")
        yield f'<path class="axis" d="M{self.left:.1f} {bottom:.1f}h{self.width:.1f}"/>'
        yield _text(self.left + self.width / 2, bottom + 36, x_label, "soft", anchor="middle")
        if y_label:
            x, y = self.left - 46, self.top + self.height / 2
            turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"'
            yield _text(x, y, y_label, "soft", anchor="middle", more=turn)

    def area(self, kind: str, points: Sequence[Point]) -> str:
        """What lies under a curve."""
        line = [(points[0][0], 0.0), *points, (points[-1][0], 0.0)]
        return f'<path class="{kind}" d="{self._path(line)}z"/>'

    def line(self, kind: str, points: Sequence[Point]) -> str:
        """A curve."""
        return f'<path class="line {kind}" d="{self._path(points)}"/>'

    def _path(self, points: Sequence[Point]) -> str:
        pixels = (self.at(x, y) for x, y in points)
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels)


def draw(case: Case, runs: dict[str, Run]) -> str:
    """Bytes used and bytes that hold tokens, one panel a way; below, the sequences in flight."""
    steps = max(len(run.moments) for run in runs.values())
    head = f"{case.name}: {case.requests:,} requests, {size(case.budget)} for keys and values"
    parts = [
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}"/>',
        _text(70, 30, head, "head"),
    ]
    budget = case.budget / _GIB
    for index, (name, run) in enumerate(runs.items()):
        panel = _Axes(70 + 300 * index, 124, 260, 170, steps, budget * 1.04)
        summary = run.summary()
        parts += panel.frame("step", "" if index else "GiB")
        parts.append(_text(panel.left, panel.top - 30, TITLES[name], "head"))
        held = f"{summary['utilisation']:.1%} of the memory used holds tokens"
        parts.append(_text(panel.left, panel.top - 11, held, "soft"))
        for kind in ("used", "live"):
            points = [(x, y / _GIB) for x, y in _thin(run.moments, kind)]
            parts.append(panel.area(f"{kind} {name}", points))
        _, y = panel.at(0, budget)
        parts.append(f'<path class="budget" d="M{panel.left} {y:.1f}h{panel.width}"/>')
    return _document([*parts, *_legend(), *_in_flight(runs, steps)])


def _legend() -> Iterable[str]:
    for x, kind, label in ((70, "live", "holds tokens"), (190, "used", "used, without tokens")):
        yield f'<rect class="{kind} any" x="{x}" y="46" width="14" height="12"/>'
        yield _text(x + 20, 57, label, "soft")
    yield '<path class="budget" d="M364 52h24"/>'
    yield _text(394, 57, "budget", "soft")


def _in_flight(runs: dict[str, Run], steps: int) -> Iterable[str]:
    curves = {name: list(_thin(run.moments, "running")) for name, run in runs.items()}
    most = max(y for curve in curves.values() for _, y in curve)
    panel = _Axes(70, 410, 860, 170, steps, most * 1.05)
    yield from panel.frame("step", "sequences")
    yield _text(panel.left, panel.top - 12, "Sequences in flight", "head")
    for name in reversed(curves):  # paging, dashed, is often upon batchrun
        yield panel.line(name, curves[name])
    for x, name in zip((280, 505, 725), curves, strict=True):
        yield f'<path class="line {name}" d="M{x} {panel.top - 17}h24"/>'
        mean = runs[name].summary()["in_flight_mean"]
        yield _text(x + 30, panel.top - 12, f"{TITLES[name]}, mean {mean:.0f}", "soft")


def _thin(moments: Sequence[Moment], name: str) -> Iterable[Point]:
    """Means of the steps between each two of `_POINTS` marks."""
    count = min(_POINTS, len(moments))
    marks = [len(moments) * i // count for i in range(count + 1)]
    for begin, end in pairwise(marks):
        yield (begin + end) / 2, fmean(getattr(m, name) for m in moments[begin:end])


def _ticks(highest: float, count: int = 5) -> list[float]:
    """Round numbers from 0 up, at most `count` above it."""
    unit = 1.0
    while True:
        for factor in (1, 2, 4, 5):
            if highest / (unit * factor) < count + 1:
                step = unit * factor
                return [i * step for i in range(int(highest / step) + 1)]
        unit *= 10


def _text(
    x: float, y: float, text: str, kind: str, *, anchor: str = "start", more: str = ""
) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}'
    return f'<text class="{kind}" {where}>{text}</text>'


def _document(parts: Iterable[str]) -> str:
    size_of = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size_of} role="img">'
    title = "<title>KV memory and sequences in flight under three ways to keep a cache</title>"
    return "\n".join([head, title, f"<style>{_STYLE}</style>", *parts, "</svg>\n"])
