"""The process that a job lives in: it outlives the submitter, and watches how runs end.

    submit ──starts──> supervisor ──starts──> run: torch, the engine, the journal
      └─ attaches a view ───── reads progress.json and log.jsonl ──────┘

The supervisor holds the job's lease, waits for its turn on the device, and starts the run as a
child that inherits both: they end when both processes are gone. `runs` decides what the end of a
run means.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from batchrun import children
from batchrun.errors import MachineError
from batchrun.fleet.devices import devices_of
from batchrun.jobs.errors import JobError
from batchrun.jobs.files import open_private
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.lease import Lease, held_by
from batchrun.jobs.queue import DeviceQueue
from batchrun.jobs.snapshot import WORKER_LOG, last_words
from batchrun.runner.ahead import Ahead, job_handed
from batchrun.runner.hook import Hook
from batchrun.runner.live import Reporter
from batchrun.runner.runs import Runs

_POLL_S = 0.2
_TAKES_S = 60.0  # for a supervisor to start


@dataclass
class Started:
    """A supervisor, as seen by the process that started it.

    Args:
        job: Its job.
        process: Its process.
        told: A pipe on which it says that it has begun to work.
        log_size: Bytes in its log before it started.
    """

    job: JobFolder
    process: Popen[bytes]
    told: int
    log_size: int
    _began: bool | None = None

    def began(self, timeout: float) -> bool | None:
        """Whether it began to work, or ended before; None if unknown within the timeout."""
        if self._began is None and select.select([self.told], [], [], timeout)[0]:
            self._began = bool(os.read(self.told, 1))
            os.close(self.told)
        return self._began

    def alive(self) -> bool:
        """Whether it, or the job's current holder, is alive; notes why it never began."""
        if self.process.poll() is None or held_by(self.job.path) is not None:
            return True
        if self.began(0) is False:
            self.note_failure()
        return False

    def note_failure(self) -> None:
        """Note why a supervisor that never began ended, in its own last words."""
        code = self.process.wait()
        how = f"with {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        words, hint = last_words(self.job.path, at=self.log_size) or (f"it ended {how}", None)
        with suppress(JobError, OSError):  # someone else has the job; the disk is full
            if self.job.state() != "cancelled":
                with Lease(self.job.path):
                    reason = f"the job's supervisor ended before it could begin: {words}"
                    self.job.set_state("failed", reason, hint)


def start(job: JobFolder, lease: Lease, ahead: Ahead | None = None) -> Started:
    """Start a supervisor for the job, in its own session, so that it outlives the terminal.

    Args:
        job: The job.
        lease: The job's lease, which the supervisor then holds too.
        ahead: A supervisor that waits for its job.

    Raises:
        JobError: No process can be started.
    """
    told, tell = os.pipe()
    try:
        with open(job.path / WORKER_LOG, "ab", opener=open_private) as log:
            size, held = log.tell(), (lease.fileno(), tell)
            handed = ahead and ahead.hand(job.path, held, log=log.fileno(), patience=_TAKES_S)
            process = handed or Popen(
                children.command("work", job.path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **children.inheriting(*held),
            )
            with suppress(OSError):  # the supervisor notes it too
                lease.hand_over(process.pid)
            return Started(job, process, told, size)
    except OSError as error:
        os.close(told)
        where = f"{error.filename}: " if error.filename else ""
        raise JobError(
            f"the job's supervisor can't be started: {where}{error.strerror or error}",
            hint=f"fix that, then: batchrun resume {job.id}",
        ) from error
    finally:
        os.close(tell)


def work_ahead(root: Path) -> int:
    """Be the supervisor of the job that is handed to this process, if one is; see `work`."""
    with Ahead("run-job") as run:
        handed = job_handed()
        return 0 if handed is None else work(*handed, root, run)


def work(path: Path, handles: Sequence[int], root: Path, ahead: Ahead | None = None) -> int:
    """Be a job's supervisor; in the end run the command of `--on-done`, without the lease.

    Args:
        path: The job's folder.
        handles: The job's lease, and a pipe on which to say that the work begins; or none.
        root: What `home()` returns: where the device's queue is.
        ahead: A run that waits for its job.

    Returns:
        The exit code of the job's last run.

    Raises:
        LeaseHeld: Another process has the job.
    """
    job, ahead = JobFolder(path), ahead or Ahead()
    held, tell = (handles[0], handles[1:]) if handles else (None, [])
    hook = Hook(job)
    with ExitStack() as after, Lease(path, held) as lease, Reporter(path) as reporter:
        after.callback(hook.run)  # once the lease is released
        runs = Runs(job, reporter)
        job.set_state("queued")
        for handle in tell:
            with suppress(BrokenPipeError):  # nobody is waiting any more
                os.write(handle, b".")
            os.close(handle)
        with ExitStack() as places:
            places.callback(hook.note_end)
            queues = [DeviceQueue(root, device, job.id) for device in queues_of(job)]
            places.callback(ahead.end)
            turns = [_turn(queue, runs, reporter, places, ahead.end) for queue in queues]
            if runs.told is None:
                job.set_state("running")
            locks = (lease.fileno(), *(turn.fileno() for turn in turns))
            command, inheriting = children.command("run-job", path), children.inheriting(*locks)

            def start() -> Popen[bytes]:
                handed = ahead.hand(path, locks, stop=lambda: runs.told is not None)
                return handed or Popen(command, stdin=subprocess.DEVNULL, **inheriting)

            return runs.run(start)


def _turn(
    queue: DeviceQueue,
    runs: Runs,
    reporter: Reporter,
    places: ExitStack,
    waits: Callable[[], object],
) -> DeviceQueue:
    """Wait for the job's turn on a device, and say which job has it.

    Devices are taken in order, so that no two jobs wait for each other. `waits` is called if there
    is anything to wait for.
    """
    turn = places.enter_context(queue)
    told: str | None = None
    while runs.told is None and (ahead := turn.jobs_ahead()):
        waits()
        if ahead[0] != told:
            told, more = ahead[0], len(ahead) - 1
            line = f"waiting for the device {turn.device}, which the job {told or '(unknown)'} uses"
            reporter.message(line + (f"; {more:,} more are ahead in the queue" if more else ""))
        time.sleep(_POLL_S)
    return turn


def queues_of(job: JobFolder) -> list[str]:
    """The queues that a job waits in, in order, found out without loading torch."""
    runtime = job.spec().runtime
    if runtime.ray is not None:
        return []  # Ray decides when there is room
    if runtime.devices is not None:
        with suppress(MachineError):  # the run says it
            return sorted({*devices_of(runtime.devices)})
    return [_queue_of(runtime.device)]


def _queue_of(wanted: str) -> str:
    if wanted == "auto":
        wanted = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    return "cuda:0" if wanted == "cuda" else wanted
