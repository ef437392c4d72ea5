"""Ends a job: asks its processes to stop, and kills those that don't.

This works whatever they hang in and whichever is left. The kernel says who they are (`holders`).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from batchrun.jobs.errors import JobError
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.holders import Process, holders, send
from batchrun.jobs.lease import LOCK, Lease, held_by, holder
from batchrun.jobs.snapshot import FINISHED, WAITING, JobSnapshot

ASK_S = 6.0  # for a run to end by itself and keep the tokens of unfinished rows
KILL_S = 3.0  # for the kernel to end what was killed
_POLL_S = 0.05
_UNSEEN = 10  # consecutive looks that find the lock held, but no holder


def cancel(job: JobFolder, ask_s: float = ASK_S, kill_s: float = KILL_S) -> str:
    """End a running or queued job, and return a sentence for the user on how it went.

    Journalled results are kept. On return no process holds the job, and it is cancelled unless it
    finished first.

    Args:
        job: The job.
        ask_s: Seconds it gets to end by itself before it is killed.
        kill_s: Seconds to wait after the kill.

    Raises:
        JobError: It isn't running, or its processes can't be ended from here, or not now.
    """
    noted = JobSnapshot.load(job.path)
    if held_by(job.path) is None:
        raise JobError(f"the job {job.id} is not running: it is {job.state()}")
    if noted is not None and noted.state not in WAITING:
        raise JobError(
            f"the job {job.id} is not running: it is {noted.state}, but {holder(job.path)} uses it",
            hint="wait until that process ends; it is probably an export",
        )
    asked: set[Process] = set()

    def ask(found: Sequence[Process]) -> None:
        for process in found[:1]:  # the supervisor, which passes it on, or what it left behind
            if process not in asked:
                asked.add(process)
                with suppress(OSError):  # a full disk must not keep a job alive
                    job.request_cancel()
                _send(job, process, signal.SIGTERM, signal.SIGCONT)
        for process in found:  # a stopped process can't handle the signal
            if process.state() == "T":
                _send(job, process, signal.SIGCONT)

    def kill(found: Sequence[Process]) -> None:
        for process in found:
            _send(job, process, signal.SIGKILL)

    killed = None
    if not _ended(job, ask_s, ask):
        killed = f"it did not stop within {ask_s:g} s, so it was killed"
        if not _ended(job, kill_s, kill):
            raise _left(job)
    state = "cancelled"
    with suppress(JobError):  # the job is damaged
        state = job.state()
    if state not in (*FINISHED, "failed"):
        state = "cancelled"
        with suppress(JobError, OSError), Lease(job.path):  # someone resumed it; the disk is full
            job.set_state(state, killed)
    kept = f": {killed}; journalled results are kept" if killed else ""
    return f"{job.id} is {state}{kept}"


def _ended(job: JobFolder, seconds: float, act: Callable[[Sequence[Process]], None]) -> bool:
    """Act until nobody holds the job; return whether that happened in time.

    Raises:
        JobError: Its holder can't be seen.
    """
    deadline = time.monotonic() + seconds
    unseen = 0
    while held_by(job.path) is not None:
        if time.monotonic() > deadline:
            return False
        found = holders(job.path / LOCK)
        unseen = 0 if found else unseen + 1
        if unseen == _UNSEEN:
            raise _unreachable(job)
        act(found)
        time.sleep(_POLL_S)
    return True


def _send(job: JobFolder, to: Process, *numbers: int) -> None:
    try:
        for number in numbers:
            send(job.path / LOCK, to, number)
    except PermissionError:
        raise _unreachable(job) from None


def _unreachable(job: JobFolder) -> JobError:
    return JobError(
        f"the job {job.id} is being run by {holder(job.path)}, which can't be stopped from here",
        hint="run this on the machine, in the container and as the user that runs it: "
        f"batchrun cancel {job.id}",
    )


def _left(job: JobFolder) -> JobError:
    """The error for a job that was killed and has not ended."""
    left = holders(job.path / LOCK)
    names = ", ".join(f"process {one.pid} (state {one.state()})" for one in left)
    return JobError(
        f"the job {job.id} was killed but has not ended: {names or holder(job.path)}",
        hint="a process in state D waits in the kernel, usually for a disk or a device. It ends "
        "when that answers or the machine restarts. Journalled results are kept",
    )
