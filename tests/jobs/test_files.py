"""Files that appear whole or not at all, whenever the writer dies."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batchrun.jobs import files
from batchrun.jobs.errors import OutputError
from batchrun.jobs.files import (
    atomic_write,
    check_room,
    disk_of,
    make_folders,
    read_json,
    remove,
    write_json,
)

ROOT = Path(__file__).parents[2]
WRITE = """
import sys
from pathlib import Path
from batchrun.jobs.files import atomic_write
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
    others = {".other.x.tmp", "out[1].json.keep", ".out1.json.abcdefgh.tmp", ".out[1].json.my.tmp"}
    for other in others:
        (tmp_path / other).write_bytes(b"of others")
    with writer(path) as process:
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"old"
    before = {p.name for p in tmp_path.iterdir()}
    assert len(before) == 6
    write_json(path, {"a": "ü"})
    assert read_json(path) == {"a": "ü"}
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"out[1].json", *others}
    assert path.read_text().startswith('{\n  "a": "ü",\n  "checksum": "')


def test_a_living_writer_is_left_alone(tmp_path):
    path = tmp_path / "out"
    with writer(path) as process:
        with atomic_write(path) as file:
            file.write(b"mine")
        assert path.read_bytes() == b"mine"
        process.communicate("")
    assert process.returncode == 0
    assert path.read_bytes() == b"half"


def no_links(*_, **__):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture(params=["links", "no links"])
def new_names(request, monkeypatch):
    """On a file system with hard links, and on one without."""
    if request.param == "no links":
        monkeypatch.setattr(os, "link", no_links)


@pytest.mark.usefixtures("new_names")
class TestANewName:
    def test_nothing_has_it(self, tmp_path):
        path = tmp_path / "out"
        with atomic_write(path, may_replace=lambda made: made[1] != 3) as file:
            file.write(b"new")
        assert path.read_bytes() == b"new"
        assert path.stat().st_nlink == 1
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("there", ["a file", "a link that leads nowhere"])
    def test_something_took_it_meanwhile(self, tmp_path, there):
        path = tmp_path / "out"

        def meanwhile(_):
            path.write_bytes(b"old") if there == "a file" else path.symlink_to("nowhere")
            return False

        with pytest.raises(FileExistsError), atomic_write(path, may_replace=meanwhile) as file:
            file.write(b"new")
        assert path.is_symlink() or path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_it_is_on_disk_after_the_data_and_before_the_end(self, tmp_path, monkeypatch):
        path, done = tmp_path / "out", []
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda h: (done.append(path.exists()), real(h)))
        with atomic_write(path, may_replace=lambda _: False):
            pass
        assert done == [False, True]


def test_a_name_that_was_held_and_not_given_is_free_again(tmp_path, monkeypatch):
    def failing(*_):
        assert (tmp_path / "out").read_bytes() == b""
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "replace", failing)
    write = atomic_write(tmp_path / "out", may_replace=lambda _: False)
    with pytest.raises(OSError, match="Input/output error"), write as file:
        file.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_file_is_taken_for_abandoned_by_nobody(tmp_path):
    """Not even when it is whole and waits for its name."""

    def meanwhile(_):
        with atomic_write(path) as other:
            other.write(b"other")
        return True

    path = tmp_path / "out"
    with atomic_write(path, may_replace=meanwhile) as file:
        file.write(b"mine")
    assert path.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_file_s_mode_is_like_any_other_file_s(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_not_to_last_is_written_without_a_sync(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), real(handle)))
    write_json(tmp_path / "a.json", {"a": 1}, durable=False)
    assert synced == []
    write_json(tmp_path / "b.json", {"a": 1})
    assert len(synced) == 2  # the file, then its folder
    assert [read_json(tmp_path / name) for name in ("a.json", "b.json")] == [{"a": 1}, {"a": 1}]


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
    assert abs(disk_of(path).free - shutil.disk_usage(tmp_path).free) < 1 << 30
    check_room((disk_of(path), 1), (disk_of(tmp_path), 1))
    with pytest.raises(OutputError, match=r"MiB left, but 1,\d{3},.* MiB are needed") as refused:
        check_room((disk_of(path), 1 << 60))
    assert "make room" in refused.value.hint


def test_room_for_several_files_of_a_disk_adds_up(tmp_path):
    free = disk_of(tmp_path).free
    check_room((disk_of(tmp_path / "a"), free // 3))
    with pytest.raises(OutputError):
        check_room(*((disk_of(tmp_path / name), free // 3) for name in "abcd"))


def test_the_umask_is_known_where_there_is_no_proc(monkeypatch):
    told, opened = files.current_umask(), open

    def without_proc(path, *arguments, **options):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return opened(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", without_proc)
    assert files.current_umask() == told
    monkeypatch.undo()
    assert files.current_umask() == told
