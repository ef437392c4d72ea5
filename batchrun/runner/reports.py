"""What a run tells whoever watches: its phase, its rows, its speed, and the time left."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from batchrun.engine.core import Request
from batchrun.estimate.measured import Measured
from batchrun.estimate.outlook import Countdown, InFlight, Left, Outlook
from batchrun.jobs.journal.results import Result
from batchrun.jobs.spec import JobSpec
from batchrun.runner.figures import RunFigures
from batchrun.runner.live import Progress

_EVERY_S, _LEFT_EVERY_S = 0.25, 1.0
_RATE_S = 10.0  # over which the present speed is measured


class Written(Protocol):
    """What is in the journal."""

    @property
    def samples(self) -> int:
        """Results, including those of earlier runs."""

    @property
    def failed(self) -> int:
        """Rows that have an error."""

    @property
    def reasons(self) -> Mapping[str, int]:
        """Failed results by kind of error."""


class Rates:
    """Tokens per second, over the last seconds and on average."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._first: tuple[float, int] | None = None

    def add(self, now: float, tokens: int) -> None:
        """Note how many tokens there are at `now`, in seconds of a steady clock."""
        self._first = self._first or (now, tokens)
        self._seen.append((now, tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _RATE_S:
            self._seen.popleft()

    @property
    def now(self) -> float | None:
        """Over the last seconds; None until there is something to measure."""
        return self._since(self._seen[0]) if self._seen else None

    @property
    def mean(self) -> float | None:
        """Since the first call."""
        return None if self._first is None else self._since(self._first)

    def _since(self, begin: tuple[float, int]) -> float | None:
        seconds = self._seen[-1][0] - begin[0]
        return (self._seen[-1][1] - begin[1]) / seconds if seconds > 0 else None


class Reports:
    """Tells of one run, a few times a second at most.

    Args:
        spec: The job.
        figures: The run's.
        written: What is in the journal.
        total: The job's rows.
        kept: Rows that earlier runs finished.
        earlier: What earlier runs taught about the speed of steps.
        tell: Told where the run is.
    """

    def __init__(
        self,
        spec: JobSpec,
        figures: RunFigures,
        written: Written,
        *,
        total: int,
        kept: int,
        earlier: Measured | None,
        tell: Callable[[Progress], None],
    ) -> None:
        self._spec, self._figures, self._written, self._tell = spec, figures, written, tell
        self._total, self._kept, self._earlier = total, kept, earlier
        self._missing = total * spec.n - written.samples  # when the run began
        self._ended = self._ended_most = 0  # samples computed; tokens that they could have
        self._outlook: Outlook | None = None
        self._countdown, self._rates = Countdown(), Rates()
        self._left: Left | None = None
        self._measured: dict[str, Any] = {}
        self._told = self._looked = -_LEFT_EVERY_S
        self._lock = threading.Lock()

    def phase(self, phase: str, done: int = 0, of: int = 0) -> None:
        """Tell of a phase other than running, and how far it is: bytes, or rows."""
        with self._lock:
            now = time.perf_counter()
            if done and done < of and now < self._told + _EVERY_S:
                return
            self._told = now
            self._tell(self._progress(phase, phase_done=done, phase_total=of))

    def ended(self, request: Request, result: Result) -> None:
        """Note that a row was computed."""
        allowed = request.params.max_tokens
        self._ended += 1
        self._ended_most += allowed
        if self._outlook is not None and allowed and result.status == "ok":
            self._outlook.lengths.add(result.completion_tokens, allowed)

    def running(
        self, load: tuple[int, int, int], rows: Callable[[], Sequence[tuple[int, int]]]
    ) -> None:
        """Tell of the running engine.

        Args:
            load: Its rows that run and that wait, and the tokens generated so far.
            rows: Returns, for each running row, the tokens that it has and may have.
        """
        now = time.perf_counter()
        if now >= self._told + _EVERY_S:
            self._told = now
            self._look(now, load, rows)
        running, waiting, tokens = load
        counts = {"running": running, "waiting": waiting, "completion_tokens": tokens}
        self._tell(self._progress("run", **counts, **self._measured))

    def _look(
        self,
        now: float,
        load: tuple[int, int, int],
        rows: Callable[[], Sequence[tuple[int, int]]],
    ) -> None:
        """Measure what takes too long to be measured after each step."""
        figures = self._figures.so_far()
        self._rates.add(now, load[2])
        if now >= self._looked + _LEFT_EVERY_S:
            self._looked = now
            left = self._estimate(figures, rows())
            self._left = None if left is None else self._countdown.shown(now, left)
        elif self._left is not None:
            self._left = self._countdown.at(now, self._left)
        seconds, least, most = self._left or (None, None, None)
        self._measured = {
            **{name: figures[name] for name in ("kv_live", "kv_mapped", "kv_budget")},
            "tokens_per_s": self._rates.now,
            "mean_tokens_per_s": self._rates.mean,
            "seconds_left": seconds,
            "least_left": least,
            "most_left": most,
        }

    def _estimate(
        self, figures: Mapping[str, Any], running: Sequence[tuple[int, int]]
    ) -> Left | None:
        reader = self._figures.reader
        if reader is None or not figures["steps"]:
            return None
        if self._outlook is None:
            stops = 2 * reader.read_so_far.stopping > reader.read_so_far.to_compute
            places, alike = figures["max_num_seqs"], self._spec.n
            self._outlook = Outlook(self._earlier, places, stops=stops, alike=alike)
        rows = [(tokens, most) for tokens, most in running if most]
        read = reader.read_so_far
        waiting = read.to_compute - self._ended - len(rows)
        share = read.to_compute / max(1, read.samples)
        unread = max(0, self._missing - read.samples) * share
        most = read.most_tokens - self._ended_most - sum(most for _, most in rows)
        in_flight = InFlight(
            generated=[tokens for tokens, _ in rows],
            allowed=[most for _, most in rows],
            coming=max(0, waiting) + unread,
            prompt_tokens=read.prompt_tokens / max(1, read.to_compute),
            most_tokens=(
                max(0, most) / waiting
                if waiting > 0
                else read.most_tokens / max(1, read.to_compute)
            ),
        )
        return self._outlook.left(figures, in_flight, len(figures["devices"]) or 1)

    def _progress(self, phase: str, **more: Any) -> Progress:
        written, reasons = self._written, self._written.reasons
        return Progress(
            rows_total=self._total,
            rows_done=written.samples // self._spec.n,
            rows_failed=written.failed,
            rows_resumed=self._kept,
            elapsed_s=time.perf_counter() - self._figures.began,
            phase=phase,
            reason=max(reasons, key=lambda kind: reasons[kind]) if reasons else "",
            **more,
        )
