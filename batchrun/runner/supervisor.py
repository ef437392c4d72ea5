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
import site
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

from batchrun.jobs.errors import JobError
from batchrun.jobs.files import open_private
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.lease import Lease, held_by
from batchrun.jobs.queue import DeviceQueue
from batchrun.jobs.snapshot import WORKER_LOG, last_words
from batchrun.runner.live import Reporter
from batchrun.runner.runs import Runs

_INHERITED = "BATCHRUN_INHERITED"  # in a child's environment: the handles that it inherits
_POLL_S = 0.2


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
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        words, hint = last_words(self.job.path, at=self.log_size) or (f"it ended {how}", None)
        with suppress(JobError, OSError):  # someone else has the job; the disk is full
            if self.job.state() != "cancelled":
                with Lease(self.job.path):
                    reason = f"the job's supervisor ended before it could begin: {words}"
                    self.job.set_state("failed", reason, hint)


def start(job: JobFolder, lease: Lease) -> Started:
    """Start a supervisor for the job, in its own session, so that it outlives the terminal.

    Args:
        job: The job.
        lease: The job's lease, which the supervisor then holds too.

    Raises:
        JobError: No process can be started.
    """
    told, tell = os.pipe()
    try:
        with open(job.path / WORKER_LOG, "ab", opener=open_private) as log:
            process = Popen(
                _command("work", job.path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **_inheriting(lease.fileno(), tell),
            )
            with suppress(OSError):  # the supervisor notes it too
                lease.hand_over(process.pid)
            return Started(job, process, told, log.tell())
    except OSError as error:
        os.close(told)
        where = f"{error.filename}: " if error.filename else ""
        raise JobError(
            f"the job's supervisor can't be started: {where}{error.strerror or error}",
            hint=f"fix that, then: batchrun resume {job.id}",
        ) from error
    finally:
        os.close(tell)


def inherited() -> list[int]:
    """The handles inherited from the parent process; this process's children don't get them.

    A lock ends with the last process that has its handle.
    """
    numbers = [int(number) for number in os.environ.pop(_INHERITED, "").split()]
    for number in numbers:
        os.set_inheritable(number, False)
        os.register_at_fork(after_in_child=partial(_close, number))  # nor do forked children
    return numbers


def _close(handle: int) -> None:
    with suppress(OSError):  # it is closed by now
        os.close(handle)


def work(path: Path, root: Path) -> int:
    """Be a job's supervisor.

    Args:
        path: The job's folder.
        root: What `home()` returns: where the device's queue is.

    Returns:
        The exit code of the job's last run.

    Raises:
        LeaseHeld: Another process has the job.
    """
    job, handles = JobFolder(path), inherited()
    held, tell = (handles[0], handles[1:]) if handles else (None, [])
    with Lease(path, held) as lease, Reporter(path) as reporter:
        runs = Runs(job, reporter)
        job.set_state("queued")
        for handle in tell:
            with suppress(BrokenPipeError):  # nobody is waiting any more
                os.write(handle, b".")
            os.close(handle)
        with DeviceQueue(root, device_of(job)) as turn:
            if turn.ahead():
                reporter.message("waiting for the device, which another job uses")
            while turn.ahead() and runs.told is None:
                time.sleep(_POLL_S)
            if runs.told is None:
                job.set_state("running")
            inheriting = _inheriting(lease.fileno(), turn.fileno())
            command = _command("run-job", path)
            return runs.run(lambda: Popen(command, stdin=subprocess.DEVNULL, **inheriting))


def device_of(job: JobFolder) -> str:
    """The queue that a job waits in, found out without loading torch."""
    wanted = job.spec().runtime.device
    if wanted == "auto":
        wanted = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    return "cuda:0" if wanted == "cuda" else wanted


def _command(*arguments: object) -> list[str]:
    """A child's command; `-P` keeps files of its working folder from becoming modules."""
    return [sys.executable, "-P", "-m", "batchrun", *map(str, arguments)]


def _inheriting(*handles: int) -> dict[str, Any]:
    """Arguments for `Popen`: handles, and an environment for a child and its own children.

    They find this package where it is, and nothing in their working folder, which an empty path
    entry would mean too.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1", _INHERITED: " ".join(map(str, handles))}
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        if name in environment:
            environment[name] = os.pathsep.join(filter(None, environment[name].split(os.pathsep)))
    root, path = str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")
    if root not in (*path.split(os.pathsep), *site.getsitepackages(), site.getusersitepackages()):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, path)))
    return {"env": environment, "pass_fds": handles}
