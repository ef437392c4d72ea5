"""Runs a job in this process: progress on stderr, a clean Ctrl-C, the outcome on stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import click

from batchrun.cli.errors import ExitStatus
from batchrun.cli.progress import make_view
from batchrun.report.text import seconds
from jobs.folder import JobFolder
from jobs.stats import summarise

_STATUS = {
    "done": ExitStatus.DONE,
    "done-with-errors": ExitStatus.FAILED_ROWS,
    "interrupted": ExitStatus.INTERRUPTED,
}


class StopOnSignal:
    """While active, the first SIGINT or SIGTERM sets `event` and the second ends the process."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.event.is_set():
            # Every acknowledged result is on disk already, so nothing is lost by dying here.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.event.set()
        # Not `print`: the signal may have come in the middle of one, and that is not reentrant.
        os.write(2, b"\nstopping; Ctrl-C again to stop at once\n")


def run_in_foreground(job: JobFolder, *, as_json: bool = False) -> ExitStatus:
    """Runs the job to its end or to the first Ctrl-C, and prints how it went.

    Raises:
        JobError: Another process runs it, or its inputs or results cannot be read or written.
        ModelError: The model cannot be used.
        EngineError: The engine could not go on.
    """
    # How long a thread of torch's OpenMP spins for work before it sleeps; read when torch is
    # loaded. The default wins nothing over this on an idle machine, and makes a step three times
    # as slow where another process wants a core (benchmarks/README.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from batchrun.worker import run_job  # noqa: PLC0415  (imports torch)

    view = make_view(sys.stderr)
    view.message(f"job {job.id}")
    started = time.monotonic()
    with StopOnSignal() as stop:
        try:
            outcome = run_job(job.path, stop=stop.event, on_progress=view.update, log=view.message)
        finally:
            view.close()
    status = _STATUS.get(outcome, ExitStatus.FAILED)
    _report(job, outcome, status, time.monotonic() - started, as_json)
    return status


def _report(job: JobFolder, state: str, status: ExitStatus, wall_s: float, as_json: bool) -> None:
    summary = summarise(job)
    rows, output = summary["rows"], summary["output"]
    if as_json:
        outcome = {"job": job.id, "state": state, "exit_code": int(status), "output": output}
        click.echo(json.dumps({**outcome, "wall_s": wall_s, "rows": rows}, indent=2))
        return
    total = "?" if rows["total"] is None else f"{rows['total']:,}"
    line = f"{rows['done']:,} of {total} rows in {seconds(wall_s)}"
    if rows["resumed"]:
        line += f", {rows['resumed']:,} of them kept from earlier runs"
    if rows["failed"]:
        line += f", {rows['failed']:,} failed (the column `error` says why)"
    if status in (ExitStatus.DONE, ExitStatus.FAILED_ROWS):
        click.echo(f"{line}\noutput: {output}\nnext:   batchrun stats {job.id}")
    else:
        click.echo(f"{state} after {line}\nnext:   batchrun resume {job.id}")
