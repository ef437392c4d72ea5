"""What is done to jobs that run: processes killed and stopped, disks filled, jobs cancelled."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from batchrun.jobs.folder import JobFolder
from batchrun.jobs.lease import held_by
from tests.soak.batchrun import Batchrun, Problem

CANCEL_S = 20.0  # half of it are two processes that start; where the machine has room for them


def cancel(batchrun: Batchrun, job: JobFolder, rng: random.Random) -> bool:
    """It returns, whatever the job is at, and nothing of the job lives on."""
    began = time.monotonic()
    batchrun("cancel", job.id, codes=(0, 1))  # 1: it had ended
    seconds = time.monotonic() - began
    if held_by(job.path) is not None:
        raise Problem(f"{job.id} is being run after its cancel")
    if seconds > CANCEL_S and os.getloadavg()[0] < 2 * (os.cpu_count() or 1):
        raise Problem(f"cancel took {seconds:.0f} s")
    return True


def kill_run(batchrun: Batchrun, job: JobFolder, rng: random.Random) -> bool:
    return _send(_runs(job), signal.SIGKILL)


def crash_run(batchrun: Batchrun, job: JobFolder, rng: random.Random) -> bool:
    """Its rows are suspects then: run alone, and an error the second time."""
    with job.journal() as journal:
        crashed = journal.crash_counts()
    return not crashed and _send(_runs(job), signal.SIGSEGV)


def kill_supervisor(batchrun: Batchrun, job: JobFolder, rng: random.Random) -> bool:
    return _send(_supervisor(job), signal.SIGKILL)


def kill_group(batchrun: Batchrun, job: JobFolder, rng: random.Random) -> bool:
    return _send([-pid for pid in _supervisor(job)], signal.SIGKILL)


def stop_run(batchrun: Batchrun, job: JobFolder, rng: random.Random) -> bool:
    with stopped(_runs(job)) as pids:
        time.sleep(rng.uniform(0.1, 2))
    return bool(pids)


def stop_supervisor(batchrun: Batchrun, job: JobFolder, rng: random.Random) -> bool:
    with stopped(_supervisor(job)) as pids:
        time.sleep(rng.uniform(0.1, 2))
    return bool(pids)


def contend(batchrun: Batchrun, job: JobFolder, rng: random.Random) -> bool:
    """Nobody else gets a job that is stopped, and still a worker's."""
    with stopped([*_supervisor(job), *_runs(job)]) as pids:
        if pids and held_by(job.path) is not None:
            batchrun("resume", job.id, codes=(1,))
    return bool(pids)


def limit_files(batchrun: Batchrun, job: JobFolder, rng: random.Random) -> bool:
    """No file of the run may grow from now on: writing fails as on a full disk."""
    size = max((f.stat().st_size for f in job.path.glob("journal.db*")), default=0)
    runs = _runs(job)
    for pid in runs:
        with suppress(ProcessLookupError, PermissionError):
            limit = size + rng.randint(0, 64 << 10)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
    return bool(runs)


def fill_disk(batchrun: Batchrun, job: JobFolder, rng: random.Random) -> bool:
    """No byte is left until the job has ended, or a while: looking works all the same."""
    if not os.path.ismount(batchrun.home):
        return False
    ballast = batchrun.home / "ballast"
    try:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        for command in ("list", "show", "stats", "logs"):
            batchrun(command, *([] if command == "list" else [job.id]), codes=(0, 1))
        deadline = time.monotonic() + 20
        while held_by(job.path) is not None and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        ballast.unlink(missing_ok=True)
    return True


def look(batchrun: Batchrun, job: JobFolder, rng: random.Random) -> bool:
    """Whatever can be asked of a job at any time."""
    batchrun("list")
    for command in rng.sample(["show", "stats", "logs", "verify"], 2):
        batchrun(command, job.id, codes=(0, 1))
    partial = batchrun.folder / f"{job.id}-partial.jsonl"
    batchrun("export", job.id, "--partial", "--overwrite", "-o", partial, codes=(0, 1))
    partial.unlink(missing_ok=True)
    return True


Strike = Callable[[Batchrun, JobFolder, random.Random], bool]
STRIKES: tuple[Strike, ...] = (
    cancel,
    kill_run,
    crash_run,
    kill_supervisor,
    kill_group,
    stop_run,
    stop_supervisor,
    contend,
    limit_files,
    fill_disk,
    look,
)


@contextmanager
def stopped(pids: list[int]) -> Iterator[list[int]]:
    """Stop processes for as long as the block takes."""
    _send(pids, signal.SIGSTOP)
    try:
        yield pids
    finally:
        _send(pids, signal.SIGCONT)


def mount(home: Path, size: str) -> bool:
    """Give a home a small disk of its own; False where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(home)]
    with suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


def _supervisor(job: JobFolder) -> list[int]:
    pid = held_by(job.path)
    return [] if pid is None or not Path(f"/proc/{pid}").exists() else [pid]


def children(pid: int) -> list[int]:
    """The processes that a process has started and that live."""
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(pid).children()
        return [child.pid for child in found if child.status() != psutil.STATUS_ZOMBIE]
    return []


def _runs(job: JobFolder) -> list[int]:
    return [child for pid in _supervisor(job) for child in children(pid)]


def _send(pids: list[int], number: int) -> bool:
    """Send a signal to processes, and groups by minus their number; whether there were any."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return bool(pids)
