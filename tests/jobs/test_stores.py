"""What every store of inputs or outputs keeps, whatever lies behind it."""

import gzip
import io
import json
import os
import random
import threading
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.errors import InputError, OutputError
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.rows.source import expand_inputs, open_source
from batchrun.jobs.rows.store import INPUTS, InputStat
from batchrun.objectstore.files import ObjectFile
from batchrun.objectstore.paths import ObjectPath
from tests.jobs.reading import objects


@pytest.fixture(params=["here", "s3"])
def kind(request):
    return request.param


@pytest.fixture
def inputs(kind, request, tmp_path):
    """The store, a place in it, and what puts a file there."""
    if kind == "s3":
        s3 = request.getfixturevalue("s3")
        return INPUTS, s3.bucket / "place", lambda name, data=b"": s3.put(f"place/{name}", data)

    def put(name, data=b""):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return INPUTS, tmp_path, put


@pytest.fixture
def outputs(kind, request, tmp_path, monkeypatch):
    """The store, a place in it, what reads a file there, and what lists all files."""
    if kind == "here":
        return OUTPUTS, tmp_path, Path.read_bytes, lambda: [*tmp_path.iterdir()]
    s3 = request.getfixturevalue("s3")
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path))
    (tmp_path / "jobs").mkdir()

    def everything():
        return [*map(ObjectPath, (f"s3://{n}" for n in s3.names())), *tmp_path.glob("jobs/*")]

    return OUTPUTS, s3.bucket, s3.get, everything


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
        for pattern in ("a/d*/*.csv", "a/d*p/?.csv", "a/[a-e]*/2*", "*/deep/*", "a/de**/*2.csv"):
            assert [path for path, _ in store.expand(f"{place}/{pattern}")] == [two], pattern
        assert {two} <= {path for path, _ in store.expand(f"{place}/**/*.csv")}
        for name in ("a", "a/"):
            [(folder, beneath)] = store.expand(f"{place}/{name}")
            assert (folder, list(beneath)) == (place / "a", [one, two])
        [(folder, beneath)] = store.expand(f"{place}/a/dee?")
        assert (folder, list(beneath)) == (place / "a" / "deep", [two])

    @pytest.mark.parametrize("name", ["nothing", "no*", "a/1.csv/more", "no/**/1.csv"])
    def test_what_is_not_there_is_refused(self, inputs, name):
        store, place, put = inputs
        put("a/1.csv")
        with pytest.raises(InputError):
            list(store.expand(f"{place}/{name}"))

    @pytest.mark.parametrize("name", ["a b+c%20d&e=f.csv", "läng=dé/#1?.csv", "a@b:c.csv"])
    def test_names_are_literal(self, inputs, name):
        store, place, put = inputs
        path = put(name, b"data")
        assert list(store.expand(str(path))) == [(path, None)]
        [(_, beneath)] = store.expand(str(place))
        assert list(beneath) == [path]
        with store.open(path) as file:
            assert file.read() == b"data"

    def test_it_is_read_from_any_place(self, inputs):
        store, _, put = inputs
        path = put("a", b"0123456789")
        for buffering in (-1, 0):
            with store.open(path, buffering) as file:
                assert file.read(3) == b"012"
                file.seek(7)
                assert file.read(10) == b"789"
                file.seek(-2, os.SEEK_END)
                assert (file.read(1), file.tell()) == (b"8", 9)
                file.seek(4)
                assert file.read() == b"456789"
                assert file.read(1) == b""
        with pytest.raises(FileNotFoundError):
            store.open(path.parent / "b" if isinstance(path, Path) else ObjectPath(f"{path}b"))

    def test_a_large_file_is_read_whole_in_any_steps(self, inputs):
        store, _, put = inputs
        data = os.urandom(1 << 20) * 5
        path = put("a", data)
        for step in (1 << 16, 1_000_003, 6 << 20):
            with store.open(path, 0) as file:
                assert b"".join(iter(partial(file.read, step), b"")) == data
        rng = random.Random(1)
        with store.open(path, 0) as file:
            for _ in range(50):
                begin, size = rng.randrange(len(data)), rng.choice([1, 100, 300_000])
                file.seek(begin)
                assert file.read(size) == data[begin : begin + size]

    def test_columns_are_read_in_few_requests(self, s3, monkeypatch):
        """Arrow reads a Parquet file in as many places at once as it has columns."""
        noise = [os.urandom(3000).hex() for _ in range(1000)]
        table = pa.table({f"column {i}": noise[i:] + noise[:i] for i in range(8)})
        file = io.BytesIO()
        pq.write_table(table, file, compression=None, use_dictionary=False)
        path, sizes, threads = s3.put("a.parquet", file.getvalue()), [], set()

        def fetched(file, size, real=ObjectFile._fetched):
            sizes.append(size)
            threads.add(threading.current_thread())
            return real(file, size)

        monkeypatch.setattr(ObjectFile, "_fetched", fetched)
        source = open_source([path], "parquet")
        found = [chunk.arrow(source.schema()) for chunk in source.chunks()]
        assert pa.Table.from_batches(found).equals(table)
        # A thread of Arrow's that lets go of Python's memory at exit would abort the process.
        assert threads == {threading.current_thread()}
        assert len(sizes) < 8 * 8
        assert sum(sizes) < 1.2 * len(file.getvalue()) + (1 << 20)

    def test_another_file_in_its_place_is_another(self, inputs):
        store, place, put = inputs
        path = put("a", b"one")
        before = store.stat(path)
        assert (before.size, store.stat(path)) == (3, before)
        if isinstance(path, Path):
            os.replace(put("b", b"two"), path)
        else:
            put("a", b"two")
        assert store.stat(path) != before
        with pytest.raises(FileNotFoundError):
            store.stat(place / "c")


class TestOutputs:
    def write(self, store, path, data=b"whole", may_replace=refused):
        with store.write(path, may_replace=may_replace, private=False) as file:
            file.write(data)

    def test_it_is_there_whole_or_not_at_all(self, outputs):
        store, place, read, everything = outputs
        path = place / "out"

        def half():
            with store.write(path, may_replace=refused, private=False) as file:
                file.write(b"half")
                assert store.identity(path) is None
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            half()
        assert everything() == []
        self.write(store, path)
        assert read(path) == b"whole"

    def test_nothing_is_replaced_that_may_not_be(self, outputs):
        store, place, read, everything = outputs
        path = place / "out"
        self.write(store, path, b"first")
        before = store.identity(path)
        with pytest.raises(FileExistsError):
            self.write(store, path)
        assert (read(path), store.identity(path)) == (b"first", before)
        asked = []
        self.write(store, path, b"third", lambda made: asked.append(made) or True)
        assert read(path) == b"third"
        assert asked == [store.identity(path)] != [before]
        assert everything() == [path]

    def test_where_it_can_be_written_is_known_before(self, outputs):
        store, place, _, everything = outputs
        path = place / "out"
        store.check(path, overwrite=False)
        assert everything() == []
        self.write(store, path)
        store.check(path, overwrite=True)
        nowhere = place / "no" / "out" if isinstance(place, Path) else ObjectPath(f"{place}no/out")
        for bad, overwrite in ((path, False), (place, True), (nowhere, True)):
            with pytest.raises(OutputError):
                store.check(bad, overwrite=overwrite)
        assert everything() == [path]

    def test_what_dead_writers_left_is_swept_and_nothing_else(self, outputs):
        store, place, read, everything = outputs
        path = place / "out"
        with store.write(path, may_replace=refused, private=False) as file:
            store.sweep(path)  # its writer lives
            file.write(b"whole")
        assert read(path) == b"whole"
        if os.fork() == 0:
            with store.write(path, may_replace=refused, private=False):
                os._exit(0)
        os.wait()
        assert len(everything()) == 2
        store.sweep(path)
        assert everything() == [path]

    def test_one_file_has_places_in_common_by_any_name(self, outputs, tmp_path):
        store, place, _, _ = outputs
        path = place / "out"
        roundabout = path
        if isinstance(place, Path):
            (place / "folder").mkdir()
            roundabout = place / "folder" / ".." / "out"
        for _ in range(2):  # to be, and there
            assert store.places(path) & store.places(roundabout)
            assert not store.places(path) & store.places(place / "out2")
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
