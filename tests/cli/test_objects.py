"""Jobs whose rows, answers and model are objects in a store."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.folder import JobFolder
from batchrun.jobs.holders import holders, send
from batchrun.jobs.lease import LOCK, held_by
from batchrun.objectstore.paths import ObjectPath
from tests.cli.conftest import CommandLine
from tests.cli.gate import Gate
from tests.cli.test_async import running, until
from tests.s3 import S3

PROMPTS = [f"row {i}" for i in range(12)]
OPTIONS = ("--max-tokens=8", "--temperature=0.7", "--dtype=float32")


def packed(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


ROWS = [{"prompt": prompt} for prompt in PROMPTS]


_answers: list[str] = []


@pytest.fixture
def here(batchrun: CommandLine) -> list[str]:
    """The answers to the prompts as a job over a local file has them; computed once."""
    if _answers:
        return _answers
    source = batchrun.write("here.jsonl", PROMPTS)
    done = batchrun.submit(source, *OPTIONS, "--output", "answers.jsonl")
    assert done.code == 0, done.err
    _answers.extend(row["completion"] for row in batchrun.read("answers.jsonl"))
    return _answers


def test_rows_and_answers_in_a_bucket(batchrun: CommandLine, s3: S3, here: list[str]) -> None:
    s3.put("rows/lang=de/part-2.parquet", packed(ROWS[:4]))
    s3.put("rows/lang=de/part-10.parquet", packed(ROWS[4:8]))
    s3.put("rows/lang=fr/part-1.parquet", packed(ROWS[8:]))
    s3.put("rows/_SUCCESS")
    for file in batchrun.model.iterdir():
        s3.put(f"model/{file.name}", file.read_bytes())
    to = s3.bucket / "out" / "answers.parquet"
    options = (*OPTIONS, "--model", f"{s3.bucket}/model", "--output", to)
    done = batchrun.submit(f"{s3.bucket}/rows", *options)
    assert done.code == 0, done.err
    assert f"output: {to}" in done.out
    table = pq.read_table(io.BytesIO(s3.get(to)))
    assert table["prompt"].to_pylist() == PROMPTS
    assert table["completion"].to_pylist() == here
    assert table["lang"].to_pylist() == ["de"] * 8 + ["fr"] * 4
    assert "is sound" in batchrun("verify").out
    assert str(to) in batchrun("list").out
    assert "already exists" in batchrun.submit(f"{s3.bucket}/rows", *options).error
    other = s3.bucket / "out" / "again.csv.gz"
    assert batchrun("export", "-o", other).code == 0
    assert "already exists" in batchrun("export", "-o", other).error
    assert batchrun("export", "-o", other, "--overwrite").code == 0
    found = list(csv.DictReader(io.StringIO(gzip.decompress(s3.get(other)).decode())))
    assert [row["completion"] for row in found] == here
    assert list(batchrun.home.glob("jobs/.upload-*")) == []
    s3.put("out/answers.parquet", packed(ROWS))
    assert "has the columns prompt, not prompt, lang" in batchrun("verify").out


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv"])
def test_other_formats(batchrun: CommandLine, s3: S3, here: list[str], name: str) -> None:
    data = {
        "rows.jsonl.gz": gzip.compress(lines(ROWS)),
        "rows.csv": "".join(f"{line}\n" for line in ("prompt", *PROMPTS)).encode(),
    }[name]
    done = batchrun.submit(s3.put(name, data), *OPTIONS, "--output", s3.bucket / "out.jsonl")
    assert done.code == 0, done.err
    found = [json.loads(line) for line in s3.get(s3.bucket / "out.jsonl").splitlines()]
    assert [row["prompt"] for row in found] == PROMPTS
    assert [row["completion"] for row in found] == here


def kill(job: JobFolder) -> None:
    while held_by(job.path) is not None:
        for process in holders(job.path / LOCK):
            send(job.path / LOCK, process, signal.SIGKILL)


def killed(batchrun: CommandLine, gate: Gate, path: ObjectPath, *options: object) -> JobFolder:
    """A job that was killed when it had some of its answers."""
    done = batchrun.submit(path, *OPTIONS, *options, "--max-num-seqs=4", "--detach", "--json")
    assert done.code == 0, done.err
    job = JobFolder(batchrun.home / "jobs" / done.json["job"])
    running(job)
    kill(job)
    assert 0 < job.counts().rows < len(ROWS)
    assert job.state() == "interrupted"
    gate.open()
    return job


def test_a_killed_job_goes_on(batchrun: CommandLine, s3: S3, here: list[str], gate: Gate) -> None:
    gate.close(15)
    to = s3.bucket / "out.jsonl"
    job = killed(batchrun, gate, s3.put("rows.jsonl", lines(ROWS)), "--output", to)
    s3.put("out.jsonl", b"another's")
    again = batchrun.submit(s3.bucket / "rows*", *OPTIONS, "--output", "other.jsonl")
    assert "is the same work" in again.error
    refused = batchrun("resume", job.id)
    assert "did not write it" in refused.error
    done = batchrun("resume", job.id, "--overwrite")
    assert done.code == 0, done.err
    assert [json.loads(line)["completion"] for line in s3.get(to).splitlines()] == here
    s3.put("out.jsonl", b"another's")
    again = batchrun("export", job.id)
    assert "already exists" in again.error


HELD = """
import os, sys, time
if "batchrun.objectstore.upload" in sys.orig_argv and "put" in sys.orig_argv:
    def held(*arguments, real=os._exit):
        with open({place!r} + "/reached.new", "w") as file:
            file.write(str(os.getpid()))
        os.rename({place!r} + "/reached.new", {place!r} + "/reached")
        while not os.path.exists({place!r} + "/open"):
            time.sleep(0.01)
        if arguments:
            real(*arguments)
    {when}
"""


@pytest.mark.parametrize(
    ("when", "there"), [("held()", False), ("os._exit = held", True)], ids=["before", "after"]
)
def test_a_job_that_is_killed_while_it_uploads(  # noqa: PLR0917 - pytest names them
    batchrun: CommandLine,
    s3: S3,
    here: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    there: bool,
) -> None:
    """Before its object is complete, or after that and before the job has noted it."""
    site = tmp_path / "site"
    site.mkdir()
    trap = site / "sitecustomize.py"
    trap.write_text(HELD.format(place=str(site), when=when))
    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', '')}")
    to = s3.bucket / "out.parquet"
    rows = [{**row, "more": os.urandom(20_000).hex()} for row in ROWS]  # more than a pipe holds
    source = s3.put("rows.parquet", packed(rows))
    done = batchrun.submit(source, *OPTIONS, "--output", to, "--detach", "--json")
    assert done.code == 0, done.err
    job = JobFolder(batchrun.home / "jobs" / done.json["job"])
    until((site / "reached").exists, "the uploader in its trap")
    kill(job)
    (site / "open").touch()
    uploader = int((site / "reached").read_text())
    until(lambda: not psutil.pid_exists(uploader), "its end")
    assert (str(to).removeprefix("s3://") in s3.names()) == there
    assert job.state() == "interrupted"
    trap.unlink()
    resumed = batchrun("resume", job.id)
    assert resumed.code == 0, resumed.err
    table = pq.read_table(io.BytesIO(s3.get(to)))
    assert table.select(["prompt", "more"]).to_pylist() == rows
    assert table["completion"].to_pylist() == here
    assert list(batchrun.home.glob("jobs/.upload-*")) == []


def test_an_input_that_is_replaced_is_noticed_and_one_that_moves_is_found(
    batchrun: CommandLine, s3: S3, here: list[str], gate: Gate, tmp_path: Path
) -> None:
    gate.close(15)
    path = s3.put("rows.jsonl", lines(ROWS))
    job = killed(batchrun, gate, path, "--output", "out.jsonl")
    s3.put("rows.jsonl", lines(ROWS).replace(b"row 1", b"row 9"))
    assert "its content changed" in batchrun("resume", job.id).error
    (tmp_path / "kept.jsonl").write_bytes(lines(ROWS))
    done = batchrun("resume", job.id, "--moved", f"{path}={tmp_path}/kept.jsonl")
    assert done.code == 0, done.err
    assert [row["completion"] for row in batchrun.read("out.jsonl")] == here


def test_a_store_that_is_gone_costs_no_answers(
    batchrun: CommandLine, s3: S3, here: list[str], gate: Gate
) -> None:
    gate.close(15)
    path = s3.put("rows.jsonl", lines(ROWS))
    job = killed(batchrun, gate, path, "--output", s3.bucket / "out.jsonl")
    s3.stop()
    failed = batchrun("resume", job.id)
    assert failed.code == 1
    assert "Could not connect" in failed.error
    assert "AWS_ENDPOINT_URL" in failed.hint
    s3.start()
    assert batchrun("resume", job.id).code == 0
    found = [json.loads(line) for line in s3.get(s3.bucket / "out.jsonl").splitlines()]
    assert [row["completion"] for row in found] == here


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/none.jsonl", "there is no such object or folder"),
        ("/none-*.jsonl", "no object matches"),
        ("-none/rows.jsonl", "there is no such object or folder"),
        ("*/rows.jsonl", "the bucket's name is part of the pattern"),
        ("/what", "its name does not say which format it has"),
        ("/empty", "there is no such object or folder"),
    ],
)
def test_what_can_not_be_read_is_said(batchrun: CommandLine, s3: S3, name: str, said: str) -> None:
    s3.put("what", b"\0\1\2")
    failed = batchrun.submit(f"{s3.bucket}{name}")
    assert (failed.code, said in failed.error) == (1, True), failed.err
    assert failed.hint


@pytest.mark.parametrize("url", ["s3://me:secret@rows/a.jsonl", "nothing://a/b.jsonl", "s3://"])
def test_urls_that_can_not_be(batchrun: CommandLine, url: str) -> None:
    source = batchrun.write("in.jsonl", PROMPTS[:2])
    for arguments in ((url,), (source, "--output", url), (source, "--model", url)):
        failed = batchrun.submit(*arguments)
        assert failed.code == 1, failed.err
        assert "secret" not in failed.err
        assert failed.error
        assert failed.hint
    assert batchrun("list", "--json").json == []
