"""What every store of inputs or outputs keeps, whatever lies behind it."""

import gzip
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.errors import InputError, OutputError
from batchrun.jobs.output.store import OutputStore
from batchrun.jobs.rows.source import expand_inputs, open_source
from batchrun.jobs.rows.store import INPUTS, InputStat, InputStore
from tests.jobs.reading import objects


@pytest.fixture(params=[InputStore])
def inputs(request, tmp_path):
    """A store, a place in it, and what puts a file there."""

    def put(name, data=b""):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return request.param(), tmp_path, put


@pytest.fixture(params=[OutputStore])
def outputs(request, tmp_path):
    return request.param(), tmp_path


def refused(made):
    return False


class TestInputs:
    def test_a_name_is_a_file_a_folder_or_a_pattern(self, inputs):
        store, place, put = inputs
        one, two = put("a/1.csv"), put("a/deep/2.csv")
        put("a/.hidden/3.csv")
        put("a/_logs/4.csv")
        put("a/_SUCCESS")
        assert list(store.expand(str(one))) == [(one, None)]
        assert [path for path, _ in store.expand(f"{place}/a/d*/*.csv")] == [two]
        [(folder, beneath)] = store.expand(str(place / "a"))
        assert (folder, list(beneath)) == (place / "a", [one, two])

    @pytest.mark.parametrize("name", ["nothing", "no*", "a/1.csv/more"])
    def test_what_is_not_there_is_refused(self, inputs, name):
        store, place, put = inputs
        put("a/1.csv")
        with pytest.raises(InputError):
            list(store.expand(f"{place}/{name}"))

    def test_it_is_read_from_any_place(self, inputs):
        store, _, put = inputs
        path = put("a", b"0123456789")
        for buffering in (-1, 0):
            with store.open(path, buffering) as file:
                assert file.read(3) == b"012"
                file.seek(7)
                assert file.read(10) == b"789"
        with pytest.raises(FileNotFoundError):
            store.open(path.with_name("b"))

    def test_another_file_in_its_place_is_another(self, inputs):
        store, place, put = inputs
        path = put("a", b"one")
        before = store.stat(path)
        assert (before.size, store.stat(path)) == (3, before)
        os.replace(put("b", b"two"), path)
        assert store.stat(path) != before
        with pytest.raises(FileNotFoundError):
            store.stat(place / "c")


class TestOutputs:
    def write(self, store, path, data=b"whole", may_replace=refused):
        with store.write(path, may_replace=may_replace, private=False) as file:
            file.write(data)

    def test_it_is_there_whole_or_not_at_all(self, outputs):
        store, place = outputs
        path = place / "out"

        def half():
            with store.write(path, may_replace=refused, private=False) as file:
                file.write(b"half")
                assert store.identity(path) is None
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            half()
        assert list(place.iterdir()) == []
        self.write(store, path)
        assert path.read_bytes() == b"whole"

    def test_nothing_is_replaced_that_may_not_be(self, outputs):
        store, place = outputs
        path = place / "out"
        self.write(store, path, b"first")
        before = store.identity(path)
        with pytest.raises(FileExistsError):
            self.write(store, path)
        assert (path.read_bytes(), store.identity(path)) == (b"first", before)
        asked = []
        self.write(store, path, b"third", lambda made: asked.append(made) or True)
        assert path.read_bytes() == b"third"
        assert asked == [store.identity(path)] != [before]

    def test_where_it_can_be_written_is_known_before(self, outputs):
        store, place = outputs
        path = place / "out"
        store.check(path, overwrite=False)
        assert list(place.iterdir()) == []
        self.write(store, path)
        store.check(path, overwrite=True)
        for bad, overwrite in ((path, False), (place, True), (place / "no" / "out", True)):
            with pytest.raises(OutputError):
                store.check(bad, overwrite=overwrite)

    def test_what_dead_writers_left_is_swept_and_nothing_else(self, outputs):
        store, place = outputs
        path = place / "out"
        with store.write(path, may_replace=refused, private=False) as file:
            store.sweep(path)  # its writer lives
            file.write(b"whole")
        assert path.read_bytes() == b"whole"
        if os.fork() == 0:
            with store.write(path, may_replace=refused, private=False):
                os._exit(0)
        os.wait()
        assert len(list(place.iterdir())) == 2
        store.sweep(path)
        assert list(place.iterdir()) == [path]

    def test_one_file_has_places_in_common_by_any_name(self, outputs):
        store, place = outputs
        path = place / "out"
        (place / "folder").mkdir()
        roundabout = place / "folder" / ".." / "out"
        for _ in range(2):  # to be, and there
            assert store.places(path) & store.places(roundabout)
            assert not store.places(path) & store.places(Path(f"{path}2"))
            if store.identity(path) is None:
                self.write(store, path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "a.jsonl.gz"])
def test_a_store_elsewhere_serves_every_format(name, tmp_path, monkeypatch):
    """Of what lies in no file system: nothing but the store may look for it."""
    rows = [{"prompt": f"row {i}"} for i in range(3)]
    local = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), local)
    elif "json" in name:
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        local.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    else:
        local.write_text("prompt\n" + "".join(f"{row['prompt']}\n" for row in rows))
    path, data = Path("/elsewhere") / name, local.read_bytes()

    def read(asked, buffering=-1):
        assert asked == path
        return io.BytesIO(data)

    monkeypatch.setattr(INPUTS, "open", read)
    monkeypatch.setattr(INPUTS, "for_arrow", read)
    monkeypatch.setattr(INPUTS, "stat", lambda _: InputStat(len(data), (1,)))
    monkeypatch.setattr(INPUTS, "expand", lambda asked: iter([(Path(asked), None)]))
    parts, kind = expand_inputs([str(path)], print)
    source = open_source(parts, kind)
    assert source.count() == 3
    assert objects(source) == rows
