"""After `rm` nothing of a job is left, whatever was killed before."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.cli.control import _room
from batchrun.jobs.output.destination import exporting, one_at_a_time
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.rows.jsonl import JsonFormat
from batchrun.jobs.rows.parquet import ParquetFormat
from batchrun.jobs.sweep import sweep
from tests.faults.smalljob import Ledger, NullEngine, SmallJob, forked, outcome_of

MARK = "Pr1vate-M4rker"
ROWS = 9


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def half(self, file, joined, path):
    """Writes rows as if they were not whole yet, and is killed."""
    JsonFormat().write(file, joined, path)
    file.flush()
    die()


def copied(job):
    target = job.path.parents[1] / "copy.parquet"
    with exporting(job.path.parents[1], job, target, overwrite=False) as may, job.journal() as db:
        export_job(job.spec(), db, target, format="parquet", may_replace=may)


def piped(job):
    with _room(job) as place, job.journal() as journal:
        export_job(job.spec(), journal, Path(place, "out.parquet"), format="parquet")


def beneath(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("moment", ["run", "export", "copied", "piped"])
def test_rm_leaves_nothing_whoever_was_killed_when(tmp_path, monkeypatch, moment):
    step = NullEngine.step

    def marked(engine):
        return [replace(c, text=f"{MARK} {c.text}") for c in step(engine)]

    monkeypatch.setattr(NullEngine, "step", marked)
    small, ledger = SmallJob(tmp_path, ROWS), Ledger(ROWS)
    small.write_input()

    def killed():
        if moment == "export":
            ParquetFormat.write = half

        def stop(rows):  # the last row has an error, and no text
            if moment == "run" and any(ROWS // 2 <= row < ROWS - 1 for row in rows):
                die()

        return outcome_of(lambda: small.submit_and_run(ledger, on_acknowledged=stop))

    assert forked(killed) == (-signal.SIGKILL if moment in {"run", "export"} else 0)
    [job] = small.jobs()
    if moment in {"copied", "piped"}:
        small.output.unlink()  # whole, and its user's

        def exported():
            ParquetFormat.write = half
            {"copied": copied, "piped": piped}[moment](job)
            return 0

        assert forked(exported) == -signal.SIGKILL
    assert MARK.encode() in beneath(small.home)
    with one_at_a_time(small.home):
        sweep(small.home)
        job.remove()
    assert MARK.encode() not in beneath(small.home)
    assert not [path for path in small.home.rglob("*") if path.suffix == ".tmp"]
