"""Whatever is wrong with a job is found and named; a sound job has no problems."""

import json
import re
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.checksums import checksum
from batchrun.jobs.identity import move
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result
from batchrun.jobs.journal.schema import SEALS
from batchrun.jobs.lease import Lease
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.spec import InputFile
from batchrun.jobs.verify import verify


@pytest.fixture(params=["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
def suffix(request):
    return request.param


@pytest.fixture
def done(make_job, tmp_path, suffix):
    """A finished job of four rows and two samples, one failed and one skipped."""
    path = tmp_path / "in.parquet"
    scores = [1.0, float("nan"), None, 2.5]
    kinds = pa.array(["a", "b", "a", None]).dictionary_encode()
    table = pa.table(
        {"prompt": list("abcd"), "score": scores, "kind": kinds, "error": list("wxyz")}
    )
    pq.write_table(table, path)
    output = {
        "path": str(tmp_path / f"out.{suffix}"),
        "format": "parquet" if suffix == "parquet" else "jsonl",
        "token_ids": True,
    }
    job = make_job(inputs=(InputFile.of(path),), output=output, n=2)
    finish(job)
    return job


def finish(job):
    results = [
        Result(r, s, "ok", f"{r}.{s}", (r, s), "stop", 1, 2, logprob=s * 2 * (r - 0.5) - 5)
        for r in (0, 1)
        for s in (0, 1)
    ]
    results += [Result(2, s, "error", error="no", error_kind="x") for s in (0, 1)]
    results += [Result(3, s, "skipped") for s in (0, 1)]
    spec = job.spec()
    with Lease(job.path):
        with job.journal(readonly=False) as journal:
            journal.begin_run()
            journal.set_meta("rows_total", 4)
            journal.write(results)
            write(job, journal)
            journal.end_run("done-with-errors", {})
        job.set_state("done-with-errors")
    assert job.spec() == spec


def write(job, journal):
    spec = job.spec()
    export_job(spec, journal, Path(spec.output.path), format=spec.output.format)


def edit(job, *statements, sealed=True):
    """Change the journal behind everybody's back, as a bug would or, not sealed, a bad disk."""
    db = sqlite3.connect(job.path / "journal.db")
    db.create_function("checksum", -1, lambda *values: checksum(values))
    with db:
        for statement in statements:
            db.execute(statement)
        for table, seal in SEALS.items() if sealed else ():
            db.execute(f"UPDATE {table} SET crc = {seal}")
    db.close()


def test_a_sound_job_has_no_problems(done):
    before = {p.name: p.read_bytes() for p in done.path.iterdir()}
    assert verify(done) == []
    assert verify(done, lambda _: "m1") != []  # the model's folder is not there
    after = {p.name: p.read_bytes() for p in done.path.iterdir()}
    assert {name: after[name] for name in before} == before


def test_the_best_samples_are_those_of_the_journal(make_job, done):
    job = make_job(inputs=done.spec().inputs, output=done.spec().output, n=2, keep=1)
    finish(job)
    assert verify(job) == []
    edit(job, "UPDATE results SET logprob = -99 WHERE id = 3")
    assert any("differs from the job" in problem for problem in verify(job))


def test_jobs_that_are_not_finished_have_no_problems(make_job):
    job = make_job()
    assert verify(job) == []
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.set_meta("rows_total", 3)
        journal.write([Result(1, 0, "ok")])
    assert verify(job) == []


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE results SET text = 'other' WHERE id = 2", "differs from the job in"),
        ("DELETE FROM results WHERE id = 2", "lacks 1 of its results"),
        ("UPDATE results SET id = 99 WHERE id = 2", "1 results for rows that the input does not"),
        ("UPDATE results SET status = 'fine' WHERE id = 2", "a result has an unknown status"),
        ("UPDATE results SET run = 7 WHERE id = 2", "belongs to a run that does not exist"),
        ("INSERT INTO partials VALUES (2, x'', NULL, NULL, NULL)", "a result and partial tokens"),
        (
            "UPDATE meta SET value = '5' WHERE key = 'rows_total'",
            "the input has 4 rows, but the journal",
        ),
        ("DELETE FROM meta WHERE key = 'rows_total'", "does not say how many rows"),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet"])
def test_a_changed_journal_is_found(done, statement, problem):
    edit(done, statement)
    found = verify(done)
    assert problem in found[0], found


def swap(lines):
    lines[1], lines[3] = lines[3], lines[1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (swap, "differs from the job in"),
        (lambda lines: lines.pop(), "differs from the job in"),
        (lambda lines: lines.append(lines[-1]), "more"),
        (lambda lines: lines.clear(), "differs from the job in"),
        (lambda lines: lines[2].update(completion="x"), "of row 2|in row 2$"),
        (lambda lines: lines[5].update(score=0.0), "of row 5|in row 5$"),
        (lambda lines: lines[4].update(input_error="x"), "of row 4|in row 4$"),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_changed_output_is_found(done, suffix, change, problem):
    path = Path(done.spec().output.path)
    if suffix == "parquet":
        schema = pq.read_schema(path)
        rows = pq.read_table(path).to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = verify(done)
    assert found
    assert re.search(problem, found[0]), found


@pytest.mark.parametrize("suffix", ["parquet"])
def test_columns_of_another_file_are_named(done):
    path = Path(done.spec().output.path)
    pq.write_table(pq.read_table(path).drop_columns(["score"]), path)
    assert "has the columns prompt, kind, input_error" in verify(done)[0]


def test_an_output_that_is_gone_or_torn_is_found(done):
    path = Path(done.spec().output.path)
    path.write_bytes(path.read_bytes()[:40])
    assert len(verify(done)) >= 1
    path.unlink()
    [problem] = verify(done)
    assert "is gone" in problem
    assert "batchrun export" in problem


@pytest.mark.parametrize("suffix", ["parquet"])
def test_changed_inputs_parameters_and_models_are_found(done, tmp_path):
    data = json.loads((done.path / "job.json").read_text())
    (done.path / "job.json").write_text(json.dumps({**data, "seed": 9}))
    assert "seed: 1, now 9" in verify(done)[0]
    (done.path / "job.json").write_text(json.dumps(data))
    path = tmp_path / "in.parquet"
    path.rename(tmp_path / "moved.parquet")
    assert "in.parquet can't be read" in verify(done)[0]
    move(done, str(path), str(tmp_path / "moved.parquet"))
    assert verify(done) == []
    (done.path / "job.json").write_text("{")
    assert "job.json is damaged" in verify(done)[0]


@pytest.mark.parametrize("suffix", ["parquet"])
def test_a_damaged_journal_is_the_only_problem(done):
    with Journal(done.path, 2) as journal:
        journal.begin_run()
        journal.write([Result(100 + i, 0, "ok", text="x" * 500) for i in range(500)])
    path = done.path / "journal.db"
    data = bytearray(path.read_bytes())
    data[16384:-8192] = bytes(len(data) - 24576)
    path.write_bytes(data)
    [problem] = verify(done)
    assert "damaged" in problem
    path.unlink()
    [problem] = verify(done)
    assert "missing" in problem
