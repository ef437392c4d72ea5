"""Whatever a job hangs in: `cancel` ends it, says how, and the next job has its turn."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from batchrun.jobs.folder import JobFolder, list_jobs
from batchrun.jobs.holders import holders
from batchrun.jobs.lease import held_by
from batchrun.jobs.queue import DeviceQueue
from tests.cli.conftest import CommandLine, Shown
from tests.cli.test_async import until

# Held in C with the interpreter's lock, and deaf.
DEAF = (
    "import ctypes, signal\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])\n"
    "ctypes.PyDLL(None).pause()\n"
)
SLEEPS = "import signal\nsignal.pause()\n"


@pytest.fixture
def trap(batchrun: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that each process executes when it starts; what is not there traps nobody."""
    folder = batchrun.folder / "trap"
    folder.mkdir()
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{before}")
    return folder / "sitecustomize.py"


def set_trap(trap: Path, command: str, code: str) -> None:
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    trap.write_text(f"import sys\nif {command!r} in sys.orig_argv:\n{lines}")


def trap_runs(trap: Path, code: str) -> None:
    """Trap runs that have their job, before they have done anything for it."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    set_trap(
        trap,
        "run-job",
        f"from batchrun.runner import live, opening\ndef begins(*_):\n{lines}"
        "live.Reporter.__init__ = begins\nopening.import_engine = lambda: None\n",
    )


def detached(batchrun: CommandLine, output: str) -> JobFolder:
    source = batchrun.write("in.jsonl", ["one", "two"])
    more = ("--max-tokens", 2, "--detach", "--again")
    shown = batchrun.submit(source, *more, "-o", output)
    assert shown.code == 0, shown.err
    return JobFolder(batchrun.home / "jobs" / shown.out.split()[0])


def hanging(job: JobFolder) -> tuple[psutil.Process, psutil.Process]:
    """The job's supervisor and its run, which is in its trap."""

    def found() -> tuple[psutil.Process, psutil.Process] | None:
        processes = [psutil.Process(one.pid) for one in holders(job.path / "lock")]
        trapped = len(processes) == 2 and paused(processes[1])
        return (processes[0], processes[1]) if trapped else None

    both: tuple[psutil.Process, psutil.Process] = until(found, "the run in its trap")
    return both


def paused(process: psutil.Process) -> bool:
    """Whether a process is in pause(2): call 34 of x86-64, a sleep of other machines."""
    if os.uname().machine != "x86_64":
        return bool(process.status() == psutil.STATUS_SLEEPING)
    return Path(f"/proc/{process.pid}/syscall").read_text().startswith("34 ")


def test_a_run_that_hears_nothing_is_killed_and_the_next_job_has_its_turn(
    batchrun: CommandLine, trap: Path
) -> None:
    trap_runs(trap, DEAF)
    job = detached(batchrun, "a.jsonl")
    hanging(job)
    trap.unlink()
    following = detached(batchrun, "b.jsonl")
    assert following.state() == "queued"
    shown = batchrun("cancel", job.id)
    assert shown.code == 0
    assert f"{job.id} is cancelled: it did not stop within 6 s, so it was" in shown.out
    assert f"next:   batchrun resume {job.id}" in shown.out
    assert (held_by(job.path), job.state()) == (None, "cancelled")
    assert "so it was killed" in batchrun("show", job.id).out
    assert batchrun("watch", following.id).code == 0
    assert len(batchrun.read("b.jsonl")) == 2
    assert batchrun("resume", job.id).code == 0
    assert batchrun.read("a.jsonl") == batchrun.read("b.jsonl")


@pytest.mark.parametrize(
    "what", ["both stopped", pytest.param("without its supervisor", marks=pytest.mark.long)]
)
def test_a_stopped_job_and_one_whose_supervisor_is_gone(
    batchrun: CommandLine, trap: Path, what: str
) -> None:
    trap_runs(trap, SLEEPS)
    job = detached(batchrun, "a.jsonl")
    supervisor, run = hanging(job)
    if what == "without its supervisor":
        supervisor.kill()
        until(lambda: len(holders(job.path / "lock")) == 1, "the supervisor's end")
    else:
        run.suspend()
        supervisor.suspend()
    shown = batchrun("cancel", job.id)
    assert (shown.code, shown.out.splitlines()[0]) == (0, f"{job.id} is cancelled")
    assert (held_by(job.path), job.state()) == (None, "cancelled")
    assert not run.is_running() or run.status() == psutil.STATUS_ZOMBIE
    again = batchrun("cancel", job.id)
    assert (again.code, again.error) == (1, f"the job {job.id} is not running: it is cancelled")


def test_a_run_that_crashes_after_it_was_told_to_end_is_not_started_again(
    batchrun: CommandLine, trap: Path
) -> None:
    crash = "import os, signal\nsignal.signal(15, lambda *_: os.abort())\nsignal.pause()\n"
    trap_runs(trap, crash)
    job = detached(batchrun, "a.jsonl")
    hanging(job)
    shown = batchrun("cancel", job.id)
    assert (shown.code, job.state()) == (0, "cancelled")
    assert "crashed" not in batchrun("logs", job.id).out


def test_what_forks_off_a_run_keeps_neither_its_lock_nor_its_turn(
    batchrun: CommandLine, trap: Path
) -> None:
    """Neither a fork nor a program that C starts; both outlive the run."""
    leave = (
        "import os, signal\n"
        "os.system('sleep 600 & echo $! > pids')\n"
        "forked = os.fork() or signal.pause()\n"
        "print(forked, file=open('pids', 'a'), flush=True)\n"
        "os._exit(1)\n"
    )
    trap_runs(trap, leave)
    job = detached(batchrun, "a.jsonl")
    try:
        until(lambda: held_by(job.path) is None, "the end of the job")
        with DeviceQueue(batchrun.home, "cpu") as turn:
            assert turn.ahead() == []
    finally:
        pids = [int(pid) for pid in (batchrun.folder / "pids").read_text().split()]
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # both live


LOADING = "sys.modules['click'] = None\n"
KILLED = "import os\nos.kill(os.getpid(), 9)\n"
REASONS = {LOADING: "ModuleNotFoundError: import of click halted", KILLED: "it ended with SIGKILL"}


def told(shown: Shown, reason: str) -> None:
    assert shown.code == 1
    assert f"the job's supervisor ended before it could begin: {reason}" in shown.error


@pytest.mark.parametrize("what", [LOADING, pytest.param(KILLED, marks=pytest.mark.long)])
def test_a_supervisor_that_dies_at_its_start_has_its_last_words(
    batchrun: CommandLine, trap: Path, what: str
) -> None:
    set_trap(trap, "work", what)
    reason = REASONS[what]
    source = batchrun.write("in.jsonl", ["one"])
    shown = batchrun.submit(source, "-o", "a.jsonl", "--max-tokens", 2)
    told(shown, reason)
    assert "failed after 0 of ? rows" in shown.out
    [job] = list_jobs(batchrun.home)
    for command in (("resume", job.id), ("resume", job.id, "--detach"), ("watch", job.id)):
        told(batchrun(*command), reason)
    assert reason in batchrun("show", job.id).out
    assert f"{job.id}  failed" in batchrun("list").out
    (job.path / "state.json").unlink()  # as if who started it had died as well
    if what == LOADING:
        assert reason in batchrun("show", job.id).out


def test_ctrl_c_twice_leaves_the_job_alone(batchrun: CommandLine, trap: Path) -> None:
    trap_runs(trap, SLEEPS)
    job = detached(batchrun, "a.jsonl")
    supervisor, run = hanging(job)
    watch = subprocess.Popen(
        batchrun.argv("watch", job.id),
        cwd=batchrun.folder,
        env=batchrun.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    with watch:
        assert watch.stderr is not None
        watch.stderr.readline()
        watch.send_signal(signal.SIGINT)
        watch.send_signal(signal.SIGINT)
        assert "Traceback" not in watch.stderr.read()
    assert watch.returncode == 130
    assert (supervisor.is_running(), run.is_running(), job.state()) == (True, True, "running")
    assert batchrun("cancel", job.id).code == 0
