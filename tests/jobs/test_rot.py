"""Bytes that rot: whatever was flipped, moved or lost, no wrong value is used, and what is damaged
is named and can be had again."""

import json
import random
import shutil
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.checksums import checksum, sealed, unsealed
from batchrun.jobs.errors import JournalError, SpecChanged, SpecDamaged
from batchrun.jobs.folder import list_jobs
from batchrun.jobs.identity import check_unchanged
from batchrun.jobs.journal.journal import READ, Journal
from batchrun.jobs.journal.results import CopiedResult, Partial, Result
from batchrun.jobs.lease import Lease
from batchrun.jobs.output.destination import resuming
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.same import find_same
from batchrun.jobs.spec import InputFile
from batchrun.jobs.stats import STATS, write_summary
from batchrun.jobs.verify import verify
from batchrun.runner.isolated import ReaderCrashed, isolated

ROWS = 6


@pytest.fixture(params=["jsonl"])
def suffix(request):
    return request.param


@pytest.fixture
def job(make_job, tmp_path, suffix):
    """A finished job, with two samples a row."""
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": range(ROWS), "prompt": list("abcdef")}), path)
    kind = suffix.partition(".")[0]
    output = {"path": str(tmp_path / f"out.{suffix}"), "format": kind, "token_ids": True}
    job = make_job(inputs=(InputFile.of(path),), output=output, n=2)
    results = [
        Result(r, s, "ok", f"answer {r}.{s}", (r, s, 9), "stop", 1, 3, queue_s=0, logprob=-1)
        for r in range(ROWS)
        for s in range(2)
    ]
    rows = open_source([path], "parquet").rows(["prompt"])
    with Lease(job.path):
        with job.journal(readonly=False) as journal:
            journal.begin_run()
            journal.set_meta("rows_total", ROWS)
            journal.set_meta(READ, ["prompt"])
            journal.write(results, digests=[(row.index, row.digest) for row in rows])
            export(job, journal, Path(output["path"]))
            journal.end_run("done", {"steps": 3})
        job.set_state("done")
        write_summary(job)
    assert verify(job) == []
    return job


def export(job, journal, path, **options):
    return export_job(job.spec(), journal, path, format=job.spec().output.format, **options)


def rot(job, statement):
    """Change the journal as a disk does: no checksum follows."""
    db = sqlite3.connect(job.path / "journal.db")
    with db:
        assert db.execute(statement).rowcount > 0
    db.close()


def mended(job, home):
    lines = []
    with resuming(home, job, overwrite=True, tell=lines.append):
        return lines


def test_checksums_are_the_same_for_ever():
    assert checksum((7, "ok", None, b"\0\1", 0.5, -1, 1 << 62, "é")) == 1344072101
    assert sealed({"a": 1.5, "b": ["é", None]})["checksum"] == "71108d37"


def test_values_of_other_types_and_places_have_other_checksums():
    like = [(1, 2), (2, 1), (1, 2.0), (1, "2"), (1, b"2"), (1, None), (1, ""), (1, b""), (1,)]
    assert len({checksum(values) for values in like}) == len(like)


@pytest.mark.parametrize(
    "change",
    [
        "text = 'answer 1.x' WHERE id = 3",
        "text = NULL WHERE id = 3",
        "text = CAST(text AS BLOB) WHERE id = 3",
        "text = CAST(x'ff' AS TEXT) WHERE id = 3",
        "text = (SELECT text FROM results WHERE id = 4) WHERE id = 3",
        "token_ids = x'0100000001000000' WHERE id = 3",
        "token_ids = x'01' WHERE id = 3",
        "status = 'error', error = 'no' WHERE id = 3",
        "finish_reason = 'length' WHERE id = 3",
        "prompt_tokens = 3 WHERE id = 3",
        "prompt_tokens = 'x' WHERE id = 3",
        "queue_s = 1.5 WHERE id = 3",
        "logprob = -0.5 WHERE id = 3",
        "run = 2 WHERE id = 3",
        "crc = crc + 1 WHERE id = 3",
        "crc = NULL WHERE id = 3",
    ],
)
def test_a_rotten_result_is_named_not_exported_and_to_do_again(job, home, tmp_path, change):
    rot(job, f"UPDATE results SET {change}")
    what = "the result of row 1, sample 1"
    [problem] = verify(job)
    assert what in problem
    assert f"batchrun resume {job.id}" in problem
    out = tmp_path / "other.jsonl"
    with job.journal() as journal:
        with pytest.raises(JournalError, match=what) as refused:
            export(job, journal, out)
        assert "--partial" in refused.value.hint
        assert not out.exists()
        assert export(job, journal, out, partial=True).rows == 2 * ROWS - 1
    assert "answer 1.1" not in out.read_text()
    assert mended(job, home) == [f"removed damaged data: {what}"]
    with job.journal() as journal:
        journal.check()
        assert [(r, s) for r in range(ROWS) for s in (0, 1) if (r, s) not in journal.done()] == [
            (1, 1)
        ]
        assert len(list(journal.results())) == 2 * ROWS - 1


def test_a_result_that_moved_to_another_row_is_found(job, home):
    rot(job, "UPDATE results SET id = 40 WHERE id = 3")
    assert "the result of row 20, sample 0" in verify(job)[0]
    mended(job, home)
    with job.journal() as journal:
        assert (1, 1) not in journal.done()


def test_many_are_counted(job):
    rot(job, "UPDATE results SET text = 'x' WHERE id > 1")
    [problem] = verify(job)
    assert "row 3, sample 0, 5 more" in problem


def test_a_rotten_result_is_not_copied(job):
    rot(job, "UPDATE results SET text = 'x' WHERE id = 3")
    rot(job, "DELETE FROM results WHERE id = 5")
    with Lease(job.path), job.journal(readonly=False) as journal:
        journal.begin_run()
        with pytest.raises(JournalError, match="copied"):
            journal.write([CopiedResult(2, 1, 1, 1, 3)])
        journal.write([CopiedResult(2, 1, 0, 0, 3)])
        rows = [r for r in journal.results(skip_damaged=True) if (r.row, r.sample) == (2, 1)]
    assert [row.text for row in rows] == ["answer 0.0"]


def test_rotten_tokens_are_not_continued_and_rotten_crashes_are_none(job, home):
    rot(job, "DELETE FROM results WHERE id > 5")
    with Lease(job.path), job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.write([], partials=[Partial(3, 0, (1, 2)), Partial(4, 0, (3,), -1)])
        journal.count_crash([3, 4])
    rot(job, "UPDATE partials SET token_ids = x'0100000001000000' WHERE id = 6")
    rot(job, "UPDATE crashes SET row = 5 WHERE row = 3")
    with job.journal() as journal:
        assert journal.partials() == {(4, 0): Partial(4, 0, (3,), -1)}
        assert journal.crash_counts() == {4: 1}
        with pytest.raises(
            JournalError, match="unfinished result of row 3, sample 0, the crash of row"
        ):
            journal.check()
    assert len(mended(job, home)) == 2
    with job.journal() as journal:
        journal.check()


def test_a_rotten_digest_accuses_no_input(job, home, tmp_path):
    rot(job, "UPDATE rows SET digest = digest + 1 WHERE row = 2")
    assert "the digest of row 2" in verify(job)[0]
    with job.journal() as journal:
        assert 2 not in journal.digests(0, ROWS)
        assert export(job, journal, tmp_path / "o.jsonl").rows == 2 * ROWS
    assert mended(job, home) == ["removed damaged data: the digest of row 2"]
    assert verify(job) == []


@pytest.mark.parametrize("key", ["rows_total", READ, "spec"])
def test_rotten_notes_are_made_anew_and_not_believed(job, home, key, tmp_path):
    rot(job, f"UPDATE meta SET value = '[\"no\"]' WHERE key = '{key}'")
    assert f"the note '{key}'" in verify(job)[0]
    with job.journal() as journal, pytest.raises(JournalError, match=key):
        journal.meta(key)
    mended(job, home)
    with job.journal() as journal:
        journal.check()
        assert (journal.meta(key) is None) == (key != "spec")
        # Without the note that says what digests are of, they say nothing.
        assert bool(journal.digests(0, ROWS)) == (key != READ)
        assert export(job, journal, tmp_path / "o.jsonl").rows == 2 * ROWS
    check_unchanged(job)


def test_rotten_figures_of_a_run_are_none(job, home):
    rot(job, "UPDATE runs SET stats = '{' WHERE id = 1")
    assert "the figures of run 1" in verify(job)[0]
    (job.path / "state.json").unlink()
    with pytest.raises(JournalError, match="run 1"):
        job.state()
    mended(job, home)
    with job.journal() as journal:
        [run] = journal.runs()
        journal.check()
    assert (run["id"], run["state"], run["stats"]) == (1, "interrupted", {})


def test_a_rotten_sample_is_none(job, home):
    with Lease(job.path), job.journal(readonly=False) as journal:
        run = journal.begin_run()
        for second in (0.0, 60.0, 120.0):
            journal.write([], {"wall_s": second})
        journal.end_run("done", {})
    rot(job, "UPDATE samples SET figures = '{' WHERE id = 2")
    assert "the figures over time, sample 2" in verify(job)[0]
    with job.journal() as journal:
        assert journal.samples(run) == [{"wall_s": 0.0}, {"wall_s": 120.0}]
    assert len(mended(job, home)) == 1
    with job.journal() as journal:
        journal.check()
        assert journal.samples(run) == [{"wall_s": 0.0}, {"wall_s": 120.0}]


def test_a_run_that_is_gone_gives_its_number_to_no_other(job, home):
    rot(job, "UPDATE runs SET id = 9")
    mended(job, home)
    with job.journal() as journal:
        journal.check()
        assert [run["id"] for run in journal.runs()] == [1, 9]


@pytest.mark.parametrize("table", ["results", "partials", "crashes", "rows", "runs", "samples"])
def test_a_rotten_schema_is_named(job, home, tmp_path, table):
    """A column that is the key no more has no number in any record."""
    db = sqlite3.connect(job.path / "journal.db")
    with db:
        db.execute("PRAGMA writable_schema=ON")
        [(made,)] = db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,))
        spoilt = made.replace("INTEGER PRIMARY KEY,", "INTEGER,").replace("run INTEGER", "run RFAL")
        assert spoilt != made
        db.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (spoilt, table))
    db.close()
    assert f"its table {table} has the wrong columns" in "".join(verify(job))
    for act in (lambda: mended(job, home), job.journal, job.counts):
        with pytest.raises(JournalError, match=f"its table {table} has the wrong columns"):
            act()


@pytest.mark.parametrize("where", [0.3, 0.5])
def test_pages_that_are_gone_are_named_with_what_to_do(job, home, where):
    path = job.path / "journal.db"
    data = bytearray(path.read_bytes())
    at = int(len(data) * where) // 4096 * 4096
    data[at : at + 4096] = bytes(4096)
    path.write_bytes(data)
    [problem] = verify(job)
    assert "damaged" in problem
    with pytest.raises(JournalError) as refused:
        mended(job, home)
    assert "restore the job's folder from a copy" in refused.value.hint


# --- beside the journal --------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"version": 1}', "[" * 100_000])
def test_a_damaged_specification_is_had_from_the_journal(job, home, content):
    spec, path = job.spec(), job.path / "job.json"
    path.write_text(content)
    assert job.spec() == spec
    assert "job.json is damaged" in verify(job)[0]
    with pytest.raises(SpecDamaged):
        check_unchanged(job)
    assert mended(job, home) == ["job.json was damaged: it was rewritten from the journal"]
    check_unchanged(job)
    assert verify(job) == []


@pytest.mark.parametrize("name", ["output", "runtime", "sampling", "model"])
def test_a_specification_with_another_value_is_refused_by_name(job, home, name):
    spec, path = job.spec(), job.path / "job.json"
    data = json.loads(path.read_text())
    key = next(iter(data[name]))
    path.write_text(json.dumps({**data, name: {**data[name], key: "other"}}))
    assert job.spec() == spec
    assert f'{name}.{key}: {json.dumps(data[name][key])}, now "other"' in verify(job)[0]
    assert mended(job, home) == []  # it may be somebody's edit
    with pytest.raises(SpecChanged, match=f"{name}.{key}"):
        check_unchanged(job)
    path.unlink()
    mended(job, home)
    check_unchanged(job)


def test_a_job_that_has_lost_its_specification_twice_says_so(job, home, spec):
    (job.path / "job.json").write_text("{")
    rot(job, "DELETE FROM meta WHERE key = 'spec'")
    with pytest.raises(SpecDamaged, match=r"job\.json"):
        job.spec()
    assert "job.json" in verify(job)[0]
    assert [found.id for found in list_jobs(home)] == [job.id]
    job.remove()
    assert list_jobs(home) == []


def test_every_bit_of_a_note_counts(job):
    """No flipped bit of `state.json` or `stats.json` is believed."""
    for name in ("state.json", STATS):
        path = job.path / name
        data = path.read_bytes()
        said, believed = unsealed(data), 0
        for at in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[at // 8] ^= 1 << at % 8
            try:
                assert unsealed(bytes(flipped)) == said
                believed += 1
            except ValueError:
                continue
        assert believed < len(data)  # what lies between values


def test_a_damaged_state_is_made_of_the_journal_and_damaged_figures_are_named(job):
    for name in ("state.json", STATS):
        path = job.path / name
        data = path.read_bytes()
        path.write_bytes(data.replace(b"done", b"bone"))
        assert (job.state(), job.snapshot().done) == ("done", ROWS)
        [problem] = verify(job)
        assert f"{name} is damaged" in problem
        path.write_bytes(data)
    assert verify(job) == []


def test_a_torn_state_of_a_run_that_was_broken_off_is_no_damage(job):
    with Lease(job.path):
        with job.journal(readonly=False) as journal:
            journal.begin_run()
        (job.path / "state.json").write_text("")
    assert job.state() == "interrupted"
    assert verify(job) == []


def test_a_job_whose_journal_is_gone_is_listed_and_hides_no_other(job, home, make_job):
    (job.path / "journal.db").unlink()
    other = make_job()
    assert {found.id for found in list_jobs(home)} == {job.id, other.id}
    with pytest.raises(JournalError, match="missing"):
        job.counts()
    assert find_same(home, job.submitted()) is None


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix",
    [
        "parquet",
        "jsonl",
        *(pytest.param(s, marks=pytest.mark.long) for s in ("csv", "jsonl.gz")),
        "csv.zst",
    ],
    indirect=True,
)
def test_a_flipped_bit_of_the_output_is_named_or_says_nothing(job, suffix):
    path = Path(job.spec().output.path)
    data = path.read_bytes()
    if suffix == "parquet":
        tables = pq.read_table(path)
    rng, unnamed = random.Random(5), 0
    for _ in range(24):
        at = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            problems = isolated(lambda note: verify(job, None, note.reading))
        except ReaderCrashed as error:  # which says so too
            problems = [str(error)]
        if not problems:
            unnamed += 1
            if suffix == "parquet":
                assert pq.read_table(path).equals(tables)
    path.write_bytes(data)
    assert verify(job) == []
    assert unnamed == 0 or suffix not in {"jsonl", "csv"}


@pytest.mark.parametrize("suffix", ["parquet"], indirect=True)
def test_parquet_outputs_can_be_proven_by_any_reader(job, tmp_path):
    path = Path(job.spec().output.path)
    data = bytearray(path.read_bytes())
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(0)
    at = column.data_page_offset + column.total_compressed_size - 2
    data[at] ^= 4
    other = tmp_path / "other.parquet"
    other.write_bytes(data)
    with (
        pq.ParquetFile(other, page_checksum_verification=True) as file,
        pytest.raises(OSError, match=r"(?i)checksum|crc"),
    ):
        file.read()


def test_a_copy_of_a_sound_job_is_sound(job, home):
    copy = job.path.with_name("copy")
    shutil.copytree(job.path, copy)
    assert verify(type(job)(copy)) == []
    with Journal(copy, 2, readonly=True) as journal:
        journal.check()
