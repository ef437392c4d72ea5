"""Jobs that run without whoever submitted them: watched, left, cancelled, killed, crashed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchrun.jobs.folder import JobFolder, list_jobs
from batchrun.jobs.inflight import InFlightRows
from batchrun.jobs.lease import held_by
from batchrun.jobs.queue import DeviceQueue
from batchrun.runner.supervisor import queues_of
from tests.cli.conftest import CommandLine
from tests.cli.gate import Gate

ROWS = 80
LONG = ("--max-tokens", 40, "--ignore-eos", "--max-num-seqs", 4, "--temperature", 1)


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something that another process does; pytest's own limit ends it, named `what`."""
    while not (found := condition()):
        time.sleep(0.02)
    return found


def started(batchrun: CommandLine, rows: int = ROWS, output: str = "out.jsonl") -> JobFolder:
    """A detached job over `rows` rows."""
    source = batchrun.write("in.jsonl", [f"prompt {i}" for i in range(rows)])
    shown = batchrun.submit(source, *LONG, "-o", output, "--detach", "--again")
    assert shown.code == 0, shown.err
    return JobFolder(batchrun.home / "jobs" / shown.out.split()[0])


def running(job: JobFolder, rows: int = 1) -> None:
    until(lambda: job.counts().rows >= rows, f"{rows} rows")


def processes(job: JobFolder) -> tuple[psutil.Process, psutil.Process]:
    """The job's supervisor and its run."""
    pid = held_by(job.path)
    assert pid is not None
    supervisor = psutil.Process(pid)
    return supervisor, until(supervisor.children, "the run")[0]


def finished(batchrun: CommandLine, job: JobFolder, output: str = "out.jsonl") -> list[Any]:
    """The output of a job that ended well, every row once and in order."""
    assert batchrun("watch", job.id).code == 0
    rows = batchrun.read(output)
    assert [row["prompt"] for row in rows] == [f"prompt {i}" for i in range(ROWS)]
    assert all(row["error"] is None for row in rows)
    return rows


def test_ctrl_c_leaves_the_view_and_not_the_job(batchrun: CommandLine, gate: Gate) -> None:
    source = batchrun.write("in.jsonl", [f"prompt {i}" for i in range(ROWS)])
    process = subprocess.Popen(
        batchrun.argv("submit", source, *LONG, "-o", "out.jsonl", "--model", batchrun.model),
        cwd=batchrun.folder,
        env=batchrun.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Who runs the tests in the background ignores it, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("running:"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "continues in the background" in err
    job = JobFolder(batchrun.home / "jobs" / err.split("batchrun cancel ")[1].strip())
    assert held_by(job.path) is not None
    running(job)

    cancelled = batchrun("cancel", job.id)
    assert (cancelled.code, job.state()) == (0, "cancelled")
    assert not (batchrun.folder / "out.jsonl").exists()
    again = batchrun("cancel", job.id)
    assert (again.code, "is not running: it is cancelled" in again.error) == (1, True)
    assert batchrun("export", job.id, "--partial", "-o", "partial.jsonl").code == 0
    refused = batchrun("export", job.id)
    assert (refused.code, "batchrun resume" in refused.hint) == (1, True)

    assert len(job.journal().partials()) <= 4
    gate.open()
    resumed = batchrun("resume", job.id)
    assert resumed.code == 0
    assert f"{ROWS} of {ROWS} rows" in resumed.out
    rows = finished(batchrun, job)
    kept = {row["prompt"]: row for row in batchrun.read("partial.jsonl")}
    assert kept
    assert all(row == kept.get(row["prompt"], row) for row in rows)

    whole = started(batchrun, output="whole.jsonl")
    assert finished(batchrun, whole, "whole.jsonl") == rows


def test_the_same_work_is_not_begun_twice(batchrun: CommandLine, gate: Gate) -> None:
    job = started(batchrun)
    source = batchrun.folder / "in.jsonl"
    shown = batchrun.submit(source, *LONG, "-o", "other.jsonl")
    assert (shown.code, job.id in shown.error) == (1, True)
    assert f"batchrun watch {job.id}" in shown.hint
    assert "--again" in shown.hint
    assert batchrun("cancel").code == 0


def test_jobs_wait_for_the_device_in_order(batchrun: CommandLine) -> None:
    with DeviceQueue(batchrun.home, "cpu", "the-one-that-runs"):
        first, second = started(batchrun, 3, "a.jsonl"), started(batchrun, 3, "b.jsonl")
        assert queues_of(first) == ["cpu"]
        for job in (first, second):
            until(lambda job=job: job.state() == "queued", f"{job.id} to be in line")
        told = "waiting for the device cpu, which the job the-one-that-runs uses"
        until(lambda: told in batchrun("logs", first.id).out, "the first to say why it waits")
        assert batchrun("cancel", second.id).code == 0
        assert second.state() == "cancelled"
        assert first.state() == "queued"
    assert batchrun("watch", first.id).code == 0
    assert not second.journal().runs()


def test_a_killed_run_and_a_killed_supervisor(batchrun: CommandLine, gate: Gate) -> None:
    gate.close(300)
    job = started(batchrun)
    running(job)
    supervisor, run = processes(job)
    run.kill()
    until(lambda: held_by(job.path) is None, "the supervisor's end")
    assert job.state() == "interrupted"
    assert "SIGKILL" in batchrun("show", job.id).out

    assert batchrun("resume", job.id, "--detach").code == 0
    running(job, 20)
    supervisor, run = processes(job)
    supervisor.kill()  # the run is on its own then, and has the lease
    assert held_by(job.path) is not None
    assert batchrun("resume", job.id).code == 1
    gate.open()
    finished(batchrun, job)


def test_a_run_that_crashes_is_started_again(batchrun: CommandLine, gate: Gate) -> None:
    job = started(batchrun)
    running(job)
    _, run = processes(job)
    run.suspend()
    until(lambda: run.status() == psutil.STATUS_STOPPED, "the run to stop")
    noted = InFlightRows(job.path)
    inside = noted.rows()
    noted.close()
    assert len(inside) > 1
    gate.open()
    run.send_signal(signal.SIGSEGV)
    run.resume()
    rows = finished(batchrun, job)
    reason = f"the run crashed with SIGSEGV; {len(inside)} rows were running"
    assert reason in batchrun("logs", job.id).out
    assert job.journal().crash_counts() == dict.fromkeys(inside, 1)
    assert len(job.journal().runs()) == 2
    assert len(rows) == ROWS


HANG = """
import os, sys, threading
from batchrun.runner.watchdog import Watchdog
start, dogs = Watchdog.start, []
def remembered(self):
    dogs.append(self)
    start(self)
Watchdog.start = remembered
def hang():
    busy, me = dogs[0]._busy, threading.get_ident()
    busy[me].still = float("-inf")
    threading.Event().wait()
"""


def trapped(
    batchrun: CommandLine,
    trap: str,
    *arguments: object,
    rows: int = 30,
    supervisor: str = "pass",
    source: Path | None = None,
    model: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Submit a job whose runs, and whose supervisor, execute something at first; wait for it.

    What `hang()` is called in hangs, and has hung for too long already: how long a machine takes
    for what does not hang is no matter.
    """
    folder = batchrun.folder / "trap"
    folder.mkdir()
    lines = "".join(f"    {line}\n" for line in trap.splitlines())
    (folder / "sitecustomize.py").write_text(
        f"{HANG}if 'run-job' in sys.orig_argv:\n{lines}"
        f"if 'work' in sys.orig_argv:\n    {supervisor}\n"
    )
    if source is None:
        source = batchrun.write("in.jsonl", [f"prompt {i}" for i in range(rows)])
    own = batchrun.environment()
    path = f"{folder}:{own.get('PYTHONPATH', '')}"
    arguments = (source, *LONG, "-o", "out.jsonl", "--model", model or batchrun.model, *arguments)
    return subprocess.run(
        batchrun.argv("submit", *arguments),
        cwd=batchrun.folder,
        env={**own, "PYTHONPATH": path, "BATCHRUN_STALL_SECONDS": "60", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def in_step(what: str) -> str:
    """A trap that does something in a step with row 7."""
    return (
        "from batchrun.engine.engine import Engine\n"
        "step = Engine.step\n"
        "def trapped(self):\n"
        "    if any(s.request.row == 7 for s in self.scheduler.running):\n"
        f"        {what}\n"
        "    return step(self)\n"
        "Engine.step = trapped"
    )


RAISE = "raise IndexError('index 7 is out of bounds')"


@pytest.mark.parametrize(
    "what", ["os.abort()", *(pytest.param(w, marks=pytest.mark.long) for w in ("hang()", RAISE))]
)
def test_a_row_that_brings_the_process_down_is_not_tried_a_third_time(
    batchrun: CommandLine, what: str
) -> None:
    done = trapped(batchrun, in_step(what))
    assert done.returncode == 3, done.stderr
    errors = {i: row["error"] for i, row in enumerate(batchrun.read("out.jsonl")) if row["error"]}
    assert list(errors) == [7]
    assert "crashed" in errors[7]
    assert ("a step of the engine did not finish" in done.stderr) == (what == "hang()")
    said = "a step of the engine failed: IndexError: index 7 is out of bounds"
    assert (said in done.stderr) == (what == RAISE)


def test_an_engine_that_fails_whatever_its_rows_are_ends_the_job(batchrun: CommandLine) -> None:
    """Not after one failed row each, for a million rows."""
    trap = (
        "from batchrun.engine.executor import TorchExecutor\n"
        "launch = TorchExecutor.launch\n"
        "def trapped(self, plan):\n"
        "    if plan.segments:\n"
        "        raise RuntimeError('no kernel')\n"
        "    return launch(self, plan)\n"
        "TorchExecutor.launch = trapped"
    )
    done = trapped(batchrun, trap, supervisor="from batchrun.runner import runs as r; r.BARREN = 3")
    assert done.returncode == 1, done.stderr
    assert "crashed with SIGABRT 3 times in a row, and no row was answered" in done.stderr
    assert "failed: RuntimeError: no kernel" in done.stderr


@pytest.mark.parametrize(
    ("what", "place"),
    [
        pytest.param("reading the input", "batchrun.runner.reader.islice", marks=pytest.mark.long),
        ("writing the journal", "batchrun.jobs.journal.journal.Journal.write"),
    ],
)
def test_a_disk_that_hangs_ends_the_job_with_the_reason(
    batchrun: CommandLine, what: str, place: str
) -> None:
    module, name = re.match(r"([a-z.]+)\.([A-Zi].*)", place).groups()
    trap = (
        f"import {module}, sys\n"
        f"def hanging(*_):\n    hang()\n{'    yield' if 'islice' in name else ''}\n"
        f"sys.modules['{module}'].{name} = hanging"
    )
    done = trapped(batchrun, trap)
    assert done.returncode == 1
    assert f"error: {what} did not finish in" in done.stderr
    [job] = list_jobs(batchrun.home)
    assert job.state() == "failed"
    assert what in batchrun("show", job.id).out
    assert "in hanging" in (job.path / "worker.log").read_text()
    assert batchrun("resume", job.id).code == 0
    assert len(batchrun.read("out.jsonl")) == 30


def test_a_run_that_cannot_note_why_it_ends_is_asked_for_its_last_words(
    batchrun: CommandLine,
) -> None:
    full = "raise OSError(28, 'No space left on device')"
    trap = (
        "from batchrun.jobs.journal.journal import Journal\n"
        "from batchrun.jobs.folder import JobFolder\n"
        f"def full(*_):\n    {full}\n"
        "JobFolder.set_state = Journal.write = Journal.end_run = full"
    )
    done = trapped(batchrun, trap)
    assert done.returncode == 130
    [job] = list_jobs(batchrun.home)
    reason, hint = job.failure() or ("", None)
    assert job.state() == "interrupted"
    assert reason.startswith(f"No space left on device (the disk of {batchrun.home} has ")
    assert hint == "make room on that disk (df -h shows all), then: batchrun resume"
    assert "error: No space left on device" in done.stderr


def test_logs_follow_a_job_to_its_end(batchrun: CommandLine) -> None:
    job = started(batchrun, 5)
    shown = batchrun("logs", job.id, "-f")
    assert shown.code == 0
    assert "done: 5 rows in " in shown.out
    assert job.state() == "done"


def test_verify_and_rm(batchrun: CommandLine) -> None:
    job = started(batchrun, 5)
    refused = batchrun("rm", job.id)
    assert refused.code in (0, 1)  # it may have ended by now
    if refused.code == 1:
        assert batchrun("watch", job.id).code == 0
        assert batchrun("verify", job.id).out == f"{job.id} is sound: 5 rows\n"
        (batchrun.folder / "out.jsonl").write_text("{}\n")
        shown = batchrun("verify", job.id)
        assert (shown.code, "out.jsonl" in shown.out) == (1, True)
        assert batchrun("rm", job.id).code == 0
    assert not job.path.exists()
    assert json.loads(batchrun("list", "--json").out) == []
