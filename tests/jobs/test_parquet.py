"""Parquet beyond what every source does: row groups, rich types, and who may read."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.row import BATCH_BYTES, missing_column
from batchrun.jobs.rows.source import open_source
from tests.jobs.reading import batches as batches_of
from tests.jobs.reading import objects as objects_of

REPO = Path(__file__).parents[2]


def parquet(path, table, **options):
    pq.write_table(table, path, **options)
    return open_source([path], "parquet")


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def visible():
    """A folder that other users see, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """Rows 0 to 999 in three files, one of them a single row, and row groups of 70."""
    paths = []
    for low, high in [(0, 333), (333, 334), (334, 1000)]:
        paths.append(tmp_path_factory.getbasetemp() / f"thousand-{low}.parquet")
        pq.write_table(pa.table({"id": range(low, high)}), paths[-1], row_group_size=70)
    return open_source(paths, "parquet")


@given(st.none() | st.integers(0, 1100))
@settings(max_examples=80, deadline=None)
def test_so_many_rows(thousand, limit):
    expected = list(range(1000))[:limit]
    rows = list(thousand.rows(["id"], limit))
    assert [(row.index, row.fields, row.error) for row in rows] == [
        (i, {"id": i}, None) for i in expected
    ]
    assert [row.index for row in thousand.rows([], limit)] == expected


def test_row_groups_behind_the_limit_are_not_even_read(tmp_path):
    path = tmp_path / "x.parquet"
    source = parquet(path, pa.table({"id": range(10_000)}), row_group_size=5_000)
    chunk = pq.read_metadata(path).row_group(1).column(0)
    begin, end = chunk.dictionary_page_offset, chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[begin:end] = b"\xff" * (end - begin)
    path.write_bytes(data)
    assert [row.fields["id"] for row in source.rows(["id"], 5_000)] == list(range(5_000))
    with pytest.raises(InputError, match="damaged"):
        list(source.rows(["id"], 5_001))


def test_a_column_whose_name_begins_another(tmp_path):
    source = parquet(tmp_path / "x.parquet", pa.table({"a.b": [1], "a": [2], "a.c": [3]}))
    assert [row.fields for row in source.rows(["a"])] == [{"a": 2}]
    assert [row.fields for row in source.rows(["a.b"])] == [{"a.b": 1}]
    source = parquet(tmp_path / "y.parquet", pa.table({"a": [{"b": 1, "c": 2}], "a.b": [3]}))
    assert [row.fields for row in source.rows(["a.b"])] == [{"a.b": 3}]
    assert [row.fields for row in source.rows(["a"])] == [{"a": {"b": 1, "c": 2}}]


def test_empty_row_groups_are_passed_over(tmp_path):
    path, table = tmp_path / "x.parquet", pa.table({"id": [7, 8]})
    with pq.ParquetWriter(path, table.schema) as writer:
        for size in (1, 0, 1, 0):
            writer.write_table(table.slice(0, size), row_group_size=1)
    source = open_source([path], "parquet")
    assert [row.fields["id"] for row in source.rows()] == [7, 7]
    assert pa.Table.from_batches(batches_of(source, table.schema)).num_rows == 2


def test_what_json_can_hold_of_rich_types(tmp_path):
    moment = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    columns = {
        "when": pa.array([moment], pa.timestamp("us", "UTC")),
        "ns": pa.array([1], pa.timestamp("ns")),
        "far": pa.array([1 << 48], pa.timestamp("ms")),
        "nested_ns": pa.array([[{"t": 1}]], pa.list_(pa.struct([("t", pa.timestamp("ns"))]))),
        "day": pa.array([date(2026, 1, 2)]),
        "long": pa.array([timedelta(seconds=90)]),
        "money": pa.array([Decimal("1.10")]),
        "bytes": pa.array([b"\x00\xff"]),
        "nan": pa.array([float("nan")]),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())),
        "word": pa.array(["x"]).dictionary_encode(),
        "none": pa.array([None], pa.null()),
        "messages": pa.array([[{"role": "user", "content": "hi"}]]),
    }
    source = parquet(tmp_path / "x.parquet", pa.table(columns))
    (row,) = objects_of(source)
    assert next(iter(source.rows())).fields == row  # templates see the same
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["when"] == "2026-01-02T03:04:05.000678+00:00"
    assert row["ns"] == "1970-01-01T00:00:00.000000001"
    assert row["far"] == "+10889-08-02T05:31:50.656"  # a year that Python does not know
    assert row["nested_ns"] == [{"t": "1970-01-01T00:00:00.000000001"}]
    assert (row["day"], row["long"], row["money"]) == ("2026-01-02", "90.000000", "1.10")
    assert (row["bytes"], row["nan"], row["none"], row["word"]) == ("AP8=", None, None, "x")
    assert row["messages"] == [{"role": "user", "content": "hi"}]
    assert row["map"] == [["a", 1]]


def test_batches_keep_the_schema_and_its_metadata(tmp_path):
    schema = pa.schema(
        [
            pa.field("id", pa.uint16(), nullable=False, metadata={"unit": "none"}),
            pa.field("word", pa.dictionary(pa.int32(), pa.string())),
        ],
        metadata={"made": "here"},
    )
    table = pa.table([pa.array(range(500), pa.uint16()), ["a", "b"] * 250], schema=schema)
    source = parquet(tmp_path / "x.parquet", table, row_group_size=90)
    assert source.schema().metadata == {b"made": b"here"}
    batches = batches_of(source, source.schema(), 400)
    assert all(batch.schema.equals(source.schema(), check_metadata=True) for batch in batches)
    assert pa.Table.from_batches(batches).to_pylist() == table.slice(0, 400).to_pylist()


def test_batches_are_small_where_the_file_has_a_large_cell_once_and_the_rows_many_times(tmp_path):
    cells = [f"{i % 2}" * 400_000 for i in range(300)]
    source = parquet(tmp_path / "x.parquet", pa.table({"prompt": cells}))
    assert (tmp_path / "x.parquet").stat().st_size < 1_000_000
    batches = batches_of(source, source.schema())
    assert max(batch.nbytes for batch in batches) <= BATCH_BYTES
    assert sum(batch.num_rows for batch in batches) == 300


def test_missing_column_suggests_the_closest():
    error = missing_column("promt", ["id", "Prompt", "text"])
    assert str(error) == "the input has no column 'promt'; its columns: id, Prompt, text"
    assert error.hint == "did you mean 'Prompt'?"
    assert missing_column("zzz", ["id"]).hint is None
    assert "and 30 more" in str(missing_column("x", [f"c{i}" for i in range(50)]))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
class TestUnreadable:
    def test_a_folder_where_a_file_should_be(self, tmp_path, kind):
        path = tmp_path / f"x.{kind}"
        path.mkdir()
        with pytest.raises(InputError, match=f"{path}.*(Is a directory|is a directory)"):
            open_source([path], kind)

    def test_no_permission(self, visible, kind):
        path = visible / "locked" / f"x.{kind}"
        path.parent.mkdir(mode=0o755)
        pq.write_table(pa.table({"prompt": ["a"]}), path)
        code = """
            import os, sys
            from pathlib import Path
            from batchrun.jobs.errors import InputError
            from batchrun.jobs.rows.source import expand_inputs, open_source
            if os.getuid() == 0:
                os.setuid(65534)
            path, kind = sys.argv[1:]
            for act in (lambda: open_source([Path(path)], kind), lambda: expand_inputs([path])):
                try:
                    act()
                    print("fine")
                except InputError as error:
                    print(error)
        """
        path.chmod(0)
        refused = f"{path} can't be read: Permission denied\n"
        assert run_python(code, path, kind).stdout == refused + "fine\n"
        path.parent.chmod(0)
        try:
            assert run_python(code, path, kind).stdout == refused * 2
            assert run_python(code, path.parent, kind).stdout.endswith(
                f"{path.parent} can't be read: Permission denied\n"
            )
        finally:
            path.parent.chmod(0o755)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_large_file_streams(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    prompts = [f"{i:08d}" * 128 for i in range(100_000)]  # 102 MB, in one row group
    if kind == "parquet":
        whole = {"row_group_size": 100_000, "compression": None, "use_dictionary": False}
        pq.write_table(pa.table({"prompt": prompts}), path, **whole)
    else:
        path.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in prompts))
    code = """
        import sys
        from pathlib import Path
        from batchrun.jobs.rows.source import open_source

        def peak():
            # Not getrusage: its peak includes the process that forked this one.
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

        source = open_source([Path(sys.argv[1])], sys.argv[2])
        before = peak()
        count = sum(1 for _ in source.rows(["prompt"]))
        rows = sum(chunk.num_rows for chunk in source.chunks())
        assert count == rows == 100_000, (count, rows)
        print(peak() - before)
    """
    done = run_python(code, path, kind)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 << 10  # KiB
