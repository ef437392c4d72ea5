"""What is in the engine is known after the process died, whatever killed it."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batchrun.jobs.errors import OutputError
from batchrun.jobs.inflight import InFlightRows, Making, ReaderNote, Reading

ROOT = Path(__file__).parents[2]


def test_rows_come_and_go(tmp_path):
    running = InFlightRows(tmp_path)
    for row in (5, 0, 7, 5):
        running.add(row)
    assert running.rows() == [0, 5, 7]
    running.remove(5)
    assert running.rows() == [0, 5, 7]  # its other sample is still in
    running.remove(5)
    running.remove(0)
    assert running.rows() == [7]
    running.close()


def test_more_rows_than_it_was_made_for(tmp_path):
    running = InFlightRows(tmp_path)
    for row in range(3000):
        running.add(row)
    for row in range(0, 3000, 2):
        running.remove(row)
    assert running.rows() == list(range(1, 3000, 2))
    other = InFlightRows(tmp_path)
    assert other.rows() == running.rows()
    running.clear()
    assert other.rows() == []
    other.add(2**40)
    assert running.rows() == [2**40]
    running.close()
    other.close()


DIE = """
import os, signal, sys
from pathlib import Path
from batchrun.jobs.inflight import Making, ReaderNote, Reading, InFlightRows
running = InFlightRows(Path(sys.argv[1]))
running.clear()
for row in (3, 4, 9):
    running.add(row)
running.remove(4)
os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_the_note_outlives_the_process(tmp_path, number):
    def no_core():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    for _ in range(2):
        command = [sys.executable, "-c", DIE, str(tmp_path), str(int(number))]
        done = subprocess.run(command, cwd=ROOT, preexec_fn=no_core, check=False)
        assert done.returncode == -number
        running = InFlightRows(tmp_path)
        assert running.rows() == [3, 9]
        running.remove(9)
        assert running.rows() == [3]
        running.add(9)
        running.close()


FULL = """
import resource, signal, sys
from pathlib import Path
from batchrun.jobs.errors import OutputError
from batchrun.jobs.inflight import Making, ReaderNote, Reading, InFlightRows
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    InFlightRows(Path(sys.argv[1]))
except OutputError as error:
    print(error.hint)
"""


def test_a_full_disk_is_an_error_at_once_and_no_signal_later(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "make room" in done.stdout


def test_a_folder_that_is_gone_is_one_clear_error(tmp_path):
    with pytest.raises(OutputError, match="running-rows can't be made"):
        InFlightRows(tmp_path / "gone")
    assert os.listdir(tmp_path) == []


AT = """
import os, signal, sys
from pathlib import Path
from batchrun.jobs.inflight import ReaderNote
note = ReaderNote(Path(sys.argv[1]))
note.making(3)
note.made()
with note.reading(), note.reading(Path("a.parquet"), 10, 5):
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "reading" else None
    note.making(4)
note.making(7)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("what", ["reading", "making"])
def test_what_the_reader_was_at_outlives_the_process(tmp_path, what):
    subprocess.run([sys.executable, "-c", AT, str(tmp_path), what], cwd=ROOT, check=False)
    note = ReaderNote(tmp_path)
    at = note.at()
    note.close()
    if what == "reading":
        assert isinstance(at, Reading)
        assert (at.path, at.first, at.rows) == ("a.parquet", 10, 5)
        assert str(at) == "a.parquet, rows 10 to 14"
    else:
        assert isinstance(at, Making)
        assert (at.row, at.number) == (7, 3)


def test_who_reads_a_file_of_the_input_reads_the_input_after_it(tmp_path):
    note = ReaderNote(tmp_path)
    assert note.at() is None
    with note.reading(None, 8):
        with note.reading(tmp_path / "x"):
            assert str(note.at()) == str(tmp_path / "x")
        assert str(note.at()) == "the input, rows 8 on"
    assert note.at() is None
    note.making(2)
    note.made()
    assert note.at() is None
    note.close()
