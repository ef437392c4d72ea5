"""`--on-done`: a command of the user's that a job's supervisor runs when the job has ended.

It runs once the job's lock and its place in the queue are free, so that it may export the job or
resume it. Nothing that it does changes how the job ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen, TimeoutExpired
from threading import Thread
from types import FrameType
from typing import IO

from batchrun.jobs.errors import JobError
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.snapshot import WAITING, JobSnapshot
from batchrun.runner.live import HOOK, Reporter, read_progress
from batchrun.runner.overdue import hook_seconds

NAME = "--on-done"  # what the log calls it
_POLL_S = 0.1
_END_S = 5.0  # to end by itself once it was told to
_LINES, _LINE = 1000, 2000  # lines of its output that are logged, and bytes of each
_OURS = Path(__file__).parents[2]  # what `children.inheriting` adds to PYTHONPATH


class Hook:
    """The command of a job, and how the job ended.

    Args:
        job: The job.
    """

    def __init__(self, job: JobFolder) -> None:
        self._job = job
        self._ended: JobSnapshot | None = None
        self._told = False

    def note_end(self) -> None:
        """Note how the job ended, while nobody else can have it."""
        noted = JobSnapshot.load(self._job.path)
        if noted is not None and noted.state not in WAITING:
            self._ended = noted

    def run(self) -> None:
        """Run the command, if the job has one; its output and its failure go to the job's log."""
        with suppress(JobError, OSError), Reporter(self._job.path) as reporter:
            runtime, output = self._job.spec().runtime, self._job.spec().output
            ended = self._ended or self._job.snapshot()
            if not runtime.on_done or ended.state in WAITING:  # another process has the job
                return
            if (why := self._job.foreign()) is not None:
                reporter.message(f"{NAME}: not run: it may be another user's command ({why})")
                return
            own = {
                "BATCHRUN_JOB": self._job.id,
                "BATCHRUN_STATE": ended.state,
                "BATCHRUN_OUTPUT": output.path,
                "BATCHRUN_ROWS_DONE": str(ended.done or 0),
                "BATCHRUN_ROWS_FAILED": str(ended.failed),
            }
            if (last := read_progress(self._job.path)) is not None:
                reporter.update(replace(last, phase=HOOK, phase_done=0, phase_total=0))
            try:
                problem = self._run(runtime.on_done, own, reporter)
            except (JobError, OSError) as error:
                problem = f"it can't be run: {error}"
            if problem is not None:
                reporter.message(f"{NAME}: {problem}")

    def _run(self, command: str, own: Mapping[str, str], reporter: Reporter) -> str | None:
        """Run the command; returns what went wrong."""
        limit = hook_seconds()
        with self._heard(), _shell(command, {**environment(os.environ), **own}) as child:
            assert child.stdout is not None
            reader = Thread(target=_log, args=(child.stdout, reporter), daemon=True)
            reader.start()
            until, problem = time.monotonic() + limit, None
            while problem is None:
                with suppress(TimeoutExpired):
                    code = child.wait(_POLL_S)
                    problem = _failure(code)
                    break
                if self._told:
                    problem = "it was stopped"
                elif time.monotonic() > until:
                    problem = f"it did not finish in {limit:g} s and was stopped"
            else:
                _end(child)
            reader.join(1.0)  # what it left behind may keep the pipe open
            return problem

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Signals end the command, and then this process."""

        def handle(number: int, frame: FrameType | None) -> None:
            self._told = True

        before = [(n, signal.signal(n, handle)) for n in (signal.SIGINT, signal.SIGTERM)]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """A supervisor's environment as its user had it, with `batchrun` in reach.

    A job that the command submits must not get the command again from a variable.
    """
    found = {name: value for name, value in ours.items() if name != "BATCHRUN_ON_DONE"}
    found.pop("PYTHONSAFEPATH", None)
    places = [p for p in found.pop("PYTHONPATH", "").split(os.pathsep) if p not in ("", str(_OURS))]
    if places:
        found["PYTHONPATH"] = os.pathsep.join(places)
    here = os.path.dirname(sys.executable)
    return {**found, "PATH": os.pathsep.join(filter(None, (found.get("PATH", os.defpath), here)))}


@contextmanager
def _shell(command: str, env: Mapping[str, str]) -> Iterator[Popen[bytes]]:
    """The command in a session of its own. On the way out nothing waits for its pipe."""
    child = Popen(
        ["/bin/sh", "-c", command],
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        env=env,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        child.poll()


def _end(child: Popen[bytes]) -> None:
    """End the command and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(TimeoutExpired):
            child.wait(_END_S)
            return


def _failure(code: int) -> str | None:
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it failed with exit code {code}" if code else None


def _log(output: IO[bytes], reporter: Reporter) -> None:
    """Log the first lines of what a command prints; read the rest, so that it is not held up."""
    logged = 0
    with output:
        while line := output.readline(_LINE):
            if logged < _LINES:
                reporter.message(f"{NAME}: {line.decode(errors='replace').rstrip()}")
            elif logged == _LINES:
                reporter.message(f"{NAME}: its further output is not logged")
            logged += 1
