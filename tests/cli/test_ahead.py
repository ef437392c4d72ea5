"""A supervisor and a run that are started before their job is checked."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from batchrun.jobs.folder import find
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.queue import DeviceQueue
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.models.resolve import fingerprint
from batchrun.runner.ahead import Ahead
from batchrun.submission import submit
from tests.cli.conftest import CommandLine
from tests.cli.gate import Gate
from tests.cli.test_cancel import until


@pytest.fixture
def ours(batchrun: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The commands of all processes that work for this home."""
    monkeypatch.setenv("BATCHRUN_HOME", str(batchrun.home))

    def found() -> list[str]:
        return sorted(working(batchrun.home).values())

    return found


def idle(place: Path) -> None:
    """Have `submit` find an idle core, however busy the machine is."""
    place.mkdir(exist_ok=True)
    with (place / "sitecustomize.py").open("a") as file:
        file.write(
            "\nimport sys\nif 'submit' in sys.orig_argv:\n"
            "    from batchrun import machine\n    machine.has_idle_core = lambda: True\n"
        )


def working(home: Path) -> dict[int, str]:
    """Commands of the processes that work for a home, by PID."""
    found = {}
    for process in psutil.process_iter():
        try:
            mine, command = process.environ().get("BATCHRUN_HOME") == str(home), process.cmdline()
        except psutil.Error:  # it has just ended
            continue
        if mine and command[3:4] == ["batchrun"]:
            found[process.pid] = command[4]
    return found


def spec_of(batchrun: CommandLine) -> JobSpec:
    source = batchrun.write("in.jsonl", ["one", "two"])
    return JobSpec(
        (InputFile.of(source),),
        "jsonl",
        PromptSpec(column="prompt"),
        ModelSpec(
            name=str(batchrun.model),
            path=str(batchrun.model),
            fingerprint=fingerprint(batchrun.model),
            dtype="auto",
        ),
        SamplingSpec(max_tokens=2),
        output=OutputSpec(path=str(batchrun.folder / "out.jsonl"), format="jsonl"),
    )


def test_a_job_is_run_by_processes_that_were_there_before_it(
    batchrun: CommandLine, gate: Gate, ours: Callable[[], list[str]]
) -> None:
    idle(gate.place)
    source = batchrun.write("in.jsonl", ["one", "two"])
    shown = batchrun.submit(source, "-o", "out.jsonl", "--max-tokens", 200, "--detach")
    job = find(batchrun.home, shown.out.split()[0])
    until(lambda: job.state() == "running", "the run")
    assert ours() == ["run-job", "work"]
    for process in map(psutil.Process, working(batchrun.home)):
        assert str(job.path) not in process.cmdline()
    assert batchrun("cancel", job.id).code == 0
    until(lambda: ours() == [], "their end")


def test_nothing_stays_of_a_job_that_is_refused(
    batchrun: CommandLine, ours: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    idle(batchrun.folder / "site")
    monkeypatch.setenv("PYTHONPATH", str(batchrun.folder / "site"))
    source = batchrun.write("in.jsonl", ["one"])
    assert batchrun.submit(source, "--template", "{prmpt}").code == 1
    until(lambda: ours() == [], "their end")


def test_a_job_that_waits_for_its_turn_holds_no_run(
    batchrun: CommandLine, ours: Callable[[], list[str]]
) -> None:
    spec = spec_of(batchrun)
    with DeviceQueue(batchrun.home, "cpu"), Ahead("work", session=True) as ahead:
        until(lambda: "run-job" in ours(), "a run that waits for a job")
        started = submit(batchrun.home, spec, ahead=ahead)
        until(lambda: "run-job" not in ours(), "its end")
        assert ours() == ["work"]
    assert batchrun("watch", started.job.id).code == 0
    started.process.wait()
    assert len(batchrun.read("out.jsonl")) == 2


@pytest.mark.parametrize("killed", ["work", "run-job"])
def test_a_job_whose_waiting_process_was_killed_gets_another(
    batchrun: CommandLine, ours: Callable[[], list[str]], killed: str
) -> None:
    spec = spec_of(batchrun)
    with Ahead("work", session=True) as ahead:
        until(lambda: "run-job" in ours(), "a run that waits for a job")
        for pid, command in working(batchrun.home).items():
            if command == killed:
                os.kill(pid, signal.SIGKILL)
        until(lambda: killed not in ours(), "its end")
        started = submit(batchrun.home, spec, ahead=ahead)
        assert (str(started.job.path) in started.process.args) == (killed == "work")
    assert batchrun("watch", started.job.id).code == 0
    started.process.wait()
    assert len(batchrun.read("out.jsonl")) == 2
    assert "crashed" not in batchrun("logs", started.job.id).out


def test_who_waits_ends_with_who_started_it(
    batchrun: CommandLine, ours: Callable[[], list[str]]
) -> None:
    with Ahead("work", session=True):
        until(lambda: "run-job" in ours(), "a run that waits for a job")
    until(lambda: ours() == [], "their end")
