"""Runs of one job: only the latest writes; what they leave to the next one is exact."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from batchrun.jobs.errors import Fenced, JournalError, LeaseHeld
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Partial, Result
from batchrun.jobs.lease import Lease

ROOT = Path(__file__).parents[2]


def ok(row, sample=0):
    return Result(row, sample, "ok", text="x")


def bad(row, sample=0):
    return Result(row, sample, "error", error="no", error_kind="input")


@pytest.fixture
def folder(tmp_path):
    Journal.create(tmp_path)
    return tmp_path


@pytest.fixture
def journal(folder):
    with Journal(folder, 2) as journal:
        journal.begin_run()
        yield journal


@pytest.mark.parametrize("same_connection", [True, False])
def test_a_run_that_woke_up_late_writes_nothing(folder, same_connection):
    """Both believe that they hold the lease, as where a file system lost a lock."""
    with Journal(folder, 2) as first, Journal(folder, 2) as second:
        first.begin_run()
        first.write([ok(0)], {"steps": 1}, [Partial(5, 0, (1,))])
        assert second.begin_run() == 2
        stalled = first
        if not same_connection:
            stalled = Journal(folder, 2)
            stalled.resume_run(1)
        for write in (
            lambda: stalled.write([ok(1)], {"steps": 2}),
            lambda: stalled.write([], {"steps": 2}),
            lambda: stalled.write([], None, [Partial(5, 0, (1, 2))]),
            lambda: stalled.end_run("done", {}),
            lambda: stalled.set_meta("rows_total", 9),
            lambda: stalled.count_crash([1]),
            stalled.retry_failed,
        ):
            with pytest.raises(Fenced, match="another process, run 2, took this job over"):
                write()
        second.write([ok(1)])
        assert [r.row for r in second.results()] == [0, 1]
        assert second.partials() == {(5, 0): Partial(5, 0, (1,))}
        assert second.crash_counts() == {}
        assert second.meta("rows_total") is None
        assert [(run["state"], run["stats"]) for run in second.runs()] == [
            (None, {"steps": 1}),
            (None, {}),
        ]
        if not same_connection:
            stalled.close()


RACE = """
import sys
from pathlib import Path
from batchrun.jobs.errors import Fenced
from batchrun.jobs.journal.journal import Journal, Result
with Journal(Path(sys.argv[1]), 1) as journal:
    print(journal.begin_run(), flush=True)
    sys.stdin.readline()
    try:
        journal.write([Result(row, 0, "ok", text=sys.argv[2]) for row in range(10)])
        print("wrote")
    except Fenced:
        print("fenced")
"""


def test_of_two_processes_one_writes(folder):
    def start(name):
        command = [sys.executable, "-c", RACE, str(folder), name]
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    with start("a") as a, start("b") as b:
        runs = {int(p.stdout.readline()): (p, name) for p, name in ((a, "a"), (b, "b"))}
        for process in (a, b):
            process.stdin.write("\n")
            process.stdin.flush()
        assert runs[1][0].stdout.read() == "fenced\n"
        assert runs[2][0].stdout.read() == "wrote\n"
    with Journal(folder, 1, readonly=True) as journal:
        assert [r.text for r in journal.results()] == [runs[2][1]] * 10


def test_nothing_is_written_before_a_run_begins(folder):
    with Journal(folder, 1) as journal:
        journal.set_meta("rows_total", 3)
        with pytest.raises(JournalError, match="no run has begun"):
            journal.write([ok(0)])


def test_partials_are_replaced_and_go_with_their_result(journal, folder):
    journal.write([], None, [Partial(0, 1, (1, 2)), Partial(3, 0, (4,))])
    journal.write([ok(0, 0)], {"steps": 1}, [Partial(0, 1, (1, 2, 3))])
    kept = {(0, 1): Partial(0, 1, (1, 2, 3)), (3, 0): Partial(3, 0, (4,))}
    assert journal.partials() == kept
    journal.write([ok(0, 1)])
    assert journal.partials() == {(3, 0): Partial(3, 0, (4,))}
    journal.write([ok(3, 0)], None, [Partial(3, 0, (4, 5)), Partial(0, 1, (9,))])
    with Journal(folder, 2, readonly=True) as reader:
        assert reader.partials() == {}
        assert (3, 0) in reader.done()


@pytest.mark.parametrize(("row", "sample"), [(0, 2), (0, -1), (-1, 0)])
def test_a_partial_of_no_sample_is_refused(journal, row, sample):
    with pytest.raises(JournalError, match=f"row {row}, sample {sample}"):
        journal.write([ok(0)], None, [Partial(row, sample, (1,))])
    assert journal.counts().samples == 0


def test_a_refused_result_keeps_its_batch_s_partials_out_too(journal):
    journal.write([ok(0)])
    with pytest.raises(JournalError, match="twice"):
        journal.write([ok(0)], None, [Partial(1, 0, (1,))])
    assert journal.partials() == {}


def test_skipped_rows_are_counted_apart(journal):
    journal.write([Result(0, s, "skipped") for s in (0, 1)])
    journal.write([bad(1, 0), ok(1, 1), ok(2, 0)])
    counts = journal.counts()
    assert (counts.rows, counts.samples, counts.failed, counts.skipped) == (2, 5, 1, 1)


def test_retry_makes_failed_samples_to_do_again_and_no_others(folder):
    with Journal(folder, 2) as journal:
        journal.begin_run()
        journal.write([bad(0, 0), ok(0, 1), Result(1, 0, "skipped"), bad(2, 0), bad(2, 1)])
        journal.count_crash([0, 1, 7])
        journal.end_run("done-with-errors", {})
    with Journal(folder, 2) as journal:
        assert journal.retry_failed() == 3
        done = journal.done()
        left = {key for key in ((r, s) for r in range(3) for s in range(2)) if key in done}
        assert left == {(0, 1), (1, 0)}
        assert journal.crash_counts() == {1: 1, 7: 1}
        assert journal.runs()[-1]["state"] == "interrupted"
        assert journal.retry_failed() == 0


def test_retry_without_failures_leaves_a_finished_job_finished(folder):
    with Journal(folder, 2) as journal:
        journal.begin_run()
        journal.write([ok(0)])
        journal.end_run("done", {})
    with Journal(folder, 2) as journal:
        assert journal.retry_failed() == 0
        assert journal.runs()[-1]["state"] == "done"


def test_retry_is_refused_while_a_worker_has_the_job(folder):
    with Lease(folder), Journal(folder, 2) as worker:
        worker.begin_run()
        worker.write([bad(0)])
        with Journal(folder, 2) as other, pytest.raises(LeaseHeld, match=str(os.getpid())):
            other.retry_failed()
        assert worker.counts().failed == 1
        assert worker.retry_failed() == 1  # its own


def test_a_crash_counts_once_for_each_run_that_died(folder):
    with Journal(folder, 1) as journal:
        journal.count_crash([3])  # nothing ran
        assert journal.crash_counts() == {}
    for rows in ([3, 4], [3, 5], []):
        with Journal(folder, 1) as journal:
            journal.begin_run()
        with Journal(folder, 1) as journal:
            journal.count_crash(rows)
            journal.count_crash(rows)  # whoever counted was killed before it could say so
    with Journal(folder, 1, readonly=True) as journal:
        assert journal.crash_counts() == {3: 2, 4: 1, 5: 1}


def test_the_reason_of_a_failure_is_kept(journal):
    journal.end_run("failed", {"steps": 1}, "the device is gone")
    assert journal.runs()[-1]["reason"] == "the device is gone"


FAILING = """
import resource, signal, sys
from pathlib import Path
from batchrun.jobs.errors import JournalError
from batchrun.jobs.journal.journal import Journal, Result
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
big = [Result(i, 0, "ok", text="x" * 5000) for i in range(1, 1000)]
with Journal(Path(sys.argv[1]), 1) as journal:
    journal.begin_run()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    for _ in range(2):
        try:
            journal.write(big)
        except JournalError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
"""


def test_after_a_failed_write_a_connection_writes_no_more(folder):
    command = [sys.executable, "-c", FAILING, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "an earlier write failed" not in first
    assert "an earlier write failed" in second
    with Journal(folder, 1) as journal:
        journal.check()
        assert journal.counts().samples == 0


def test_results_move_out_of_the_log_as_it_grows(folder):
    with Journal(folder, 1) as journal:
        journal.begin_run()
        for first in range(0, 8000, 500):
            journal.write([Result(first + i, 0, "ok", text="x" * 2000) for i in range(500)])
        assert (folder / "journal.db-wal").stat().st_size < 16 << 20
        assert (folder / "journal.db").stat().st_size > 8 << 20
    assert not (folder / "journal.db-wal").exists()


def test_opening_for_writing_empties_the_log_first(folder):
    """Behind a log that a failed fsync may have left with a hole, nothing would be certain."""
    with Journal(folder, 1) as journal:
        journal.begin_run()
        copy = folder / "copy"
        copy.mkdir()
        for name in ("journal.db", "journal.db-wal"):
            (copy / name).write_bytes((folder / name).read_bytes())
    with Journal(copy, 1) as journal:
        assert (copy / "journal.db-wal").stat().st_size == 0
        assert journal.begin_run() == 2
    db = sqlite3.connect(copy / "journal.db")
    assert db.execute("SELECT count(*) FROM runs").fetchone() == (2,)
    db.close()
