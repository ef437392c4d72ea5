"""How a job shows itself to somebody at a notebook or a Python prompt.

Ids, paths and reasons are data: text passes the gate of `batchrun.terminal`, and HTML is escaped.
"""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from contextlib import suppress
from html import escape
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from batchrun.errors import MachineError
from batchrun.jobs.errors import JobError
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.snapshot import FINISHED
from batchrun.runner.live import Progress
from batchrun.runner.words import PHASES, time_left
from batchrun.terminal import MESSAGE, printable

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows [{elapsed}{postfix}]"
_EVERY_S = 0.1
_MARGIN = 4  # columns right of the bar: a ^C there must not wrap it
_LINE = 200  # characters of an id or a name


def watched() -> bool:
    """Whether somebody sees a progress bar: in a notebook, or with stderr on a terminal."""
    return _in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class Bar:
    """A progress bar over rows: a widget in a notebook that has widgets, else a line of text.

    Args:
        wanted: Whether to show it; None means wherever somebody sees it.
        doing: What it says at first.
        delay: Seconds before it appears.
    """

    def __init__(self, wanted: bool | None, doing: str, delay: float = 0.0) -> None:
        self._wanted = watched() if wanted is None else wanted
        self._began = time.time()
        self._due = self._began + delay
        self._bar: Any = None
        self._shown: tuple[str, int | None] | None = None
        self.show(doing, None, 0, 0)

    def follow(self, progress: Progress) -> None:
        """Show a job's progress."""
        phase = PHASES.get(progress.phase) or printable(progress.phase, 40)
        left = time_left(progress)
        self.show(phase, progress.rows_total, progress.rows_done, progress.rows_failed, left)

    def show(self, doing: str, total: int | None, done: int, failed: int, left: str = "") -> None:
        """Show what is done now, if an update is due.

        Args:
            doing: The phase. Rows that were done when it began don't count for its pace.
            total: Number of rows; None if not yet known.
            done: Rows that have ended, failed ones among them.
            failed: Rows that failed.
            left: The time left, in words.
        """
        self._latest = doing, total, done, failed, left
        if self._wanted and time.time() >= self._due:
            self._draw()

    def end(self, state: str, total: int | None, done: int, failed: int) -> None:
        """Show how a job has ended, and how long it was watched."""
        self._latest = printable(state, 40), total, done, failed, ""
        if self._bar is not None:
            self._shown = self._latest[:2]
            self._bar.total, self._bar.start_t = total, self._began

    def _draw(self) -> None:
        doing, total, done, failed, left = self._latest
        first = self._bar is None
        if first:
            with warnings.catch_warnings():  # a notebook without widgets gets a line of text
                warnings.simplefilter("ignore")
                from tqdm.auto import tqdm  # noqa: PLC0415 - what it is depends on where it is

                notebook = _in_notebook()
                where = sys.stdout if notebook else None  # there, stderr looks like an error
                # Else a thread that redraws bars would stay for as long as the process.
                alone = type("Rows", (tqdm,), {"monitor_interval": 0})
                self._bar = alone(total=total, file=where, bar_format=_BAR, dynamic_ncols=notebook)
        if not self._bar.dynamic_ncols:
            self._bar.ncols = shutil.get_terminal_size().columns - _MARGIN
        self._bar.set_description_str(doing, refresh=False)
        if (doing, total) != self._shown:
            self._shown = doing, total
            self._bar.reset(total)
            self._bar.initial = 0 if first else done
            self._bar.last_print_n = self._bar.n = self._bar.initial
            if first:
                self._bar.start_t = self._bar.last_print_t = self._began
        more = filter(None, (f"{failed:,} failed" if failed else "", left))
        self._bar.set_postfix_str(", ".join(more), refresh=False)
        if not self._bar.update(done - self._bar.n):
            self._bar.refresh()
        self._due = time.time() + _EVERY_S

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.close()


def line(job: JobFolder) -> str:
    """A job in one line: its state, its rows, and how many of them failed. Never raises."""
    state, rows = _state_and_rows(job)
    return f"<Job {printable(job.id, _LINE)} {state}{': ' if rows else ''}{rows}>"


def html(job: JobFolder) -> str:
    """The same for a notebook, with the model, the output and why it failed. Never raises.

    It sets no colours, so that it can be read on light and dark ground.
    """
    state, rows = _state_and_rows(job)
    lines = [f"<b>Job</b> <code>{_text(job.id)}</code> {_text(state)}", _text(rows)]
    with suppress(JobError, OSError):
        spec = job.spec()
        lines.append(f"model: <code>{_text(spec.model.name)}</code>")
        if spec.output.path and not spec.output.path.startswith(str(job.path)):  # or in the job's
            lines.append(f"output: <code>{_text(spec.output.path)}</code>")
    with suppress(JobError, OSError):
        if state == "failed" and (failure := job.failure()) is not None:
            lines += [_text(words) for words in failure if words]
    return f"<div>{'<br>'.join(filter(None, lines))}</div>"


def _text(words: object) -> str:
    return escape(printable(words, MESSAGE))


def _state_and_rows(job: JobFolder) -> tuple[str, str]:
    try:
        now = job.snapshot()
    except (JobError, OSError):
        return ("damaged" if job.path.exists() else "removed"), ""
    state = printable(now.state, 40)
    if now.done is None or (now.total is None and not now.done):
        return state, ""
    rows = f"{now.done:,} of {'?' if now.total is None else f'{now.total:,}'} rows"
    if now.state in FINISHED and now.done == now.total:
        rows = f"{now.done:,} row{'s' * (now.done != 1)}"
    return state, rows + f", {now.failed:,} failed" * bool(now.failed)


def pandas_of(table: pa.Table) -> pd.DataFrame:
    """A table as a DataFrame of pandas.

    Whole numbers and booleans stay what they are where values are missing: such a column has
    pandas' nullable type, and not floats, which would change large numbers. Lists and structs with
    whole numbers are Python's lists and dicts for the same reason.

    Raises:
        MachineError: There is no pandas here.
    """
    pd = _library("pandas")
    import pyarrow as pa  # noqa: PLC0415 - what only lists jobs loads no Arrow

    nullable = {
        getattr(pa, name.lower())(): getattr(pd, f"{name}Dtype")()
        for name in ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64")
    }
    nullable[pa.bool_()] = pd.BooleanDtype()
    frame = table.to_pandas()
    for name in frame.columns.intersection(table.column_names):
        column = table[name]
        if column.null_count and column.type in nullable:
            frame[name] = column.to_pandas(types_mapper=nullable.get).set_axis(frame.index)
        elif _holds_integers(column.type):
            frame[name] = pd.Series(column.to_pylist(), frame.index, object)
    return frame


def _holds_integers(kind: pa.DataType) -> bool:
    """Whether values of a nested type have whole numbers somewhere inside."""
    from pyarrow import types  # noqa: PLC0415 - what only lists jobs loads no Arrow

    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return any(types.is_integer(each) or _holds_integers(each) for each in inner)


def polars_of(table: pa.Table) -> pl.DataFrame:
    """A table as a DataFrame of polars.

    Raises:
        MachineError: There is no polars here.
    """
    return _library("polars").from_arrow(table)  # type: ignore[no-any-return]


def _library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        why = "is not installed" if missing else f"can't be loaded: {error}"
        raise MachineError(f"{name} {why}", hint=f"pip install {name}") from error
