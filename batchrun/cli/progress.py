"""How a running job is shown: a few lines that are redrawn in a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from batchrun.jobs.inflight import ReaderNote, Reading
from batchrun.report.text import size
from batchrun.runner.isolated import isolated
from batchrun.runner.live import Progress
from batchrun.runner.words import PHASES, clock, time_left
from batchrun.terminal import MESSAGE, printable, redraws, say, tell

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

T = TypeVar("T")
Tell = Callable[..., None]

_DRAWN_EVERY_S = 0.1
_LINE_EVERY_S, _LINE_AT_MOST_S = 2.0, 60.0  # more seldom the longer it takes
_LINE_SHARE = 0.05  # of the time so far
_SILENT_S = 1.0  # what ends sooner needs no words
_KV_BAR = 24  # characters
_WIDTH = 32  # of the bar


class View:
    """Shows a job on a stream until it is closed.

    Args:
        stream: Usually stderr.
    """

    def __init__(self, stream: TextIO) -> None:
        self._way: _Drawn | _Lines = _Drawn(stream) if redraws(stream) else _Lines(stream)
        self._latest: Progress | None = None

    def update(self, progress: Progress) -> None:
        """Show the progress, if that is due."""
        self._latest = progress
        self._way.update(progress)

    def message(self, text: str) -> None:
        """Print a line of its own."""
        self._way.message(text)

    def close(self) -> None:
        """Show the last state, and leave it there."""
        if self._latest is not None:
            self._way.update(self._latest, last=True)
            self._latest = None
        self._way.close()


class _Lines:
    """A line at each change of phase, and now and then in between."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phase, self._line, self._began, self._shown = "", "", time.monotonic(), 0.0

    def update(self, progress: Progress, *, last: bool = False) -> None:
        now = time.monotonic()
        pause = min(_LINE_AT_MOST_S, max(_LINE_EVERY_S, _LINE_SHARE * (now - self._began)))
        if progress.phase != self._phase or now - self._shown >= pause or last:
            line = ": ".join(filter(None, (_phase(progress), ", ".join(_details(progress)))))
            if line != self._line:
                self._phase, self._line, self._shown = progress.phase, line, now
                self.message(line)

    def message(self, text: str) -> None:
        say(text, stream=self._stream, limit=MESSAGE)

    def close(self) -> None:
        pass


class _Drawn:
    """Lines at the bottom of a terminal, redrawn several times a second."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console  # noqa: PLC0415 - takes a tenth of a second
        from rich.live import Live  # noqa: PLC0415

        self._stream, self._shown = stream, 0.0
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False)

    def update(self, progress: Progress, *, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._shown < _DRAWN_EVERY_S:
            return
        self._shown = now
        if not self._live.is_started:
            self._live.start()
        self._live.update(_drawing(progress, self._console), refresh=True)

    def message(self, text: str) -> None:
        from rich.text import Text  # noqa: PLC0415

        above = partial(self._console.print, soft_wrap=True)
        say(
            text,
            stream=self._stream,
            write=lambda line, file: above(Text(line)),
            limit=MESSAGE,
        )

    def close(self) -> None:
        self._live.stop()


def _drawing(progress: Progress, console: Console) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    overflow: Any = "crop" if _is_plain(console) else "ellipsis"

    def line(*parts: tuple[str, str]) -> Text:
        return Text.assemble(*parts, no_wrap=True, overflow=overflow)

    since = time.time() - progress.submitted_at if progress.submitted_at else progress.elapsed_s
    head = [(_phase(progress), "bold")]
    if progress.phase_total:
        head.append((f"  {_part_of_phase(progress)}", ""))
    head.append((f"  {clock(since)}", ""))
    if left := time_left(progress):
        head.append((f", {left}", "cyan"))
    lines = [line(*head)]
    if progress.rows_total is not None:
        share = progress.rows_done / progress.rows_total if progress.rows_total else 1.0
        width = max(4, min(_WIDTH, console.width - 30))
        bar = _bar(console, (share, "green"), (1.0, "bright_black"), width=width)
        lines.append(line(*bar, (f" {_percent(share)}", "bold"), (f"  {_rows(progress)}", "")))
    if (now := progress.tokens_per_s) is not None:
        mean = progress.mean_tokens_per_s or now
        speed = (f"{now:,.0f} tokens/s", "bold"), (f", {mean:,.0f} on average", "dim")
        busy = f"  {progress.running:,} rows running, {progress.waiting:,} waiting"
        lines.append(line(*speed, (busy, "")))
    if progress.kv_budget:
        live, mapped, most = progress.kv_live, progress.kv_mapped, progress.kv_budget
        shares = (live / most, "green"), (mapped / most, "yellow"), (1.0, "bright_black")
        words = f" {size(live)} live, {size(mapped)} mapped of {size(most)}"
        lines.append(line(("KV memory ", ""), *_bar(console, *shares), (words, "dim")))
    if progress.rows_failed:
        lines.append(line((_failed(progress), "red")))
    return Group(*lines)


def _bar(
    console: Console, *parts: tuple[float, str], width: int = _KV_BAR
) -> list[tuple[str, str]]:
    """Pieces of a bar, each up to a share of the whole, in a colour."""
    marks = "#=." if _is_plain(console) else "━━─"
    pieces, at = [], 0
    for number, (share, colour) in enumerate(parts):
        end = min(width, int(share * width))
        if share > 0 and number < len(parts) - 1 and end == at and at < width:
            end += 1  # little is not nothing
        mark = marks[-1] if number == len(parts) - 1 else marks[min(number, 1)]
        pieces.append((mark * max(0, end - at), colour))
        at = max(at, end)
    return pieces


def _is_plain(console: Console) -> bool:
    """Whether the terminal knows no other characters than letters."""
    return not console.encoding.lower().startswith("utf")


def _details(progress: Progress) -> list[str]:
    """What a plain line says of a job."""
    parts = []
    if progress.phase_total:
        parts.append(_part_of_phase(progress))
    elif progress.phase != "run" and progress.submitted_at:
        parts.append(clock(time.time() - progress.submitted_at))
    if progress.phase == "run":
        total = progress.rows_total
        share = f" ({_percent(progress.rows_done / total)})" if total else ""
        parts.append(_rows(progress) + share)
        if progress.tokens_per_s is not None:
            parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if progress.rows_failed:
        parts.append(_failed(progress))
    if progress.phase == "run" and (left := time_left(progress)):
        parts.append(left)
    return parts


def _phase(progress: Progress) -> str:
    return PHASES.get(progress.phase) or printable(progress.phase, 40)  # may be untrusted


def _part_of_phase(progress: Progress) -> str:
    done, total = progress.phase_done, progress.phase_total
    if progress.phase == "load":
        return f"{size(done)} of {size(total)}"
    return f"{done:,} of {total:,} rows"


def _rows(progress: Progress) -> str:
    total = "?" if progress.rows_total is None else f"{progress.rows_total:,}"
    kept = f", {progress.rows_resumed:,} from earlier runs" if progress.rows_resumed else ""
    return f"{progress.rows_done:,} of {total} rows{kept}"


def _percent(share: float) -> str:
    """Rounded down: 100% means all."""
    return f"{int(share * 100)}%"


def _failed(progress: Progress) -> str:
    reason = printable(progress.reason, 60).replace("_", " ")
    return f"{progress.rows_failed:,} failed" + (f", most often: {reason}" if reason else "")


class Waiting:
    """Says that something takes its time, and how far it is, until the block ends.

    Args:
        doing: What is done, such as "reading the input".
        stream: Usually stderr.
    """

    def __init__(self, doing: str, stream: TextIO) -> None:
        self._doing, self._stream = doing, stream
        self._drawn = redraws(stream)
        self._began = time.monotonic()
        self._shown = self._began

    def look(self, at: str = "") -> None:
        """Show the present state, if that is due; `at` says where it is."""
        now = time.monotonic()
        passed = now - self._began
        pause = _DRAWN_EVERY_S if self._drawn else max(_LINE_EVERY_S, _LINE_SHARE * 4 * passed)
        if passed < _SILENT_S or now - self._shown < pause:
            return
        self._shown = now
        text = ", ".join(filter(None, (f"{self._doing}: {clock(passed)}", at)))
        if not self._drawn:
            say(text, stream=self._stream, limit=MESSAGE)
            return
        width = max(10, shutil.get_terminal_size().columns - 1)
        say(text, stream=self._stream, limit=width, write=_over)

    def tell(self, *lines: str) -> None:
        """Print messages without leaving a part of the state behind them."""
        self._clear()
        tell(*lines)

    def _clear(self) -> None:
        if self._drawn:
            say("", stream=self._stream, write=_over)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()


def waited(doing: str, work: Callable[[ReaderNote, Tell], T]) -> T:
    """Run `work` as `isolated` does, and say on stderr how far it is.

    Args:
        doing: What it does, such as "reading the input".
        work: Called with a note to take, and with what prints messages meanwhile.

    Raises:
        JobError, ModelError: See `isolated`.
    """
    with Waiting(doing, sys.stderr) as waiting:
        return isolated(
            lambda note: work(note, waiting.tell),
            look=lambda at: waiting.look(str(at) if isinstance(at, Reading) else ""),
        )


def _over(line: str, file: TextIO) -> None:
    """Write a line over the last one, and stay at its beginning."""
    file.write(f"\r\x1b[2K{line}\r")
