"""No job's and no command's file is replaced by another one's that was not told to."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from batchrun import submission
from batchrun.cli import cli
from batchrun.jobs.folder import JobFolder, list_jobs
from batchrun.jobs.lease import Lease, held_by
from batchrun.jobs.queue import DeviceQueue
from batchrun.runner import supervisor
from tests.cli.conftest import CommandLine, Shown
from tests.cli.test_async import until

SHORT = ("--max-tokens", 2)


def submitted(batchrun: CommandLine, *arguments: object) -> JobFolder:
    shown = batchrun.submit(*arguments, *SHORT, "--detach")
    assert shown.code == 0, shown.err
    return JobFolder(batchrun.home / "jobs" / shown.out.split()[0])


@dataclass
class Waiting:
    """Commands that have begun at the same instant: each stands before the lock."""

    processes: list[subprocess.Popen[str]]

    def ended(self) -> list[Shown]:
        said = [process.communicate() for process in self.processes]
        codes = [process.returncode for process in self.processes]
        return [Shown(code, *texts) for code, texts in zip(codes, said, strict=True)]


@contextmanager
def at_once(batchrun: CommandLine, *commands: list[str]) -> Iterator[Waiting]:
    """Start commands that all have checked what they can alone, and wait for each other."""
    path = batchrun.home / "jobs" / ".submitting"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        inode = f":{os.fstat(lock.fileno()).st_ino} "
        waiting = Waiting(
            [
                subprocess.Popen(
                    command,
                    cwd=batchrun.folder,
                    env=batchrun.environment(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for command in commands
            ]
        )

        def blocked() -> bool:
            lines = Path("/proc/locks").read_text().splitlines()
            return sum("->" in line and inode in line for line in lines) == len(commands)

        until(blocked, "the commands to wait for the lock")
        yield waiting


@pytest.fixture
def busy(batchrun: CommandLine) -> Iterator[ExitStack]:
    """The device is another's until this is closed: jobs stay queued."""
    with ExitStack() as stack:
        stack.enter_context(DeviceQueue(batchrun.home, "cpu"))
        yield stack
        stack.close()
        for job in list_jobs(batchrun.home):
            until(lambda job=job: held_by(job.path) is None, f"the end of {job.id}")


# --- submit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_work", [True, pytest.param(False, marks=pytest.mark.long)])
def test_of_two_submissions_at_the_same_instant_one_passes(
    batchrun: CommandLine, busy: ExitStack, same_work: bool
) -> None:
    source = batchrun.write("in.jsonl", ["one", "two"])
    command = batchrun.argv("submit", source, *SHORT, "--detach", "--model", batchrun.model)
    seeds = [("--seed", str(0 if same_work else seed)) for seed in (1, 2)]
    with at_once(batchrun, *([*command, *seed] for seed in seeds)) as both:
        pass
    passed, refused = sorted(both.ended(), key=lambda shown: shown.code)
    assert (passed.code, refused.code) == (0, 1)
    [job] = list_jobs(batchrun.home)
    assert passed.out.startswith(job.id)
    assert job.id in refused.error
    assert ("is the same work" if same_work else "writes its output") in refused.error
    busy.close()
    assert batchrun("watch", job.id).code == 0
    assert len(batchrun.read("in-completions.jsonl")) == 2


def test_a_live_job_s_destination_is_refused_in_any_spelling(
    batchrun: CommandLine, busy: ExitStack
) -> None:
    source = batchrun.write("in.jsonl", ["one"])
    (batchrun.folder / "real").mkdir()
    (batchrun.folder / "linked").symlink_to("real")
    (batchrun.folder / "link.jsonl").symlink_to("real/out.jsonl")
    job = submitted(batchrun, source, "-o", "real/out.jsonl")
    for spelled in ("real/out.jsonl", "linked/out.jsonl", "link.jsonl", "real/../linked/out.jsonl"):
        for more in ((), ("--dry-run",)):
            shown = batchrun.submit(source, "--again", "-o", spelled, "--overwrite", *more)
            assert shown.code == 1
            path = batchrun.folder / spelled
            want = f"{path} is where the job {job.id}, which is queued, writes its output"
            assert shown.error == want
            assert f"batchrun watch {job.id}, or batchrun cancel {job.id}" in shown.hint
    for more in ((), ("--dry-run",)):
        same = batchrun.submit(source, *SHORT, "-o", "other.jsonl", *more)
        assert (same.code, f"the job {job.id} is the same work" in same.error) == (1, True)
    other = batchrun.write("other.jsonl", ["two"])
    shown = batchrun.submit(other, "-o", source, "--overwrite")
    assert f"{source} is what the job {job.id}, which is queued, reads" in shown.error
    assert batchrun("cancel", job.id).code == 0
    taken_over = submitted(batchrun, source, "--again", "-o", "linked/out.jsonl")
    shown = batchrun("resume", job.id)
    assert f"the job {taken_over.id}, which is queued, writes its output" in shown.error
    assert job.state() == "cancelled"


def test_a_job_that_nobody_started_stands_in_the_way_until_it_is_removed(
    batchrun: CommandLine,
) -> None:
    source = batchrun.write("in.jsonl", ["one"])
    job = JobFolder(batchrun.unstarted(source))
    shown = batchrun.submit(source, "-o", "out.jsonl", "--again", "--dry-run")
    assert (shown.code, "which is new, writes" in shown.error) == (1, True)
    assert f"batchrun rm {job.id}" in shown.hint
    assert batchrun("rm", job.id).code == 0
    assert batchrun.submit(source, "-o", "out.jsonl", "--dry-run").code == 0


def test_inputs_of_one_name_do_not_share_a_default_output(batchrun: CommandLine) -> None:
    for folder in ("a", "b"):
        (batchrun.folder / folder).mkdir()
        batchrun.write(f"{folder}/part.jsonl", [folder])
    assert batchrun.submit("a/part.jsonl", *SHORT).code == 0
    shown = batchrun.submit("b/part.jsonl", *SHORT)
    assert (shown.code, "part-completions.jsonl already exists" in shown.error) == (1, True)
    assert [row["prompt"] for row in batchrun.read("part-completions.jsonl")] == ["a"]


def test_batchrun_s_own_files_and_inputs_are_no_destination(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", ["one"])
    job = JobFolder(batchrun.unstarted(source))
    os.link(source, batchrun.folder / "hard.jsonl")
    for path, error in [
        (job.path / "log.jsonl", "among batchrun's own files"),
        ("hard.jsonl", "is an input of this job"),
    ]:
        for command in (
            ("submit", source, "--again", "--model", batchrun.model, "--overwrite"),
            ("export", job.id, "--partial", "--overwrite"),
            ("resume", job.id, "--overwrite"),
        ):
            shown = batchrun(*command, "-o", path)
            assert (shown.code, error in shown.error) == (1, True), command
    assert batchrun.read("in.jsonl") == [{"prompt": "one"}]


# --- the run -------------------------------------------------------------------------------------


def test_a_file_that_appears_during_the_run_stays(batchrun: CommandLine, busy: ExitStack) -> None:
    source = batchrun.write("in.jsonl", ["one", "two"])
    job = submitted(batchrun, source, "-o", "out.jsonl")
    out = batchrun.folder / "out.jsonl"
    out.write_text("precious")
    busy.close()
    shown = batchrun("watch", job.id)
    assert (shown.code, job.state()) == (1, "failed")
    assert f"{out} was written by another program in the meantime" in shown.error
    assert "the results are safe in the job" in shown.error
    assert f"batchrun export {job.id} --output OTHER" in shown.hint
    assert shown.err.count("Traceback") == 0

    refused = batchrun("resume", job.id)
    assert (refused.code, f"{out} exists, and the job {job.id} did not" in refused.error) == (1, 1)
    assert out.read_text() == "precious"
    assert batchrun("export", job.id, "-o", "other.jsonl").code == 0
    assert batchrun("resume", job.id, "-o", "new.parquet").code == 0
    assert batchrun.read("new.parquet") == batchrun.read("other.jsonl")
    assert batchrun("show", job.id, "--json").json["output"]["format"] == "parquet"
    assert batchrun("verify", job.id).code == 0
    assert out.read_text() == "precious"
    assert batchrun("resume", job.id, "-o", out, "--overwrite").code == 0
    assert batchrun.read("out.jsonl") == batchrun.read("other.jsonl")
    hidden = [path for path in batchrun.folder.iterdir() if path.name.startswith(".")]
    assert hidden == []


def test_overwrite_is_for_whatever_is_there_and_for_once(
    batchrun: CommandLine, busy: ExitStack
) -> None:
    source = batchrun.write("in.jsonl", ["one"])
    out = batchrun.folder / "out.jsonl"
    out.write_text("old")
    job = submitted(batchrun, source, "-o", "out.jsonl", "--overwrite")
    assert json.loads((job.path / "job.json").read_text())["output"]["overwrite"] is True
    out.write_text("newer")
    busy.close()
    assert batchrun("watch", job.id).code == 0
    assert len(batchrun.read("out.jsonl")) == 1
    out.write_text("of somebody else")
    shown = batchrun("resume", job.id)
    assert (shown.code, "did not write it" in shown.error) == (1, True)
    assert out.read_text() == "of somebody else"


def test_a_retried_job_writes_its_own_output_anew_and_no_other_s(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", ["one", None])
    assert batchrun.submit(source, *SHORT, "-o", "out.jsonl").code == 3
    [job] = list_jobs(batchrun.home)
    out = batchrun.folder / "out.jsonl"
    before, rows = out.stat().st_ino, batchrun.read("out.jsonl")
    (batchrun.folder / "keeps the inode").hardlink_to(out)
    assert batchrun("resume", "--retry-failed").code == 3
    assert out.stat().st_ino != before
    assert batchrun.read("out.jsonl") == rows

    with out.open("a") as file:
        file.write('{"added": "by hand"}\n')
    shown = batchrun("resume", "--retry-failed")
    assert (shown.code, "did not write it" in shown.error) == (1, True)
    assert job.state() == "done-with-errors"  # nothing was begun
    assert job.counts().failed == 1
    assert batchrun.read("out.jsonl")[-1] == {"added": "by hand"}
    assert batchrun("resume", "--retry-failed", "--overwrite").code == 3
    assert batchrun.read("out.jsonl") == rows


# --- resume --------------------------------------------------------------------------------------


def interrupted(batchrun: CommandLine, source: Path, output: str = "out.jsonl") -> JobFolder:
    """A job over `source` that was broken off."""
    job = JobFolder(batchrun.unstarted(source, output))
    with Lease(job.path), job.journal(readonly=False) as journal:
        journal.begin_run()
    job.set_state("interrupted")
    return job


def test_of_two_jobs_that_are_resumed_at_the_same_instant_one_goes_on(
    batchrun: CommandLine, busy: ExitStack
) -> None:
    source = batchrun.write("in.jsonl", ["one"])
    jobs = [interrupted(batchrun, source) for _ in range(2)]
    commands = [batchrun.argv("resume", job.id, "--detach") for job in jobs]
    with at_once(batchrun, *commands) as both:
        pass
    passed, refused = sorted(both.ended(), key=lambda shown: shown.code)
    assert (passed.code, refused.code) == (0, 1)
    states = {job.id: job.state() for job in jobs}
    winner = passed.out.split()[0]
    assert states.pop(winner) == "queued"
    assert list(states.values()) == ["interrupted"]
    assert f"the job {winner}, which is queued, writes its output" in refused.error


def test_nobody_else_decides_until_the_resumed_job_has_its_worker(
    batchrun: CommandLine, busy: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHRUN_HOME", str(batchrun.home))
    job = interrupted(batchrun, batchrun.write("in.jsonl", ["one"]))
    held: list[int | None] = []
    started: list[subprocess.Popen[bytes]] = []
    start = supervisor.start

    def starting(*arguments: Any) -> supervisor.Started:
        found = start(*arguments)
        started.append(found.process)
        return found

    monkeypatch.setattr(supervisor, "start", starting)

    @contextmanager
    def taking(*_: Any, **__: Any) -> Iterator[None]:
        held.append(held_by(job.path))
        yield
        held.append(held_by(job.path))

    monkeypatch.setattr(submission, "resuming", taking)
    submission.resume(
        *(batchrun.home, JobFolder(job.path)),
        **{"retry_failed": False, "output": None, "overwrite": False, "limits": {}, "tell": print},
    )
    busy.close()
    assert started[0].wait() == 0
    assert held == [None, started[0].pid]


def test_one_job_that_is_refused_does_not_keep_the_others_from_going_on(
    batchrun: CommandLine,
) -> None:
    source = batchrun.write("in.jsonl", ["one"])
    first, second = (interrupted(batchrun, source) for _ in range(2))
    third = interrupted(batchrun, source)
    assert batchrun("resume", third.id, "-o", "third.jsonl").code == 0
    (batchrun.folder / "third.jsonl").unlink()
    third.set_state("interrupted")
    shown = batchrun("resume", "--all")
    assert shown.code == 1
    assert f"{batchrun.folder / 'out.jsonl'} exists, and the job" in shown.error
    states = sorted(job.state() for job in (first, second))
    assert states == ["done", "interrupted"]
    assert third.state() == "done"
    assert batchrun.read("third.jsonl") == batchrun.read("out.jsonl")
    for more in (("-o", "x.jsonl"), ("--overwrite",)):
        assert batchrun("resume", "--all", *more).code == 2


# --- export --------------------------------------------------------------------------------------


def test_export_leaves_alone_what_is_another_s(batchrun: CommandLine, busy: ExitStack) -> None:
    source, other = batchrun.write("in.jsonl", ["one"]), batchrun.write("other.jsonl", ["two"])
    done = interrupted(batchrun, source)
    live = submitted(batchrun, other, "-o", "live.jsonl")
    for output, error in [
        ("live.jsonl", f"is where the job {live.id}, which is queued, writes its output"),
        ("other.jsonl", f"is what the job {live.id}, which is queued, reads"),
        (source, "is an input of this job"),
    ]:
        shown = batchrun("export", done.id, "--partial", "--overwrite", "-o", output)
        assert (shown.code, error in shown.error) == (1, True)
    shown = batchrun("export", live.id, "--partial")
    assert (shown.code, f"the job {live.id}, which is queued, writes" in shown.error) == (1, True)
    assert batchrun("export", live.id, "--partial", "-o", "partial.jsonl").code == 0

    busy.close()
    assert batchrun("watch", live.id).code == 0
    assert len(batchrun.read("live.jsonl")) == 1


def test_a_part_that_was_exported_gives_way_to_the_whole(batchrun: CommandLine) -> None:
    job = interrupted(batchrun, batchrun.write("in.jsonl", ["one"]))
    assert batchrun("export", job.id, "--partial").code == 0
    assert batchrun.read("out.jsonl") == []
    again = batchrun("export", job.id, "--partial")
    assert (again.code, "already exists" in again.error) == (1, True)
    assert job.state() == "interrupted"
    assert batchrun("resume", job.id).code == 0
    assert len(batchrun.read("out.jsonl")) == 1


# --- at once -------------------------------------------------------------------------------------


def test_of_six_that_resume_a_job_at_once_one_does_and_five_say_so(
    batchrun: CommandLine, busy: ExitStack
) -> None:
    job = interrupted(batchrun, batchrun.write("in.jsonl", ["one"]))
    command = batchrun.argv("resume", job.id, "--detach")
    with at_once(batchrun, *[command] * 6) as waiting:
        pass
    ended = waiting.ended()
    assert sorted(shown.code for shown in ended) == [0] + [1] * 5
    supervisor = held_by(job.path)
    for shown in ended:
        if shown.code:
            said = f"the job {job.id} is being run by process {supervisor}"
            watch = f"batchrun watch {job.id}, or batchrun cancel {job.id}"
            assert (shown.error, shown.hint) == (said, watch)
        else:
            assert shown.out.splitlines()[0] == job.id
    assert batchrun("cancel", job.id).code == 0
    assert "error" not in (job.path / "worker.log").read_text()


def test_of_those_that_resume_all_at_once_each_job_has_one_and_nobody_fails(
    batchrun: CommandLine, busy: ExitStack
) -> None:
    jobs = [
        interrupted(batchrun, batchrun.write(f"{name}.jsonl", [name]), f"{name}-out.jsonl")
        for name in ("a", "b")
    ]
    command = batchrun.argv("resume", "--all", "--detach")
    with at_once(batchrun, *[command] * 3) as waiting:
        pass
    ended = waiting.ended()
    assert [shown.code for shown in ended] == [0] * 3, ended
    for job in jobs:
        assert sum(f"{job.id}\n" in shown.out for shown in ended) == 1
        assert sum(f"job {job.id} is being run by" in shown.err for shown in ended) <= 2
        assert batchrun("cancel", job.id).code == 0


def test_nobody_else_decides_until_the_submitted_job_has_its_worker(
    batchrun: CommandLine, busy: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `resume --all` could start it, and who submitted it would be told so as an error."""
    monkeypatch.setenv("BATCHRUN_HOME", str(batchrun.home))
    monkeypatch.chdir(batchrun.folder)
    start = supervisor.start
    free: list[bool] = []
    started: list[supervisor.Started] = []

    def starting(*arguments: Any) -> supervisor.Started:
        with (batchrun.home / "jobs" / ".submitting").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free.append(True)
            except BlockingIOError:
                free.append(False)
        started.append(start(*arguments))
        return started[0]

    monkeypatch.setattr(supervisor, "start", starting)
    source = batchrun.write("in.jsonl", ["one"])
    arguments = ["submit", source, "--model", batchrun.model, *SHORT, "--detach"]
    assert cli.main([str(word) for word in arguments], standalone_mode=False) == 0
    assert free == [False]
    [job] = list_jobs(batchrun.home)
    assert job.state() == "queued"
    assert batchrun("cancel", job.id).code == 0
    assert started[0].process.wait(60) == 130
