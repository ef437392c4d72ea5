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

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows{postfix}"
_BAR_EVERY_S = 0.1
_LINE_EVERY_S = 5.0
_RATE_WINDOW_S = 20.0
_MARGIN = 4  # columns right of the bar: a ^C there must not wrap it
_ROWS_TO_TELL = 5  # a batch's first rows end long after it began, so they say little
_PHASES = {"load": "loading the model", "run": "running", "export": "writing the output"}


class Rates:
    """Tokens per second over the last seconds, and time left by the rows of this run so far.

    Rows of earlier runs and the time for loading don't count.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._began: tuple[float, int] | None = None

    def add(self, now: float, progress: Progress) -> None:
        """Notes the state at `now`, in seconds of any steady clock."""
        if progress.phase != "run":
            self._seen.clear()
            self._began = None
            return
        self._began = self._began or (now, progress.rows_done)
        self._seen.append((now, progress.completion_tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _RATE_WINDOW_S:
            self._seen.popleft()

    def tokens_per_s(self) -> float | None:
        """Completion tokens per second; None until there is something to measure."""
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


class View:
    """A bar in a terminal; elsewhere a line every few seconds, and at each change of phase."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._rates = stream, Rates()
        self._bar: Any = None
        self._every_s = _BAR_EVERY_S if stream.isatty() else _LINE_EVERY_S
        self._phase, self._shown_at = "", 0.0
        self._latest: Progress | None = None

    def update(self, progress: Progress) -> None:
        """Shows the progress if an update is due."""
        now = time.monotonic()
        self._rates.add(now, progress)
        self._latest = progress
        if progress.phase != self._phase or now - self._shown_at >= self._every_s:
            self._show(now, progress)

    def message(self, text: str) -> None:
        """Prints a line of its own, above the bar."""
        write = print if self._bar is None else tqdm.write
        say(text, stream=self._stream, write=write, limit=MESSAGE)

    def close(self) -> None:
        """Shows the last state, and leaves it there."""
        if self._latest is not None:
            self._show(time.monotonic(), self._latest)
        if self._bar is not None:
            self._bar.close()

    def _show(self, now: float, progress: Progress) -> None:
        self._phase, self._shown_at, self._latest = progress.phase, now, None
        details, total = _details(progress, self._rates), progress.rows_total
        if self._stream.isatty():
            if self._bar is None:  # not before there is something to draw
                self._bar = tqdm(file=self._stream, bar_format=_BAR, delay=1e-9)
            bar = self._bar
            bar.total, bar.n = total, progress.rows_done
            bar.ncols = shutil.get_terminal_size().columns - _MARGIN
            bar.set_description_str(_phase(progress), refresh=False)
            bar.set_postfix_str(", ".join(details), refresh=False)
            bar.refresh()
            return
        share = f" ({progress.rows_done / total:.0%})" if total else ""
        rows = f"{progress.rows_done:,} of {'?' if total is None else f'{total:,}'} rows{share}"
        self.message(f"{_phase(progress)}: {', '.join([rows, *details])}")


def _phase(progress: Progress) -> str:
    return _PHASES.get(progress.phase) or printable(progress.phase, 40)  # may be untrusted


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
