"""Older journals are read as they are, and written once they are brought up to date."""

import re
import shutil
import sqlite3

import pytest

from batchrun.jobs.errors import JournalError
from batchrun.jobs.journal import schema
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Partial, Result

# As the first version made it.
V1 = """
CREATE TABLE results (
    id INTEGER PRIMARY KEY,
    status TEXT NOT NULL,
    text TEXT,
    token_ids BLOB NOT NULL,
    finish_reason TEXT,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    error TEXT,
    error_kind TEXT,
    queue_s REAL, prefill_s REAL, decode_s REAL,
    run INTEGER NOT NULL
);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    started_at REAL NOT NULL,
    ended_at REAL,
    state TEXT,
    stats TEXT NOT NULL DEFAULT '{}'
);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO results VALUES (0, 'ok', 'zero', x'05000000', 'stop', 2, 1, NULL, NULL, 0, 0, 0, 1);
INSERT INTO results VALUES (3, 'error', NULL, x'', NULL, 0, 0, 'bad', 'input', 0, 0, 0, 1);
INSERT INTO runs VALUES (1, 10.0, 20.0, 'interrupted', '{"steps": 3}');
INSERT INTO meta VALUES ('rows_total', '5');
PRAGMA user_version=1;
"""
V2 = f"""
{V1}
ALTER TABLE runs ADD COLUMN reason TEXT;
CREATE TABLE partials (id INTEGER PRIMARY KEY, token_ids BLOB NOT NULL);
CREATE TABLE crashes (
    row INTEGER NOT NULL, run INTEGER NOT NULL, PRIMARY KEY (row, run)
) WITHOUT ROWID;
PRAGMA user_version=2;
"""
RESULTS = [
    Result(0, 0, "ok", "zero", (5,), "stop", 2, 1, None, None, 0, 0, 0),
    Result(3, 0, "error", error="bad", error_kind="input", queue_s=0, prefill_s=0, decode_s=0),
]


@pytest.fixture(params=[V1, V2], ids=["1", "2"])
def old(tmp_path, request):
    db = sqlite3.connect(tmp_path / "journal.db")
    db.execute("PRAGMA journal_mode=WAL")
    db.executescript(request.param)
    db.close()
    return tmp_path


def tables(folder):
    db = sqlite3.connect(folder / "journal.db")
    names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {name: db.execute(f"PRAGMA table_info({name})").fetchall() for name in names}
    version = db.execute("PRAGMA user_version").fetchone()
    db.close()
    return version, columns


def check_content(journal):
    assert list(journal.results()) == RESULTS
    assert journal.counts().failed == 1
    assert journal.meta("rows_total") == 5
    [run] = journal.runs()
    assert (run["state"], run["stats"], run["reason"]) == ("interrupted", {"steps": 3}, None)
    assert journal.partials() == journal.crash_counts() == {}


def test_a_reader_of_an_older_journal_changes_nothing(old):
    before = (old / "journal.db").read_bytes()
    with Journal(old, 1, readonly=True) as journal:
        check_content(journal)
    assert (old / "journal.db").read_bytes() == before


def test_a_writer_brings_an_older_journal_up_to_date(old, tmp_path_factory):
    with Journal(old, 1, readonly=True) as reader, Journal(old, 1) as journal:
        check_content(journal)
        check_content(reader)
        assert journal.begin_run() == 2
        new = Result(1, 0, "ok", logprob=-1.5)
        journal.write([new], partials=[Partial(2, 0, (7, 8), -0.25)])
        journal.end_run("failed", {}, "no disk")
    with Journal(old, 1, readonly=True) as journal:
        assert journal.runs()[1]["reason"] == "no disk"
        assert list(journal.results()) == [RESULTS[0], new, RESULTS[1]]
        assert journal.partials() == {(2, 0): Partial(2, 0, (7, 8), -0.25)}
        journal.check()
    fresh = tmp_path_factory.mktemp("fresh")
    Journal.create(fresh)
    assert tables(old) == tables(fresh)


def test_an_older_journal_whose_key_is_none_is_damaged(old):
    db = sqlite3.connect(old / "journal.db")
    with db:
        db.execute("PRAGMA writable_schema=ON")
        db.execute(
            "UPDATE sqlite_master SET sql = replace(sql, 'id INTEGER PRIMARY', 'id INTEGER') "
            "WHERE name = 'results'"
        )
        db.execute("UPDATE sqlite_master SET sql = replace(sql, 'INTEGER KEY', 'INTEGER')")
    db.close()
    for readonly in (True, False):
        with pytest.raises(JournalError, match="its table results has other columns"):
            Journal(old, 1, readonly=readonly)


def test_every_older_version_has_a_named_step():
    assert sorted(schema.MIGRATIONS) == list(range(1, schema.VERSION))
    assert all(re.match(r"\w", step.name) for step in schema.MIGRATIONS.values())


def test_a_migration_is_whole_or_not_there(old, monkeypatch):
    step = schema.MIGRATIONS[schema.VERSION - 1]
    broken = schema.Migration(step.name, (*step.statements, "INSERT INTO nothing VALUES (1)"))
    before = tables(old)
    with monkeypatch.context() as patch:
        patch.setitem(schema.MIGRATIONS, schema.VERSION - 1, broken)
        with pytest.raises(JournalError, match="nothing"):
            Journal(old, 1)
    assert tables(old) == before
    with Journal(old, 1) as journal:
        check_content(journal)


def test_two_that_migrate_at_once_migrate_once(old, monkeypatch):
    """The second sees the old version, and the first is done before it may begin."""
    other = old / "other"
    other.mkdir()
    real = schema.transaction

    def late(db):
        monkeypatch.setattr(schema, "transaction", real)
        Journal(old, 1).close()
        return real(db)

    monkeypatch.setattr(schema, "transaction", late)
    with Journal(old, 1) as journal:
        check_content(journal)


def test_a_copy_taken_while_it_is_written_opens(tmp_path):
    """Database and log of one instant: what is in the log alone is not lost."""
    folder, copy = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    Journal.create(folder)
    with Journal(folder, 1) as journal:
        journal.begin_run()
        journal.write([Result(0, 0, "ok")])
        shutil.copytree(folder, copy)
    with Journal(copy, 1) as journal:
        assert journal.counts().rows == 1
