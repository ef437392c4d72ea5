"""Files that appear whole or not at all, whenever the writer dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import files
from jobs.errors import OutputError
from jobs.files import atomic_write, check_room, free_bytes, make_folders, remove, write_json

ROOT = Path(__file__).parents[2]
WRITE = """
import sys
from pathlib import Path
from jobs.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def writer(path):
    """A process in the middle of writing the file."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "out"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"n" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_killed_writer_leaves_the_old_file_and_its_rubbish_goes_with_the_next(tmp_path):
    path = tmp_path / "out[1].json"
    path.write_bytes(b"old")
    for other in (".other.x.tmp", "out[1].json.keep", ".out1.json.x.tmp"):
        (tmp_path / other).write_bytes(b"of others")
    with writer(path) as process:
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"old"
    before = {p.name for p in tmp_path.iterdir()}
    assert len(before) == 5
    write_json(path, {"a": "ü"})
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"out[1].json", ".other.x.tmp", "out[1].json.keep", ".out1.json.x.tmp"}
    assert path.read_text() == '{\n  "a": "ü"\n}\n'


def test_a_living_writer_is_left_alone(tmp_path):
    path = tmp_path / "out"
    with writer(path) as process:
        with atomic_write(path) as file:
            file.write(b"mine")
        assert path.read_bytes() == b"mine"
        process.communicate("")
    assert process.returncode == 0
    assert path.read_bytes() == b"half"


def test_the_file_s_mode_is_like_any_other_file_s(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_not_to_last_is_written_without_a_sync(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), real(handle)))
    write_json(tmp_path / "a.json", 1, durable=False)
    assert synced == []
    write_json(tmp_path / "b.json", 1)
    assert len(synced) == 2  # the file, then its folder
    assert [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")] == [1, 1]


def test_folders_are_made_with_their_names_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "fsync_directory", synced.append)
    make_folders(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    make_folders(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3


def test_removing_what_is_not_there_is_no_error(tmp_path):
    remove(tmp_path / "gone")
    (tmp_path / "there").touch()
    remove(tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


def test_room_is_checked_where_the_file_will_be(tmp_path):
    path = tmp_path / "not" / "yet" / "there"
    assert abs(free_bytes(path) - shutil.disk_usage(tmp_path).free) < 1 << 30
    check_room((path, 1), (tmp_path, 1))
    with pytest.raises(OutputError, match=r"MiB left and 1,\d{3},.* MiB are needed") as refused:
        check_room((path, 1 << 60))
    assert "make room" in refused.value.hint


def test_room_for_several_files_of_a_disk_adds_up(tmp_path):
    free = free_bytes(tmp_path)
    check_room((tmp_path / "a", free // 3))
    with pytest.raises(OutputError):
        check_room(*((tmp_path / name, free // 3) for name in "abcd"))
