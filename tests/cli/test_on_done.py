"""`--on-done`: run once when a job has ended, however it ended, and without a say in that."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.jobs.folder import JobFolder
from batchrun.jobs.identity import set_limits
from batchrun.jobs.lease import held_by
from batchrun.runner.hook import Hook, environment
from batchrun.runner.live import LogTail
from tests.cli.conftest import CommandLine
from tests.cli.test_async import until
from tests.cli.test_cancel import SLEEPS, hanging, trap, trap_runs

__all__ = ["trap"]  # a fixture

ABORTS = "import os\nos.abort()\n"
TELLS = 'echo "$BATCHRUN_STATE $BATCHRUN_ROWS_DONE $BATCHRUN_ROWS_FAILED" >> told'


def logged(job: JobFolder) -> list[str]:
    return [str(line["message"]) for line in LogTail(job.path).lines()]


def with_hook(batchrun: CommandLine, command: str, state: str = "failed") -> JobFolder:
    """A job that has ended, without having run."""
    job = JobFolder(batchrun.unstarted(batchrun.write("in.jsonl", ["one"])))
    set_limits(job.path, {"on_done": command})
    job.set_state(state)
    return job


def started(batchrun: CommandLine, command: str) -> JobFolder:
    source = batchrun.write("in.jsonl", ["one", "two"])
    more = ("--max-tokens", 2, "--detach", "-o", "out.jsonl", "--on-done", command)
    shown = batchrun.submit(source, *more)
    assert shown.code == 0, shown.err
    return JobFolder(batchrun.home / "jobs" / shown.out.split()[0])


def told(batchrun: CommandLine) -> list[str]:
    """What the command wrote, once the supervisor has ended."""
    place = batchrun.folder / "told"
    until(place.exists, "the command")
    return place.read_text().splitlines()


def test_a_finished_job_can_be_exported_and_its_exit_code_stays(batchrun: CommandLine) -> None:
    batchrun.write("in.jsonl", ["one", "", "three"])
    command = (
        "pwd > told; env | grep ^BATCHRUN_ | sort >> told; cat >> told; echo said; "
        "batchrun export $BATCHRUN_JOB -o again.jsonl; exit 7"
    )
    (batchrun.folder / "job.toml").write_text(
        f'inputs = ["in.jsonl"]\nmodel = "{batchrun.model}"\nmax-tokens = 2\n'
        f"output = 'out.jsonl'\non-done = '{command}'\n"
    )
    shown = batchrun("submit", "job.toml")
    assert shown.code == 3, shown.err
    job = JobFolder(batchrun.home / "jobs" / shown.out.split("batchrun stats ")[1].strip())
    assert job.state() == "done-with-errors"
    place, *variables = (batchrun.folder / "told").read_text().splitlines()
    assert place == str(batchrun.folder)
    assert variables == [
        f"BATCHRUN_HOME={batchrun.home}",
        f"BATCHRUN_JOB={job.id}",
        f"BATCHRUN_OUTPUT={batchrun.folder}/out.jsonl",
        "BATCHRUN_ROWS_DONE=3",
        "BATCHRUN_ROWS_FAILED=1",
        "BATCHRUN_STATE=done-with-errors",
    ]
    assert batchrun.read("again.jsonl") == batchrun.read("out.jsonl")
    assert "running the command of --on-done" in shown.err
    lines = [line for line in logged(job) if line.startswith("--on-done: ")]
    assert lines[0] == "--on-done: said"
    assert lines[-1] == "--on-done: it failed with exit code 7"
    assert lines[-1] in shown.err  # submit waits for it

    with_other = batchrun("submit", "job.toml", "--on-done", "echo 'it is over'", "--overwrite")
    assert "--on-done 'echo '\"'\"'it is over'\"'\"''" in with_other.hint


def test_a_cancelled_job_runs_it(batchrun: CommandLine, trap: Path) -> None:
    trap_runs(trap, SLEEPS)
    job = started(batchrun, TELLS)
    hanging(job)
    assert batchrun("cancel", job.id).code == 0
    assert told(batchrun) == ["cancelled 0 0"]


def test_a_supervisor_that_is_told_to_end_runs_it(batchrun: CommandLine, trap: Path) -> None:
    trap_runs(trap, SLEEPS)
    job = started(batchrun, TELLS)
    supervisor, _ = hanging(job)
    supervisor.send_signal(signal.SIGTERM)
    assert told(batchrun) == ["interrupted 0 0"]


def test_a_run_that_crashes_again_and_again_runs_it_once(batchrun: CommandLine, trap: Path) -> None:
    trap_runs(trap, ABORTS)
    job = started(batchrun, TELLS)
    until(lambda: held_by(job.path) is None, "the end of the job")
    assert told(batchrun) == ["failed 0 0"]
    assert sum("the run crashed" in line for line in logged(job)) > 1


def test_resume_can_change_it(batchrun: CommandLine, trap: Path) -> None:
    trap_runs(trap, ABORTS)
    job = with_hook(batchrun, "echo first > told")
    shown = batchrun("resume", job.id, "--on-done", "echo second > told")
    assert shown.code == 1
    assert told(batchrun) == ["second"]
    (batchrun.folder / "told").unlink()
    assert batchrun("resume", job.id, "--on-done", "").code == 1
    assert not (batchrun.folder / "told").exists()


def test_a_command_that_does_not_end_is_ended(
    batchrun: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHRUN_HOOK_SECONDS", "0.3")
    job = with_hook(batchrun, "echo begun; sleep 600; echo over")
    Hook(job).run()
    assert logged(job) == [
        "--on-done: begun",
        "--on-done: it did not finish in 0.3 s and was stopped",
    ]
    assert job.state() == "failed"


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("true", []),
        ("exit 4", ["it failed with exit code 4"]),
        ("kill -9 $$", ["it was killed by SIGKILL"]),
        ("no-such-program-here 2> /dev/null", ["it failed with exit code 127"]),
        ("printf 'a\\033[2J\\nb'", ["a\x1b[2J", "b"]),  # what prints it escapes it
    ],
)
def test_what_the_log_says(batchrun: CommandLine, command: str, lines: list[str]) -> None:
    job = with_hook(batchrun, command)
    Hook(job).run()
    assert logged(job) == [f"--on-done: {line}" for line in lines]


def test_a_command_that_prints_without_end_fills_no_disk(batchrun: CommandLine) -> None:
    job = with_hook(batchrun, "yes | head -c 10000000; head -c 1000000 /dev/zero")
    Hook(job).run()
    lines = logged(job)
    assert len(lines) == 1001
    assert lines[-1] == "--on-done: its further output is not logged"


def test_what_it_leaves_behind_is_not_waited_for(batchrun: CommandLine) -> None:
    pid = batchrun.folder / "pid"
    job = with_hook(batchrun, f"sleep 600 & echo $! > '{pid}'")
    try:
        Hook(job).run()
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert logged(job) == []


def test_it_does_not_run_while_another_process_has_the_job(batchrun: CommandLine) -> None:
    job = with_hook(batchrun, f"touch '{batchrun.folder}/ran'", "running")
    hook = Hook(job)
    hook.note_end()  # there is none yet
    from batchrun.jobs.lease import Lease  # noqa: PLC0415

    with Lease(job.path):
        hook.run()
    assert not (batchrun.folder / "ran").exists()


def test_it_does_not_run_if_others_could_have_written_it(batchrun: CommandLine) -> None:
    ran = batchrun.folder / "ran"
    mine = with_hook(batchrun, f"touch '{ran}'")
    refused = "--on-done: not run: it may be another user's command (others can write to {})"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # it keeps nobody out
        job = JobFolder(Path(os.path.realpath(folder), mine.id))
        shutil.copytree(mine.path, job.path)
        for place in (job.path, job.path / "limits.json"):
            mode = stat.S_IMODE(place.stat().st_mode)
            place.chmod(mode | stat.S_IWOTH)
            Hook(job).run()
            assert logged(job)[-1] == refused.format(place)
            place.chmod(mode)
        if os.geteuid() == 0:  # only root gives files away
            os.chown(job.path / "job.json", 4321, -1)
            Hook(job).run()
            assert logged(job)[-1].endswith(f"({job.path / 'job.json'} belongs to user 4321)")
            os.chown(job.path / "job.json", 0, -1)
        assert not ran.exists()
        Path(folder).chmod(0o700)
        job.path.chmod(0o777)
        Hook(job).run()
        assert ran.exists()


def test_it_has_the_environment_of_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchrun import children  # noqa: PLC0415

    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("BATCHRUN_ON_DONE", "batchrun submit in.jsonl")  # for ever
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    found = environment(children.inheriting(3)["env"])
    assert found["PYTHONPATH"] == "/mine"
    assert not {"PYTHONSAFEPATH", "BATCHRUN_ON_DONE"} & found.keys()
    assert environment({"PYTHONSAFEPATH": "1"}).keys() == {"PATH"}


def test_it_is_not_part_of_the_work(batchrun: CommandLine) -> None:
    job = with_hook(batchrun, "true")
    spec = job.spec()
    assert spec.runtime.on_done == "true"
    other = replace(spec, runtime=replace(spec.runtime, on_done=None))
    assert spec.fingerprint() == other.fingerprint()
