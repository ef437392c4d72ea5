"""Draws a terminal session as one SVG: a strip of pictures that moves, without a script.

Where pictures don't move, the first one is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby

import pyte

# A character cell and the window around it, in pixels.
WIDTH, HEIGHT, MARGIN, BAR = 8, 18, 14, 34
BACKGROUND, TEXT = "#282d35", "#c8ced8"
COLOURS = {
    "black": "#3b4252",
    "red": "#e06c75",
    "green": "#a8cc8c",
    "brown": "#dbab79",
    "yellow": "#dbab79",
    "blue": "#71bef2",
    "magenta": "#d290e4",
    "cyan": "#66c2cd",
    "white": "#dfe3ea",
    "brightblack": "#7f8796",
    "brightred": "#f08a92",
    "brightgreen": "#b9d9a0",
    "brightbrown": "#e8c08f",
    "brightblue": "#8ccdf7",
    "brightmagenta": "#dfa9ee",
    "brightcyan": "#85d6e0",
    "brightwhite": "#ffffff",
}
STYLE = (
    "text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;"
    "white-space:pre}.b{font-weight:bold}.i{font-style:italic}.u{text-decoration:underline}"
    "@media(prefers-reduced-motion:reduce){#s{animation:none}}"
)

Row = tuple[tuple[str, int, str, str, str], ...]  # runs: text, column, colour, ground, classes
Picture = tuple[tuple[Row, ...], tuple[int, int] | None]  # rows, and where the cursor is


def pictures(
    events: list[tuple[float, str]], columns: int, rows: int
) -> list[tuple[float, Picture]]:
    """What the screen shows after each event, where that differs from what was shown before."""
    screen = pyte.Screen(columns, rows)
    stream = pyte.Stream(screen)
    found: list[tuple[float, Picture]] = []
    for when, text in events:
        stream.feed(text)
        cursor = None if screen.cursor.hidden else (screen.cursor.x, screen.cursor.y)
        shown = tuple(_row(screen.buffer[y], columns) for y in range(rows)), cursor
        if not found or found[-1][1] != shown:
            found.append((when, shown))
    return found


def _row(line: dict[int, pyte.screens.Char], columns: int) -> Row:
    runs, x = [], 0
    for look, group in groupby((line[x] for x in range(columns)), key=_look):
        text = "".join(char.data for char in group)
        if text.strip() or look[1]:
            runs.append((text, x, *look))
        x += len(text)
    return tuple(runs)


def _look(char: pyte.screens.Char) -> tuple[str, str, str]:
    colour, ground = _colour(char.fg) or TEXT, _colour(char.bg)
    if char.reverse:
        colour, ground = ground or BACKGROUND, colour
    kinds = (("b", char.bold), ("i", char.italics), ("u", char.underscore))
    return colour, ground, " ".join(name for name, on in kinds if on)


def _colour(name: str) -> str:
    return "" if name == "default" else COLOURS.get(name) or f"#{name}"


def draw(events: list[tuple[float, str]], columns: int, rows: int) -> str:
    """An SVG of the session, which repeats without end.

    Args:
        events: Seconds from 0, and what was printed then; the last one is the end.
        columns: Of the terminal.
        rows: Of the terminal.
    """
    shown, end = pictures(events, columns, rows), events[-1][0]
    width, height = columns * WIDTH + 2 * MARGIN, rows * HEIGHT + BAR + MARGIN
    numbers: dict[Row, int] = {}
    strip = []
    for number, (_, (lines, cursor)) in enumerate(shown):
        parts = [
            f'<use href="#r{numbers.setdefault(line, len(numbers))}" y="{y * HEIGHT}"/>'
            for y, line in enumerate(lines)
            if line
        ]
        if cursor is not None:
            x, y = cursor
            parts.append(
                f'<rect x="{x * WIDTH}" y="{y * HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
                'fill="#6f7683"/>'
            )
        strip.append(f'<g transform="translate({number * width})">{"".join(parts)}</g>')
    steps = "".join(
        f"{when / end:.3%}{{transform:translateX({-number * width}px)}}"
        for number, (when, _) in enumerate(shown)
    )
    style = f"{STYLE}#s{{animation:m {end:.2f}s steps(1,end) infinite}}@keyframes m{{{steps}}}"
    dots = "".join(
        f'<circle cx="{20 + 20 * n}" cy="17" r="6" fill="{colour}"/>'
        for n, colour in enumerate(("#ff5f58", "#ffbd2e", "#18c132"))
    )
    rows_drawn = "".join(f'<g id="r{n}">{"".join(_runs(row))}</g>' for row, n in numbers.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{style}</style><defs>{rows_drawn}</defs>'
        f'<rect width="{width}" height="{height}" rx="6" fill="{BACKGROUND}"/>{dots}'
        f'<svg x="{MARGIN}" y="{BAR}" width="{columns * WIDTH}" height="{rows * HEIGHT}">'
        f'<g id="s">{"".join(strip)}</g></svg></svg>\n'
    )


def _runs(row: Row) -> Iterator[str]:
    for text, x, colour, ground, kinds in row:
        place = f'x="{x * WIDTH}"'
        length = len(text) * WIDTH
        if ground:
            yield f'<rect {place} width="{length}" height="{HEIGHT}" fill="{ground}"/>'
        if text.strip():
            kinds_ = f' class="{kinds}"' if kinds else ""
            yield (
                f'<text {place} y="14" textLength="{length}" lengthAdjust="spacingAndGlyphs" '
                f'xml:space="preserve" fill="{colour}"{kinds_}>{escape(text, quote=False)}</text>'
            )
