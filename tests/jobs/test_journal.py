"""The journal: durable on return, whole or not at all, and never two results for one sample."""

import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from batchrun.jobs.errors import JournalError
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result
from batchrun.jobs.journal.schema import VERSION

ROOT = Path(__file__).parents[2]

RICH = Result(
    row=3,
    sample=1,
    status="ok",
    text="naïve \0 🙂\nline",
    token_ids=(0, 2**31 - 1, 5),
    finish_reason="stop",
    prompt_tokens=4,
    completion_tokens=3,
    queue_s=0.25,
    prefill_s=0.5,
    decode_s=1.5,
)
BAD = Result(row=0, sample=0, status="error", error="no prompt", error_kind="input")


def ok(row, sample=0, **fields):
    return Result(row=row, sample=sample, status="ok", text=f"{row}.{sample}", **fields)


@pytest.fixture
def journal(tmp_path):
    Journal.create(tmp_path)
    with Journal(tmp_path, 2) as journal:
        journal.begin_run()
        yield journal


def test_the_last_answers_come_first_and_damaged_ones_never(journal):
    journal.write([ok(row, token_ids=(row, row)) for row in range(6)])
    journal.write([Result(row=6, sample=0, status="error", error_kind="x", error="y")])
    assert list(journal.answers(5)) == [(5, 5), (4, 4), (3, 3)]
    assert len(list(journal.answers(1000))) == 6
    journal._db.execute("UPDATE results SET token_ids = x'00000000' WHERE id / ? = 4", (journal.n,))
    assert list(journal.answers(3)) == [(5, 5), (3, 3)]


def test_results_read_back_equal_in_row_and_sample_order(journal, tmp_path):
    journal.write([RICH, ok(1, 1)])
    journal.write([BAD, ok(1, 0)])
    expected = [BAD, ok(1, 0), ok(1, 1), RICH]
    assert list(journal.results()) == expected
    with Journal(tmp_path, 2, readonly=True) as other:
        assert list(other.results()) == expected
        other.check()


def test_a_result_is_never_overwritten_and_its_whole_batch_is_refused(journal):
    journal.write([ok(0), ok(1)])
    again = Result(row=1, sample=0, status="ok", text="other")
    with pytest.raises(JournalError, match="twice"):
        journal.write([ok(5), again, ok(6)])
    assert list(journal.results()) == [ok(0), ok(1)]
    with pytest.raises(JournalError, match="twice"):
        journal.write([ok(7), ok(7)])
    journal.write([ok(5)])
    assert [r.row for r in journal.results()] == [0, 1, 5]


@pytest.mark.parametrize(("row", "sample"), [(0, 2), (0, -1), (-1, 0)])
def test_a_result_of_no_sample_cannot_take_the_place_of_another_rows(journal, row, sample):
    with pytest.raises(JournalError, match=f"row {row}, sample {sample}"):
        journal.write([ok(row, sample)])
    assert list(journal.results()) == []


def test_the_done_set_is_exact_and_takes_one_bit_a_sample(journal):
    journal.write([ok(0, 1), ok(9, 0), ok(800_000, 1)])
    done = journal.done()
    members = [key for key in itertools.product(range(12), range(2)) if key in done]
    assert members == [(0, 1), (9, 0)]
    assert (800_000, 1) in done
    assert (800_000, 0) not in done
    assert (10**12, 0) not in done
    assert len(done._bits) <= 1.6e6 * 1.5 / 8


def test_counts(journal):
    journal.write([ok(0, s, prompt_tokens=3, completion_tokens=2) for s in range(2)])
    journal.write([ok(1), Result(row=2, sample=0, status="error", error_kind="x")])
    counts = journal.counts()
    assert (counts.rows, counts.samples, counts.failed) == (1, 4, 1)
    assert (counts.prompt_tokens, counts.completion_tokens) == (6, 4)


def test_tallies_and_quantiles(journal):
    assert journal.quantiles("queue_s", [0.5]) is None
    results = [
        ok(i, finish_reason="stop" if i % 3 else "length", queue_s=float(i)) for i in range(100)
    ]
    journal.write(results[::-1])
    journal.write([Result(100, 0, "error", error_kind="context"), Result(101, 0, "error")])
    assert journal.tally("finish_reason") == {"stop": 66, "length": 34}
    assert journal.tally("error_kind") == {"context": 1}
    assert journal.quantiles("queue_s", [0.0, 0.5, 0.9, 0.99, 1.0]) == [0, 50, 90, 99, 99]
    assert journal.quantiles("decode_s", [0.5]) is None


def test_runs_keep_their_statistics_with_every_commit(tmp_path):
    Journal.create(tmp_path)
    with Journal(tmp_path, 1) as journal:
        assert journal.begin_run() == 1
        journal.write([ok(0)], stats={"steps": 1})
        journal.write([ok(1)], stats={"steps": 2})
    with Journal(tmp_path, 1) as journal:  # the first worker was killed
        assert journal.begin_run() == 2
        journal.end_run("done", {"steps": 5})
        first, second = journal.runs()
    assert (first["state"], first["ended_at"], first["stats"]) == (None, None, {"steps": 2})
    assert (second["state"], second["stats"]) == ("done", {"steps": 5})
    assert second["ended_at"] >= second["started_at"] >= first["started_at"]


def test_notes_survive(tmp_path):
    Journal.create(tmp_path)
    with Journal(tmp_path, 1) as journal:
        assert journal.meta("rows_total") is None
        journal.set_meta("rows_total", 3)
        journal.set_meta("rows_total", 4)
    with Journal(tmp_path, 1, readonly=True) as journal:
        assert journal.meta("rows_total") == 4


def test_readers_look_while_a_writer_writes(journal, tmp_path):
    journal.write([ok(0)])
    with Journal(tmp_path, 2, readonly=True) as reader:
        stream = reader.results()
        assert next(stream) == ok(0)
        journal.write([ok(1)])
        assert reader.counts().samples in (1, 2)
    with Journal(tmp_path, 2, readonly=True) as reader:
        assert reader.counts().samples == 2
        with pytest.raises(JournalError):
            reader.write([ok(2)])


def test_what_was_read_in_part_holds_nobody_up_once_it_is_closed(journal, tmp_path):
    journal.write([ok(row) for row in range(9)])
    with Journal(tmp_path, 2, readonly=True) as other:
        begun = [other.results(), other.answers(100), other.finished(), other._records("runs")]
        assert [next(each) is not None for each in begun] == [True] * 4
        journal.write([ok(9)])
        journal._db.execute("PRAGMA busy_timeout=0")
        [(busy, *_)] = journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert busy
    [(busy, *_)] = journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert not busy
    with pytest.raises(JournalError, match="closed"):
        list(begun[0])


def test_a_newer_journal_is_refused(tmp_path):
    Journal.create(tmp_path)
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute("PRAGMA user_version=9")
    db.close()
    with pytest.raises(JournalError, match=f"reads version {VERSION}") as refused:
        Journal(tmp_path, 1)
    assert refused.value.hint == "pip install --upgrade batchrun-llm"


def test_no_journal_is_one_clear_error(tmp_path):
    with pytest.raises(JournalError, match=r"journal\.db is missing"):
        Journal(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_is_no_database_is_one_clear_error(tmp_path):
    (tmp_path / "journal.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(JournalError, match=r"journal\.db is damaged: file is not a"):
        Journal(tmp_path, 1)


def test_a_damaged_journal_says_so(tmp_path):
    Journal.create(tmp_path)
    with Journal(tmp_path, 1) as journal:
        journal.begin_run()
        journal.write([ok(i, error="x" * 500) for i in range(500)])
    path = tmp_path / "journal.db"
    data = bytearray(path.read_bytes())
    data[8192:-8192] = bytes(len(data) - 16384)
    path.write_bytes(data)
    with Journal(tmp_path, 1, readonly=True) as journal:
        with pytest.raises(JournalError, match="damaged"):
            journal.check()
        with pytest.raises(JournalError, match="damaged"):
            list(journal.results())
        with pytest.raises(JournalError, match="damaged"):
            journal.done()


WRITE_FOREVER = """
import sys
from pathlib import Path
from batchrun.jobs.journal.journal import Journal, Result
with Journal(Path(sys.argv[1]), 1) as journal:
    journal.begin_run()
    row = journal.counts().rows
    while True:
        batch = [Result(row + i, 0, "ok", text="t" * 200) for i in range(50)]
        journal.write(batch, {"rows": row + 50})
        row += 50
        print(row, flush=True)
"""


def test_what_was_acknowledged_survives_sigkill_and_batches_are_whole(tmp_path):
    Journal.create(tmp_path)
    for kill in range(6):
        command = [sys.executable, "-c", WRITE_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            acknowledged = [int(process.stdout.readline()) for _ in range(3 + 5 * kill)][-1]
            process.send_signal(signal.SIGKILL)
        with Journal(tmp_path, 1) as journal:
            journal.check()
            rows = [r.row for r in journal.results()]
            assert journal.runs()[-1]["stats"] == {"rows": len(rows)}
        assert rows == list(range(len(rows)))
        assert len(rows) % 50 == 0
        assert len(rows) >= acknowledged


FULL = """
import resource, signal, sys
from pathlib import Path
from batchrun.jobs.errors import JournalError
from batchrun.jobs.journal.journal import Journal, Result
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Journal(Path(sys.argv[1]), 1) as journal:
    journal.begin_run()
    journal.write([Result(0, 0, "ok", text="kept")], {"steps": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
    try:
        journal.write([Result(i, 0, "ok", text="x" * 5000) for i in range(1, 1000)])
    except JournalError as error:
        print(f"{error}|{error.hint}")
"""


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path):
    Journal.create(tmp_path)
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "can't be written" in done.stdout
    assert "batchrun resume" in done.stdout
    with Journal(tmp_path, 1) as journal:
        journal.check()
        assert [r.text for r in journal.results()] == ["kept"]
        journal.begin_run()
        journal.write([Result(1, 0, "ok", text="x" * 5000)])


LOOK = """
import os, sys
from pathlib import Path
from batchrun.jobs.journal.journal import Journal
os.setuid(65534)  # root may write everywhere
with Journal(Path(sys.argv[1]), 2, readonly=True) as journal:
    print([r.text for r in journal.results()], os.access(sys.argv[1], os.W_OK))
"""


def test_a_folder_of_someone_else_can_be_read(journal, tmp_path):
    journal.write([ok(0)])
    journal.close()
    folder = Path(tempfile.mkdtemp(prefix="journal-"))
    try:
        shutil.copy(tmp_path / "journal.db", folder)
        (folder / "journal.db").chmod(0o444)  # its owner lets others look
        folder.chmod(0o555)
        look = LOOK if os.getuid() == 0 else LOOK.replace("os.setuid", "#")
        command = [sys.executable, "-c", look, str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stdout == "['0.0'] False\n", done.stderr
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_group_of_any_size_is_one_transaction(tmp_path):
    Journal.create(tmp_path)
    said = []
    with Journal(tmp_path, 1) as journal:
        journal.begin_run()
        journal._db.set_trace_callback(said.append)
        for size in (1, 1000):
            said.clear()
            journal.write([ok(size + row) for row in range(size)], {"steps": 1})
            assert [said.count(name) for name in ("BEGIN IMMEDIATE", "COMMIT")] == [1, 1]
