"""Watches a job that runs in its own process: progress on stderr, the outcome on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from batchrun.cli.errors import ExitStatus, print_error
from batchrun.cli.piped import hand_out
from batchrun.cli.progress import BarView, LineView, make_view
from batchrun.cli.work import STATUS
from batchrun.jobs.errors import JobError
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.lease import held_by
from batchrun.jobs.stats import summarise
from batchrun.report.text import seconds
from batchrun.runner import supervisor
from batchrun.runner.live import LogTail, read_progress
from batchrun.submission import start
from batchrun.terminal import say, say_json, tell

_POLL_S = 0.1
_BEGIN_S = 30.0  # that `--detach` waits for a worker to begin, to tell of one that can't


def run(
    taking: AbstractContextManager[JobFolder],
    *,
    as_json: bool,
    detach: bool = False,
) -> ExitStatus:
    """Start a worker for a job, and watch it unless told to leave it alone.

    Args:
        taking: Gives the job; entered before anything is done, and left when the worker has it.
        as_json: Print the outcome as JSON.
        detach: Leave it alone.

    Raises:
        LeaseHeld: It has a worker.
    """
    with taking as job:
        tail = LogTail.at_end(job.path)
        worker = start(job)
    if detach:
        return _detach(job, worker, as_json)

    status = watch(job, as_json=as_json, tail=tail, alive=worker.alive)
    output = job.spec().output
    if output.stdout and status in (ExitStatus.DONE, ExitStatus.FAILED_ROWS):
        hand_out(Path(output.path))
    return status


def _detach(job: JobFolder, worker: supervisor.Started, as_json: bool) -> ExitStatus:
    """Say which job it is, once its worker has begun to work."""
    if worker.began(_BEGIN_S) is False:
        worker.note_failure()
        return _report(job, 0, as_json)
    if as_json:
        say_json({"job": job.id, "state": job.state()}, indent=None)
    else:
        say(job.id, f"next:   batchrun watch {job.id}")
    return ExitStatus.DONE


def watch(
    job: JobFolder,
    *,
    as_json: bool,
    tail: LogTail | None = None,
    alive: Callable[[], bool] | None = None,
) -> ExitStatus:
    """Show the job until its worker ends, then say how it went.

    Args:
        job: The job.
        as_json: Print the outcome as JSON.
        tail: What is shown of its log; by default, what is added from now on.
        alive: Whether the worker lives; by default, whether the job's lock is held.
    """
    alive = alive or (lambda: held_by(job.path) is not None)
    view, tail = make_view(sys.stderr), tail or LogTail.at_end(job.path)
    started = time.monotonic()
    view.message(f"job {job.id}")
    try:
        last = False
        while not last:
            last = not alive()  # what was written until then is shown too
            _show(job, view, tail)
            if not last:
                time.sleep(_POLL_S)
    except KeyboardInterrupt:
        view.close()
        tell(
            "",
            f"the job {job.id} goes on without this view",
            f"next:   batchrun watch {job.id}, or: batchrun cancel {job.id}",
        )
        return ExitStatus.INTERRUPTED
    view.close()
    return _report(job, time.monotonic() - started, as_json)


def _show(job: JobFolder, view: BarView | LineView, tail: LogTail) -> None:
    for line in tail.lines():
        view.message(str(line["message"]))
    progress = read_progress(job.path)
    if progress is not None:
        view.update(progress)


def _report(job: JobFolder, wall_s: float, as_json: bool) -> ExitStatus:
    """Print how the job stands, and return what the process exits with."""
    state, failure = job.state(), job.failure()
    status = STATUS.get(state, ExitStatus.FAILED)
    try:
        summary = summarise(job)
    except JobError as error:
        print_error(str(error), error.hint)
        return ExitStatus.FAILED
    rows, output = summary["rows"], summary["output"]
    progress = read_progress(job.path)
    if progress is not None:
        wall_s = progress.elapsed_s  # the run's, which may be longer than the view of it
    if failure is not None and status is not ExitStatus.DONE:
        print_error(*failure)
    if as_json:
        outcome = {"job": job.id, "state": state, "exit_code": int(status), "output": output}
        say_json({**outcome, "wall_s": wall_s, "rows": rows})
        return status
    total = "?" if rows["total"] is None else f"{rows['total']:,}"
    line = f"{rows['done']:,} of {total} rows in {seconds(wall_s)}"
    if rows["resumed"]:
        line += f", {rows['resumed']:,} of them kept from earlier runs"
    if rows["failed"]:
        line += f", {rows['failed']:,} failed (the column `error` says why)"
    aside = job.spec().output.stdout  # stdout has the answers
    if status in (ExitStatus.DONE, ExitStatus.FAILED_ROWS):
        say(line, f"output: {output}", f"next:   batchrun stats {job.id}", err=aside)
    else:
        say(f"{state} after {line}", f"next:   batchrun resume {job.id}", err=aside)
    return status
