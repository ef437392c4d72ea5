"""How a running job is shown: a bar in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import shutil
import time
from collections import deque
from typing import Any, TextIO

from tqdm import tqdm

from batchrun.report.text import seconds
from batchrun.runner.live import Progress
from batchrun.terminal import MESSAGE, printable, say

_LINE_EVERY_S = 5.0
_RATE_WINDOW_S = 20.0
_MARGIN = 4  # columns right of the bar: a ^C there must not wrap it
_ROWS_TO_TELL = 5  # the first rows of a batch end long after it began: they say little
_PHASES = {"load": "loading the model", "run": "running", "export": "writing the output"}


def make_view(stream: TextIO) -> BarView | LineView:
    """A bar where `stream` is a terminal, lines where it is not."""
    return BarView(stream) if stream.isatty() else LineView(stream)


class Rates:
    """Tokens a second, over the last seconds, and time left, by the rows of this run so far.

    Neither rows of earlier runs nor the time that loading takes count.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._began: tuple[float, int] | None = None

    def add(self, now: float, progress: Progress) -> None:
        """Takes note of the state at `now`, seconds of any clock that runs steadily."""
        if progress.phase != "run":
            self._seen.clear()
            self._began = None
            return
        self._began = self._began or (now, progress.rows_done)
        self._seen.append((now, progress.completion_tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _RATE_WINDOW_S:
            self._seen.popleft()

    def tokens_per_s(self) -> float | None:
        """Completion tokens a second; None before there is anything to measure."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return None
        (began, before), (now, after) = self._seen[0], self._seen[-1]
        return (after - before) / (now - began)

    def seconds_left(self, rows_total: int | None, rows_done: int) -> float | None:
        """Time to the last row at this run's pace; None while too few rows are done to tell."""
        if self._began is None or rows_total is None or not self._seen:
            return None
        rows, elapsed = rows_done - self._began[1], self._seen[-1][0] - self._began[0]
        return (rows_total - rows_done) * elapsed / rows if rows >= _ROWS_TO_TELL else None


class BarView:
    """A tqdm bar. It starts at the rows that are done when it appears: its rate is of others."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None
        self._phase = ""
        self._rates = Rates()

    def update(self, progress: Progress) -> None:
        """Redraws the bar, at most ten times a second."""
        if self._bar is None:
            self._bar = tqdm(
                total=progress.rows_total,
                initial=progress.rows_done,
                file=self._stream,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows{postfix}",
                delay=1e-9,  # the first draw has a description too
            )
        bar = self._bar
        bar.total = progress.rows_total
        bar.ncols = shutil.get_terminal_size().columns - _MARGIN
        bar.set_description_str(_phase(progress), refresh=False)
        self._rates.add(time.monotonic(), progress)
        bar.set_postfix_str(", ".join(_details(progress, self._rates)), refresh=False)
        if progress.phase != self._phase or progress.rows_done == bar.n:
            self._phase = progress.phase
            bar.refresh()
        bar.update(progress.rows_done - bar.n)

    def message(self, text: str) -> None:
        """Prints above the bar."""
        say(text, stream=self._stream, write=tqdm.write, limit=MESSAGE)

    def close(self) -> None:
        """Draws the bar a last time and leaves it there."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()


class LineView:
    """A line every few seconds, and one at each change of phase: for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rates = Rates()
        self._phase = ""
        self._printed_at = 0.0
        self._latest: Progress | None = None

    def update(self, progress: Progress) -> None:
        """Prints a line if it is time for one."""
        now = time.monotonic()
        self._rates.add(now, progress)
        self._latest = progress
        if progress.phase != self._phase or now - self._printed_at >= _LINE_EVERY_S:
            self._print(now, progress)

    def message(self, text: str) -> None:
        """Prints a line of its own."""
        say(text, stream=self._stream, limit=MESSAGE)

    def close(self) -> None:
        """Prints the last state."""
        if self._latest is not None:
            self._print(time.monotonic(), self._latest)

    def _print(self, now: float, progress: Progress) -> None:
        self._phase, self._printed_at, self._latest = progress.phase, now, None
        total = "?" if progress.rows_total is None else f"{progress.rows_total:,}"
        share = f" ({progress.rows_done / progress.rows_total:.0%})" if progress.rows_total else ""
        parts = [f"{progress.rows_done:,} of {total} rows{share}", *_details(progress, self._rates)]
        self.message(f"{_phase(progress)}: {', '.join(parts)}")


def _phase(progress: Progress) -> str:
    return _PHASES.get(progress.phase) or printable(progress.phase, 40)  # of a folder from afar


def _details(progress: Progress, rates: Rates) -> list[str]:
    parts = []
    rate = rates.tokens_per_s()
    if rate is not None:
        parts.append(f"{rate:,.0f} tokens/s")
    if progress.rows_resumed:
        parts.append(f"{progress.rows_resumed:,} resumed")
    if progress.rows_failed:
        parts.append(f"{progress.rows_failed:,} failed")
    left = rates.seconds_left(progress.rows_total, progress.rows_done)
    if left:
        parts.append(f"{seconds(left)} left")
    return parts
