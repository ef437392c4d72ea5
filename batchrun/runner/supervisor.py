"""The process that a job lives in: it outlives whoever submitted the job, and sees how runs end.

    submit ──starts──> supervisor ──starts──> run: torch, the engine, the journal
      └─ attaches a view ───── reads progress.json and log.jsonl ──────┘

The supervisor holds the job's lease, waits for its turn on the device, and starts the run as a
child that inherits both: they end when both processes are gone. What the end of a run means,
`runs` says.
"""

from __future__ import annotations

import os
import select
import signal
import site
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from batchrun.jobs.errors import JobError
from batchrun.jobs.files import open_private
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.lease import Lease, held_by
from batchrun.jobs.queue import DeviceQueue
from batchrun.jobs.snapshot import WORKER_LOG, last_words
from batchrun.runner.live import Reporter
from batchrun.runner.runs import Runs

_INHERITED = "BATCHRUN_INHERITED"  # in the environment of a child: handles that it has from us
_POLL_S = 0.2


@dataclass
class Started:
    """A supervisor as who started it sees it.

    Args:
        job: Its job.
        process: Its process.
        told: A pipe on which it says that it has begun to work.
        log_size: Bytes of its log before it.
    """

    job: JobFolder
    process: subprocess.Popen[bytes]
    told: int
    log_size: int
    _began: bool | None = None

    def began(self, timeout: float) -> bool | None:
        """Whether it works, or ended before it did; None if neither is known in so many seconds."""
        if self._began is None and select.select([self.told], [], [], timeout)[0]:
            self._began = bool(os.read(self.told, 1))
            os.close(self.told)
        return self._began

    def alive(self) -> bool:
        """Whether it, or whoever has the job by now, lives; notes why it never began."""
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
    """Start a supervisor for the job, in a session of its own: no terminal can take it along.

    Args:
        job: The job.
        lease: The job's, which the supervisor has too from here on.

    Raises:
        JobError: No process can be started.
    """
    told, tell = os.pipe()
    try:
        with open(job.path / WORKER_LOG, "ab", opener=open_private) as log:
            process = subprocess.Popen(
                _command("work", job.path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **_inheriting(lease.fileno(), tell),
            )
            with suppress(OSError):  # it writes so itself
                lease.hand_over(process.pid)
            return Started(job, process, told, log.tell())
    except OSError as error:
        os.close(told)
        where = f"{error.filename}: " if error.filename else ""
        raise JobError(
            f"the job's supervisor can't be started: {where}{error.strerror or error}",
            hint=f"mend that, then: batchrun resume {job.id}",
        ) from error
    finally:
        os.close(tell)


def inherited() -> list[int]:
    """The handles that this process has from the one that started it; its own children get none.

    A lock ends with the last process that has its handle.
    """
    numbers = [int(number) for number in os.environ.pop(_INHERITED, "").split()]
    for number in numbers:
        os.set_inheritable(number, False)
    return numbers


def close_in_children(handles: Sequence[int]) -> None:
    """Let processes that are forked off this one, and not started anew, have no handle either.

    Args:
        handles: Open until this process ends.
    """

    def close() -> None:
        for handle in handles:
            os.close(handle)

    os.register_at_fork(after_in_child=close)


def work(path: Path, root: Path) -> int:
    """Be a job's supervisor.

    Args:
        path: The job's folder.
        root: What `home()` says: where the device's queue is.

    Returns:
        The exit code of the job's last run.

    Raises:
        LeaseHeld: Another process has the job.
    """
    job, handles = JobFolder(path), inherited()
    held, tell = (handles[0], handles[1:]) if handles else (None, [])
    with Lease(path, held) as lease, Reporter(path) as reporter, _Signals() as signals:
        job.set_state("queued")
        for handle in tell:
            with suppress(BrokenPipeError):  # nobody waits any more
                os.write(handle, b".")
            os.close(handle)
        try:
            with DeviceQueue(root, device_of(job)) as turn:
                _wait_for(turn, reporter, signals)
                job.set_state("running")
                return _supervise(job, [lease.fileno(), turn.fileno()], signals, reporter)
        except _Cancelled:
            job.set_state("cancelled")
            return 130


def device_of(job: JobFolder) -> str:
    """The queue that a job waits in, found out without loading torch."""
    wanted = job.spec().runtime.device
    if wanted == "auto":
        wanted = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    return "cuda:0" if wanted == "cuda" else wanted


class _Cancelled(Exception):  # noqa: N818 - a request, not a failure
    """The job was told to end before its turn came."""


class _Signals:
    """Passes SIGTERM and SIGINT on to the run, and remembers them: nothing is started after one."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        """Raise `_Cancelled` if there was one."""
        if self.received is not None:
            raise _Cancelled

    def pass_on_to(self, child: subprocess.Popen[bytes]) -> None:
        """From now on; one that came while the child was started, too."""
        self._child = child
        if self.received is not None:
            child.send_signal(self.received)

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._child is not None:
            self._child.send_signal(number)


def _wait_for(turn: DeviceQueue, reporter: Reporter, signals: _Signals) -> None:
    """Return when nobody is ahead in the device's line."""
    told = False
    while turn.ahead():
        signals.check()
        if not told:
            reporter.message("waiting for the device, which another job uses")
            told = True
        time.sleep(_POLL_S)


def _supervise(
    job: JobFolder, handles: Sequence[int], signals: _Signals, reporter: Reporter
) -> int:
    """Run the job, again where a run dies by a fault, until a run ends by itself."""

    def start_run() -> subprocess.Popen[bytes]:
        signals.check()
        child = subprocess.Popen(
            _command("run-job", job.path), stdin=subprocess.DEVNULL, **_inheriting(*handles)
        )
        signals.pass_on_to(child)
        return child

    runs = Runs(job, reporter, lambda: signals.received is not None)
    while (code := runs.once(start_run)) is None:
        pass
    return code


def _command(*arguments: object) -> list[str]:
    """A child's: no file of the folder that it works in becomes a module (`-P`)."""
    return [sys.executable, "-P", "-m", "batchrun", *map(str, arguments)]


def _inheriting(*handles: int) -> dict[str, Any]:
    """What `Popen` is to give a child: handles, and an environment for it and its own children.

    They find this package where it is, and nothing in the folder that they work in: that is also
    what an empty entry of a path means.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1", _INHERITED: " ".join(map(str, handles))}
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        if name in environment:
            environment[name] = os.pathsep.join(filter(None, environment[name].split(os.pathsep)))
    root, path = str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")
    if root not in (*path.split(os.pathsep), *site.getsitepackages(), site.getusersitepackages()):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, path)))
    return {"env": environment, "pass_fds": handles}
