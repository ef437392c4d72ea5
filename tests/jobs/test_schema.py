"""How a journal is opened: its tables are what this program made, or it is refused."""

import shutil
import sqlite3

import pytest

from batchrun.jobs.errors import JournalError
from batchrun.jobs.journal import schema
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result


@pytest.fixture
def journal(tmp_path):
    Journal.create(tmp_path)
    return tmp_path


def changed(folder, *statements):
    db = sqlite3.connect(folder / "journal.db")
    with db:
        db.execute("PRAGMA writable_schema=ON")
        for statement in statements:
            db.execute(statement)
    db.close()


def refusals(folder):
    for readonly in (True, False):
        with pytest.raises(JournalError) as refused:
            Journal(folder, 1, readonly=readonly)
        yield refused.value


@pytest.mark.parametrize(
    "statements",
    [
        (
            "UPDATE sqlite_master SET sql = replace(sql, 'id INTEGER PRIMARY', 'id INTEGER') "
            "WHERE name = 'results'",
            "UPDATE sqlite_master SET sql = replace(sql, 'INTEGER KEY', 'INTEGER')",
        ),
        ("ALTER TABLE results RENAME COLUMN logprob TO logprod",),
        ("ALTER TABLE results DROP COLUMN logprob",),
        ("DROP TABLE results",),
    ],
    ids=["no key", "another name", "one less", "none"],
)
def test_a_table_with_other_columns_is_damaged(journal, statements):
    changed(journal, *statements)
    for refused in refusals(journal):
        assert "is damaged: its table results has the wrong columns" in str(refused)


@pytest.mark.parametrize(
    ("version", "hint"),
    [
        (schema.VERSION + 1, "pip install --upgrade batchrun-llm"),
        (schema.VERSION - 1, schema.BEYOND_REPAIR),
    ],
)
def test_another_version_is_refused_and_stays_as_it_is(journal, version, hint):
    changed(journal, f"PRAGMA user_version={version}")
    before = (journal / "journal.db").read_bytes()
    for refused in refusals(journal):
        said = f"has version {version}; this batchrun reads version {schema.VERSION}"
        assert said in str(refused)
        assert refused.hint == hint
    assert (journal / "journal.db").read_bytes() == before


def test_a_reader_changes_nothing(journal):
    before = (journal / "journal.db").read_bytes()
    with Journal(journal, 1, readonly=True) as opened:
        opened.check()
    assert (journal / "journal.db").read_bytes() == before


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
