"""Names of objects, a store that fails, and uploads that are broken off."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from batchrun.objectstore import client
from batchrun.objectstore import upload as uploads
from batchrun.objectstore.client import beneath, stat_object
from batchrun.objectstore.files import ObjectFile
from batchrun.objectstore.paths import ObjectPath, StoreError, inside, location, moved
from batchrun.objectstore.upload import probe, upload


def test_a_url_is_an_object_and_all_else_a_file():
    path = location("s3://rows/lang=de/part.jsonl.gz")
    assert isinstance(path, ObjectPath)
    assert (path.scheme, path.name, path.suffix, path.stem) == (
        *("s3", "part.jsonl.gz", ".gz", "part.jsonl"),
    )
    assert path.parts == ("rows", "lang=de", "part.jsonl.gz")
    assert path.absolute() == location("s3://rows/lang=de") / "part.jsonl.gz"
    assert pickle.loads(pickle.dumps(path)) == path
    assert location("s3://rows/folder/") == ObjectPath("s3://rows/folder")
    assert location("file:///a/b%20c") == Path("/a/b c")
    assert location("~/x") == Path.home() / "x"
    for name in ("a.jsonl", "C:/x", "s3:/x", "://x", "/a/s3://b"):
        assert location(name) == Path(name), name


def test_an_object_has_one_identity():
    for one, other in (
        ("gs://anonymous@rows/x", "gcs://rows/x"),
        ("abfs://in@account.dfs.core.windows.net/x", "abfss://in@account.dfs.core.windows.net/x"),
    ):
        assert ObjectPath(one).identity == ObjectPath(other).identity
        assert ObjectPath(one).identity != ObjectPath(f"{other}y").identity


def test_what_is_within_a_folder():
    home = Path("/home")
    assert inside(home, "a") == Path("/home/a")
    assert inside(home, "/a") == Path("/a")
    assert inside(home, "s3://a/b") == ObjectPath("s3://a/b")


@pytest.mark.parametrize(
    ("path", "old", "new", "expected"),
    [
        ("s3://a/x", "s3://a/x", "/here/x", "/here/x"),
        ("s3://a/in/x/y", "s3://a/in", "gs://b", "gs://b/x/y"),
        ("/in/x", "/in", "s3://a", "s3://a/x"),
        ("/in/x", "/", "/new", "/new/in/x"),
        ("/inner/x", "/in", "/new", None),
        ("s3://ab/x", "s3://a", "/new", None),
    ],
)
def test_what_moves_with_a_folder(path, old, new, expected):
    assert moved(path, location(old), location(new)) == expected


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("s3://", "names no object"),
        ("s3://key:secret@rows/x", "s3://...@rows/x holds a password"),
    ],
)
def test_a_url_that_can_not_be_used_is_refused(name, says):
    with pytest.raises(StoreError) as refused:
        location(name)
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing://a/b", "there is no store nothing://"),
        ("adl://a/b", "needs a package"),
    ],
)
def test_a_store_without_a_client_is_named(name, says):
    with pytest.raises(StoreError, match=says) as refused:
        beneath(ObjectPath(name))
    assert refused.value.hint is None or "package" in refused.value.hint


def test_fsspec_reads_what_arrow_has_no_client_for(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"0123456789")
    folder = ObjectPath(f"local://{tmp_path}/in")
    assert beneath(folder) == [folder / "a"]
    with ObjectFile(folder / "a") as file:
        file.seek(3)
        assert file.read() == b"3456789"
    before = stat_object(folder / "a")
    assert before == stat_object(folder / "a")
    (tmp_path / "in" / "a").write_bytes(b"0123456780")
    os.utime(tmp_path / "in" / "a", (1, 1))
    assert stat_object(folder / "a") != before


def test_a_store_that_never_answered_is_not_waited_for(s3, monkeypatch):
    monkeypatch.setattr(client.time, "sleep", lambda _: pytest.fail("waits"))
    path = s3.put("a")
    s3.stop()
    with pytest.raises(StoreError, match="Could not connect") as refused:
        stat_object(path)
    assert "AWS_ENDPOINT_URL" in refused.value.hint


def test_a_store_that_falls_silent_is_asked_again(s3, monkeypatch):
    data = os.urandom(3 << 20)
    path, waits = s3.put("a", data), []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            s3.start()

    monkeypatch.setattr(client.time, "sleep", wait)
    with ObjectFile(path) as file:
        head = file.read(1000)
        s3.stop()
        assert head + file.read() == data
    assert waits == [0.5, 1.0]


def test_patience_ends(s3, monkeypatch):
    path, now = s3.put("a"), [0.0]
    stat_object(path)
    s3.stop()
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(client.time, "sleep", lambda s: now.__setitem__(0, now[0] + 1000 * s))
    with pytest.raises(StoreError):
        stat_object(path)
    assert 300 < now[0] < 1000


def test_an_object_that_is_replaced_while_it_is_read_is_noticed(s3, monkeypatch):
    path = s3.put("a", bytes(3 << 20))

    def wait(_):
        s3.start()
        s3.put("a", b"\1" * (3 << 20))

    monkeypatch.setattr(client.time, "sleep", wait)
    with ObjectFile(path) as file:
        file.read(1000)
        s3.stop()
        with pytest.raises(StoreError, match="was replaced while it was read"):
            file.read()


def test_an_upload_whose_sender_dies_leaves_nothing(s3):
    data = os.urandom(24 << 20)  # two parts and more: it has begun to send them
    for size, code, left in ((len(data) + 1, 1, []), (len(data), 0, ["out"])):
        command = [sys.executable, "-m", "batchrun.objectstore.upload", "put", str(size)]
        done = subprocess.run([*command, f"{s3.bucket}/out"], input=data, check=False)
        assert done.returncode == code
        assert [name.rpartition("/")[2] for name in s3.names()] == left


def test_an_upload_that_is_interrupted_leaves_nothing(s3, tmp_path, monkeypatch):
    (tmp_path / "made").write_bytes(os.urandom(24 << 20))

    def interrupted(source, to, size):
        to.write(source.read(size))
        raise KeyboardInterrupt

    monkeypatch.setattr(uploads.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upload(tmp_path / "made", s3.bucket / "out")
    assert s3.names() == []


def test_an_upload_is_tried_again(s3, tmp_path, monkeypatch):
    (tmp_path / "made").write_bytes(b"data")
    stat_object(s3.put("other"))
    s3.stop()
    monkeypatch.setattr(client.time, "sleep", lambda _: s3.start())
    upload(tmp_path / "made", s3.bucket / "out")
    assert s3.get(s3.bucket / "out") == b"data"


def test_where_nothing_can_be_made_is_known_before(s3):
    probe(s3.bucket / "out")
    assert s3.names() == []
    with pytest.raises(StoreError, match="NO_SUCH_BUCKET") as refused:
        probe(ObjectPath(f"{s3.bucket}-none/out"))
    assert "Request ID" not in str(refused.value)
