"""A damaged job at the command line: named, repaired by `resume`, and in no one's way."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.conftest import CommandLine

SHORT = ("--max-tokens", 3)


def _job(batchrun: CommandLine, *names: str) -> Path:
    prompts = batchrun.write("in.jsonl", ["one", "two", "three"])
    assert batchrun.submit(prompts, *SHORT, "--output", "first.jsonl", *names).code == 0
    [folder] = [f for f in (batchrun.home / "jobs").iterdir() if (f / "journal.db").exists()]
    return folder


@pytest.mark.long
def test_a_flipped_bit_in_an_answer_is_named_and_the_row_computed_again(
    batchrun: CommandLine,
) -> None:
    job = _job(batchrun)
    right = (batchrun.folder / "first.jsonl").read_text()
    path = job / "journal.db"
    with closing(sqlite3.connect(path)) as db:
        [(text,)] = db.execute("SELECT CAST(text AS BLOB) FROM results WHERE id = 1")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = path.read_bytes()
    assert data.count(text) == 1
    path.write_bytes(data.replace(text, bytes([text[0] ^ 1]) + text[1:]))

    checked = batchrun("verify")
    assert checked.code == 1
    assert "wrong checksum for the result of row 1" in checked.out
    assert f"batchrun resume {job.name}" in checked.out

    exported = batchrun("export", "-o", "other.jsonl")
    assert exported.code == 1
    assert "the result of row 1" in exported.error
    assert not (batchrun.folder / "other.jsonl").exists()
    assert batchrun("export", "-o", "part.jsonl", "--partial").out.startswith("2 rows in")
    assert batchrun("stats").code == batchrun("show").code == batchrun("list").code == 0

    resumed = batchrun("resume", job.name)
    assert resumed.code == 0
    assert "removed damaged data: the result of row 1" in resumed.err
    assert "2 of them kept from earlier runs" in resumed.out
    assert (batchrun.folder / "first.jsonl").read_text() == right
    assert batchrun("verify").code == 0


def test_a_damaged_job_is_in_no_ones_way(batchrun: CommandLine) -> None:
    job = _job(batchrun)
    sound = batchrun.unstarted(batchrun.write("more.jsonl", ["four"]))
    (job / "journal.db").write_bytes(b"\0" * 8192)
    (job / "state.json").unlink()
    (job / "job.json").write_text('{"version": 1')
    states = {row["job"]: row["state"] for row in batchrun("list", "--json").json}
    assert states == {job.name: "damaged", sound.name: "new"}

    resumed = batchrun("resume", "--all")
    assert resumed.code == 1
    assert "journal.db is damaged" in resumed.error
    assert json.loads((sound / "state.json").read_text())["state"] == "done"

    prompts = batchrun.folder / "in.jsonl"
    again = batchrun.submit(prompts, *SHORT, "--output", "second.jsonl")
    assert again.code == 0, again.err

    for command in ("stats", "show", "verify", "export", "watch"):
        shown = batchrun(command, job.name)
        assert shown.code == 1
        assert "damaged" in shown.out + shown.err
        assert "internal error" not in shown.err
    assert batchrun("rm", job.name).out == f"removed {job.name}\n"
    assert not job.exists()
