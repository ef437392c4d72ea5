"""A disk that is full, too small, read-only; an input that is gone; a clock that goes back."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from batchrun.jobs import folder
from batchrun.jobs.errors import InputError, JobError
from batchrun.jobs.lease import held_by
from batchrun.jobs.stats import summarise
from batchrun.jobs.verify import verify
from batchrun.runner.job_run import Outcome
from tests.faults.liveness import check_goes_on
from tests.faults.smalljob import DONE, ENDED_WITH_ERROR, Ledger, SmallJob, forked, outcome_of
from tests.tiny import write_tiny_model

ROWS = 1200


def mounted(place: Path, options: str) -> str | None:
    """Mount a tmpfs there; why it can't be done, or None."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip() if done.returncode else None


@pytest.fixture
def small(tmp_path: Path) -> SmallJob:
    job = SmallJob(tmp_path / "case", ROWS)
    job.write_input()
    return job


@pytest.fixture
def tiny_disk(small: SmallJob) -> Iterator[SmallJob]:
    """The job's folder and output on a disk of 1 MB."""
    try:
        reason = mounted(small.home, "size=1m")
    except FileNotFoundError:
        reason = "there is no mount"
    if reason:
        pytest.skip(f"a tmpfs can't be mounted: {reason}")
    yield small
    subprocess.run(["umount", str(small.home)], check=True)


def remount(small: SmallJob, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(small.home)], check=True)


def finish(small: SmallJob, ledger: Ledger) -> None:
    """Resume in a clean process, and look."""
    check_goes_on(small.home)
    assert forked(lambda: outcome_of(lambda: small.submit_and_run(ledger))) == DONE
    [job] = small.jobs()
    assert small.check_journal(job, ledger.acknowledged()) == set(range(small.rows))
    small.check_output()


def kept(small: SmallJob, ledger: Ledger) -> int:
    """Rows that are in the journal, every acknowledged one among them."""
    [job] = small.jobs()
    assert job.state() in {"failed", "interrupted"}
    assert not small.output.exists()
    return len(small.check_journal(job, ledger.acknowledged()))


def test_a_disk_of_one_megabyte(tiny_disk: SmallJob) -> None:
    ledger = Ledger(ROWS)
    with pytest.raises((JobError, OSError)) as caught:
        tiny_disk.submit_and_run(ledger)
    if isinstance(caught.value, JobError):
        assert caught.value.hint
        assert "disk" in f"{caught.value} {caught.value.hint}"
    else:
        assert caught.value.errno == errno.ENOSPC
    if tiny_disk.jobs():  # or it was refused before it began
        remount(tiny_disk, "size=4m")
        assert 0 < kept(tiny_disk, ledger) < ROWS
    remount(tiny_disk, "size=64m")
    finish(tiny_disk, ledger)


def test_a_disk_that_becomes_read_only(tiny_disk: SmallJob) -> None:
    remount(tiny_disk, "size=64m")
    ledger = Ledger(ROWS)

    def pull_out(rows: list[int]) -> None:
        if len(ledger.acknowledged()) > ROWS // 3:
            os._exit(17)

    status = forked(
        lambda: outcome_of(lambda: tiny_disk.submit_and_run(ledger, on_acknowledged=pull_out))
    )
    assert status == 17
    remount(tiny_disk, "ro")
    [job] = tiny_disk.jobs()
    assert job.counts().rows >= ROWS // 3  # looking is possible
    assert summarise(job)["rows"]["done"] >= ROWS // 3
    assert forked(lambda: outcome_of(lambda: tiny_disk.submit_and_run(ledger))) == ENDED_WITH_ERROR
    remount(tiny_disk, "rw")
    finish(tiny_disk, ledger)


def test_a_limit_of_file_sizes(small: SmallJob) -> None:
    ledger = Ledger(ROWS)

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        return outcome_of(lambda: small.submit_and_run(ledger))

    assert forked(limited) == ENDED_WITH_ERROR
    assert 0 < kept(small, ledger) < ROWS
    finish(small, ledger)


def test_an_input_that_is_gone_and_comes_back(small: SmallJob) -> None:
    ledger = Ledger(ROWS)
    job = folder.create(small.home, small.spec())
    content = small.prompts.read_bytes()
    small.prompts.unlink()
    with pytest.raises(InputError, match="prompts") as caught:
        small.submit_and_run(ledger)
    assert caught.value.hint
    small.prompts.write_bytes(content[:-1])
    with pytest.raises(JobError, match="bytes"):
        small.submit_and_run(ledger)
    assert job.counts().rows == 0
    small.prompts.write_bytes(content)
    finish(small, ledger)


def test_a_clock_that_is_set_back_a_year_between_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`time.time` is replaced, which is what the program asks; files get the kernel's times."""
    small, ledger = SmallJob(tmp_path / "case", 60), Ledger(60)
    small.write_input()

    def die_halfway(rows: list[int]) -> None:
        if len(ledger.acknowledged()) > 20:
            os._exit(17)

    run = lambda: outcome_of(lambda: small.submit_and_run(ledger, on_acknowledged=die_halfway))  # noqa: E731
    assert forked(run) == 17
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() - 365 * 86400)
    assert small.submit_and_run(ledger) is Outcome.DONE_WITH_ERRORS
    [job] = small.jobs()
    assert small.check_journal(job, ledger.acknowledged()) == set(range(60))
    small.check_output()
    summary = summarise(job)
    assert summary["runs"] == 2
    assert summary["rows"]["done"] == 60
    assert summary["rows"]["resumed"] >= 20
    assert all(seconds >= 0 for seconds in summary["time"].values())


def test_thousands_of_jobs_are_listed_and_it_is_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.listing", "--jobs", "2000", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["briefs_cpu_s"] > 0


def test_a_disk_that_fills_up_under_a_real_run_leaves_the_reason(tiny_disk: SmallJob) -> None:
    """No byte is left, not for `state.json` either: the run's last words are in its log."""
    remount(tiny_disk, "size=64m")
    root, ballast = tiny_disk.root, tiny_disk.home / "ballast"
    model, prompts = write_tiny_model(root / "tiny"), root / "rows.jsonl"
    prompts.write_text("".join(f'{{"prompt": "number {i}"}}\n' for i in range(60_000)))
    settings = {"BATCHRUN_HOME": str(tiny_disk.home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def batchrun(*arguments: object) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "batchrun", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**os.environ, **settings},
        )
        return done.returncode, done.stdout

    def wait_for_rows(count: int) -> int:
        while (done := job.counts().rows) < count:
            assert held_by(job.path) is not None, (job.path / "worker.log").read_text()
            time.sleep(0.02)
        return done

    out = ("--max-tokens", 8, "-o", tiny_disk.home / "out.jsonl")
    assert batchrun("submit", prompts, "-m", model, "--detach", *out)[0] == 0
    [job] = tiny_disk.jobs()
    wait_for_rows(50)
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    status, shown = batchrun("watch", job.id)
    assert status in (1, 130), shown
    assert job.state() in ("failed", "interrupted")
    failure = job.failure()
    assert failure is not None
    assert "disk" in f"{failure}", (job.path / "worker.log").read_text()
    assert failure[0] in batchrun("show", job.id)[1]
    ballast.unlink()
    had = job.counts().rows
    assert had >= 50
    assert batchrun("resume", job.id, "--detach")[0] == 0
    wait_for_rows(had + 1)
    assert batchrun("cancel", job.id)[0] == 0
    assert job.state() == "cancelled"
    assert verify(job) == []
