"""After any fault things go on: what still runs can be cancelled, and the next job ends.

The other oracles say that nothing was lost; this one says that nothing is in the way: no lock that
a dead process left, no place in the device's line, no half-made file.
"""

from __future__ import annotations

import fcntl
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from batchrun.jobs import folder
from batchrun.jobs.cancel import cancel
from batchrun.jobs.errors import JobError
from batchrun.jobs.lease import Lease, held_by
from batchrun.jobs.queue import DeviceQueue
from batchrun.runner import job_run
from batchrun.runner.job_run import Outcome
from tests.faults.smalljob import DONE, Ledger, NullEngine, NullWorkbench, SmallJob, forked

ROWS = 2
_HUNG_S = 100  # seconds after which something is taken to hang; `cancel` promises ten


def check_goes_on(home: Path, *, next_job: bool = True) -> None:
    """Cancel what runs in a home, then run another job there; the home is left as it was.

    Args:
        home: Where the jobs are.
        next_job: Whether to run one, which takes a third of a second, or to see what it needs.

    Raises:
        AssertionError: A job can't be cancelled, or the next one can't begin or does not end.
    """
    cancel_all(home)
    for job in folder.list_jobs(home):
        with Lease(job.path):
            pass
    submitting = home / "jobs" / ".submitting"
    if submitting.exists():
        with submitting.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with DeviceQueue(home, "cpu") as turn:
        assert not turn.ahead(), "somebody dead is ahead in the device's line"
        if next_job:
            with tempfile.TemporaryDirectory(prefix="liveness-") as scratch:
                status = forked(lambda: _next_job(home, Path(scratch, "case")))
            assert status == DONE, f"the next job ended with {status}"
    shutil.rmtree(home / "queue")


def cancel_all(home: Path, instead: Callable[[], object] = lambda: None) -> list[str]:
    """Cancel each job that runs; what was said of it.

    Args:
        home: Where the jobs are.
        instead: Done again and again while a process has the lease of a job that is not begun.
    """
    said = []
    for job in folder.list_jobs(home):
        while held_by(job.path) is not None:
            try:
                said.append(cancel(job))
            except JobError as error:  # or it has ended meanwhile
                if "is not running" not in str(error):
                    raise
                instead()
                time.sleep(0.01)
                continue
            assert held_by(job.path) is None, f"{job.id} is cancelled and goes on"
    return said


def _next_job(home: Path, scratch: Path) -> int:
    signal.alarm(_HUNG_S)  # whose default is the end of the process
    small, engine = SmallJob(scratch, ROWS), NullEngine(Ledger(ROWS))
    small.write_input()
    job = folder.create(home, small.spec())
    outcome = job_run.run_job(
        job.path,
        stop=threading.Event(),
        open_workbench=lambda spec, log: NullWorkbench(engine),
    )
    assert outcome is Outcome.DONE_WITH_ERRORS, outcome
    small.check_output()
    job.remove()
    return DONE
