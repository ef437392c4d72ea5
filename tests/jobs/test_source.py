"""The contract of a source, over both formats, compressed, alone and in parts; and bad input."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.row import BATCH_BYTES
from batchrun.jobs.rows.source import expand_inputs, open_source
from batchrun.jobs.rows.store import Part
from tests.jobs.reading import batches, objects

RECORDS = [
    {"id": i, "prompt": f"naïve 🙂 {i}", "score": i / 4, "tags": ["a", str(i)], "meta": {"k": i}}
    for i in range(1000)
]


def write_parquet(path, records):
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=300)


def write_jsonl(path, records):
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    path.write_bytes(lines.encode())


def write_gz(path, records):
    write_jsonl(path, records)
    path.write_bytes(gzip.compress(path.read_bytes()))


def write_zst(path, records):
    write_jsonl(path, records)
    data = path.read_bytes()
    with pa.output_stream(path, compression="zstd") as file:
        file.write(data)


FORMATS = {
    ".parquet": write_parquet,
    ".jsonl": write_jsonl,
    ".ndjson": write_jsonl,
    ".jsonl.gz": write_gz,
    ".jsonl.zst": write_zst,
}


def opened(*paths):
    return open_source(*expand_inputs([str(path) for path in paths]))


class TestContract:
    """What every source does, whatever the format and however many files there are."""

    @pytest.fixture(params=FORMATS)
    def suffix(self, request):
        return request.param

    @pytest.fixture(params=[1, 3])
    def source(self, request, suffix, tmp_path):
        folder = tmp_path / "input"
        folder.mkdir()
        size = -(-len(RECORDS) // request.param)
        for part in range(request.param):
            records = RECORDS[part * size : (part + 1) * size]
            # Part 10 comes after part 9, not after part 1.
            FORMATS[suffix](folder / f"part-{part + 9}{suffix}", records)
        return opened(folder)

    def test_rows_are_all_there_in_order_with_their_values(self, source):
        rows = list(source.rows())
        assert [row.index for row in rows] == list(range(1000))
        assert [row.fields for row in rows] == RECORDS
        assert {row.error for row in rows} == {None}

    def test_rows_can_be_read_twice_and_by_column(self, source):
        expected = [{"prompt": r["prompt"], "id": r["id"]} for r in RECORDS]
        for _ in range(2):
            rows = list(source.rows(["prompt", "id"]))
            assert [row.fields for row in rows] == expected
            assert list(rows[0].fields) == ["prompt", "id"]

    @pytest.mark.parametrize(
        "limit", [0, 1, 299, 300, 301, 333, 334, 335, 600, 999, 1000, 1001, None]
    )
    def test_so_many_rows(self, source, limit):
        stop = 1000 if limit is None else min(1000, limit)
        rows = list(source.rows(["id"], limit))
        assert [row.index for row in rows] == list(range(stop))
        assert [row.fields["id"] for row in rows] == list(range(stop))

    def test_columns_and_number(self, source):
        assert source.column_names == ["id", "prompt", "score", "tags", "meta"]
        assert source.count() == 1000
        assert source.num_rows in (None, 1000)

    def test_batches_have_the_schema_and_every_value(self, source):
        schema = source.schema()
        assert schema.names == source.column_names
        assert schema.field("id").type == pa.int64()
        assert schema.field("tags").type.value_type == pa.string()
        table = pa.Table.from_batches(batches(source, schema), schema)
        assert table.to_pylist() == RECORDS
        assert pa.Table.from_batches(batches(source, schema, 500), schema).num_rows == 500

    def test_objects_are_what_json_holds(self, source):
        assert objects(source) == RECORDS
        assert objects(source, 7) == RECORDS[:7]


def test_files_folders_and_globs_name_the_same_input_once_in_order(tmp_path):
    names = ["b/part-2.jsonl", "b/part-10.jsonl", "a.jsonl", "b/sub/c.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        write_jsonl(tmp_path / name, RECORDS[:1])
    for hidden in ("b/.hidden.jsonl", "b/_SUCCESS", "b/notes.txt", "b/_temporary/x.jsonl"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text("not an input")
    expected = [
        tmp_path / n for n in ("a.jsonl", "b/part-2.jsonl", "b/part-10.jsonl", "b/sub/c.jsonl")
    ]
    for inputs in (
        [tmp_path],
        [tmp_path / "**" / "[abp]*.jsonl", tmp_path / "b"],
        [tmp_path / "b", tmp_path / "a.jsonl", tmp_path / "a.jsonl"],
    ):
        parts, kind = expand_inputs([str(path) for path in inputs])
        files = [part.path for part in parts]
        assert (files, kind) == (expected, "jsonl")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    path = tmp_path / "odd[1].jsonl"
    write_jsonl(path, RECORDS[:1])
    assert expand_inputs([str(path)])[0] == [Part(path)]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["missing.parquet"], "no such file or folder"),
        (["*.parquet"], "no file matches"),
        (["empty"], "has no input files"),
        (["notes.txt"], "does not say which format it has"),
        (["a.jsonl", "a.parquet"], "mixes formats"),
        (["dangling.jsonl"], "links to a file that does not exist"),
        ([], "no input files"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, inputs, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "dangling.jsonl").symlink_to("gone")
    write_jsonl(tmp_path / "a.jsonl", RECORDS[:1])
    write_parquet(tmp_path / "a.parquet", RECORDS[:1])
    (tmp_path / "*.parquet").unlink(missing_ok=True)
    given = [str(tmp_path / name) for name in inputs]
    if inputs == ["*.parquet"]:
        given = [str(tmp_path / "none-*.parquet")]
    with pytest.raises(InputError, match=message) as refused:
        expand_inputs(given)
    assert refused.value.hint


def truncated(path):
    write_parquet(path, RECORDS)
    path.write_bytes(path.read_bytes()[:-100])


def headless(path):
    write_parquet(path, RECORDS)
    path.write_bytes(b"JUNK" + path.read_bytes()[4:])


def no_rows(path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)


BAD_FILES = {
    "empty.parquet": (lambda p: p.write_bytes(b""), "damaged or cut short"),
    "truncated.parquet": (truncated, "damaged or cut short"),
    "text.parquet": (lambda p: p.write_text("prompt\nhello\n" * 9), "is not a Parquet file"),
    "norows.parquet": (no_rows, "has no rows"),
    "empty.jsonl": (lambda p: p.write_bytes(b""), "has no rows"),
    "blank.jsonl": (lambda p: p.write_bytes(b"\n \r\n\n"), "has no rows"),
    "empty.jsonl.gz": (lambda p: p.write_bytes(gzip.compress(b"")), "has no rows"),
    "zero.jsonl.gz": (lambda p: p.write_bytes(b""), "has no rows|cut short"),
    "zero.jsonl.zst": (lambda p: p.write_bytes(b""), "has no rows|cut short"),
    "cut.jsonl.gz": (lambda p: p.write_bytes(gzip.compress(b"{}" * 999)[:-9]), "cut short"),
    "array.json": (lambda p: p.write_text("[\n1\n]\n"), "no JSON object in the first 1 rows"),
    "text.jsonl": (lambda p: p.write_text("hello\nworld\n"), "line 1 of text.jsonl is not valid"),
    "binary.jsonl": (lambda p: p.write_bytes(bytes(range(128, 256))), "not valid UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_an_input_is_refused_before_the_job_starts(tmp_path, name):
    make, message = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(InputError, match=message) as refused:
        opened(tmp_path / name)
    assert name in str(refused.value)
    assert refused.value.hint


@pytest.mark.parametrize("name", ["gone.parquet", "gone.jsonl"])
def test_a_file_that_cannot_be_read_names_the_system_s_reason(tmp_path, name):
    """Gone between listing and opening: what `open` says then is what it says of permissions."""
    with pytest.raises(InputError, match=f"{name} can't be read: No such file"):
        open_source([tmp_path / name], name.split(".")[1])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_that_was_cut_short_is_an_error_not_a_shorter_input(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    FORMATS[suffix](path, RECORDS)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(InputError, match=r"cut\.jsonl.* is damaged or cut short"):
        opened(path).count()
    with pytest.raises(InputError, match=r"cut\.jsonl.* is damaged or cut short"):
        list(opened(path).rows())


def test_gzip_files_of_several_members_are_read_whole(tmp_path):
    path = tmp_path / "members.jsonl.gz"
    lines = [json.dumps(r).encode() + b"\n" for r in RECORDS]
    path.write_bytes(b"".join(gzip.compress(b"".join(lines[i : i + 100])) for i in (0, 100, 200)))
    assert [row.fields for row in opened(path).rows()] == RECORDS[:300]


def test_damage_inside_a_parquet_file_is_an_input_error(tmp_path):
    path = tmp_path / "holed.parquet"
    write_parquet(path, RECORDS)
    data = bytearray(path.read_bytes())
    data[4:2000] = b"\xff" * 1996
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"holed\.parquet"):
        list(opened(path).rows())


def test_parquet_files_must_agree_in_their_columns(tmp_path):
    pq.write_table(pa.table({"id": [1], "prompt": ["a"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"id": ["b"], "prompt": ["a"]}), tmp_path / "2.parquet")
    with pytest.raises(InputError, match="differ in their columns: 'id' is int64 in") as refused:
        opened(tmp_path)
    assert "string in" in str(refused.value)
    assert "2.parquet" in str(refused.value)


def test_a_missing_parquet_column_names_those_there_are_and_the_closest(tmp_path):
    write_parquet(tmp_path / "a.parquet", RECORDS[:3])
    source = opened(tmp_path)
    with pytest.raises(InputError, match="no column 'Promt'; its columns: id, prompt") as refused:
        list(source.rows(["Promt"]))
    assert refused.value.hint == "did you mean 'prompt'?"


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array([1]), pa.array([2])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(InputError, match="more than one column named 'prompt'"):
        opened(tmp_path)


BAD_LINES = {
    b'{"prompt": "x"': "line 7 of bad.jsonl is not valid JSON: .* at character 16",
    b'{"prompt": "\xff"}': "line 7 of bad.jsonl is not valid UTF-8: byte 0xff at byte 13",
    b"[1, 2]": "not a JSON object but an array",
    b'"text"': "not a JSON object but a string",
    b"null": "not a JSON object but null",
    b"12": "not a JSON object but a number",
    b'{"a":' * 5000: "line 7 of bad.jsonl is n",
    b'{"a": ' + b"[" * 90 + b"]" * 90 + b"}": "nested more than",
    b'{"a": ' + b"9" * 5000 + b"}": "not valid JSON",
    b'{"a": 1} {"a": 2}': "not valid JSON",
    b"\x00\x00": "not valid JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_broken_line_is_that_rows_error_and_the_other_rows_are_fine(tmp_path, line):
    lines = [b'{"prompt": "%d"}' % i for i in range(10)]
    lines[6] = line
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    source = opened(tmp_path)
    rows = list(source.rows(["prompt"]))
    assert [row.index for row in rows] == list(range(10))
    assert [row.fields.get("prompt") for row in rows if row.index != 6] == list("012345789")
    assert rows[6].fields == {}
    with pytest.raises(InputError, match=BAD_LINES[line]):
        raise InputError(rows[6].error)
    assert len(rows[6].error) < 200
    assert [o is None for o in objects(source)] == [i == 6 for i in range(10)]
    table = pa.Table.from_batches(batches(source, source.schema()))
    assert table.column("prompt").to_pylist()[5:8] == ["5", None, "7"]


def test_blank_lines_are_no_rows_and_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \t\n{"a": 2}\n\n{"a": "x\xe2\x80\xa8y"}')
    rows = list(opened(path).rows())
    assert [(row.index, row.fields["a"]) for row in rows] == [(0, 1), (1, 2), (2, "x\u2028y")]
    path.write_bytes(path.read_bytes() + b"\n\n{oops")
    assert "line 8 of odd.jsonl" in list(opened(path).rows())[3].error


def test_json_values_are_kept_exactly(tmp_path):
    value = {
        "big": 2**80,
        "small": -1e-300,
        "deep": {"list": [1, [2, {"x": None}]], "true": True},
        "text": '\u0000\u2028 "quoted"',
        "": "no name",
    }
    write_jsonl(tmp_path / "a.jsonl", [value, {"other": 1}])
    source = opened(tmp_path)
    assert next(iter(source.rows())).fields == value
    assert objects(source) == [value, {"other": 1}]
    assert [row.fields for row in source.rows(["big", "none"])] == [
        {"big": 2**80, "none": None},
        {"big": None, "none": None},
    ]


def test_a_lone_surrogate_becomes_valid_text_for_the_engine(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a\\ud800b", "pair": "\\ud83d\\ude42"}\n')
    [row] = opened(tmp_path).rows()
    assert row.fields == {"prompt": "a\ufffdb", "pair": "🙂"}


@pytest.mark.parametrize(
    ("values", "kind", "stored"),
    [
        ([1, None, 2], pa.int64(), [1, None, 2]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([True, None], pa.bool_(), [True, None]),
        ([None, None], pa.null(), [None, None]),
        ([True, 1], pa.string(), ["true", "1"]),
        (["a", 1, None], pa.string(), ["a", "1", None]),
        (["a", {"b": [1, "ü"]}], pa.string(), ["a", '{"b": [1, "ü"]}']),
        ([2**53 + 1, 0.5], pa.string(), [str(2**53 + 1), "0.5"]),
        ([2**63], pa.string(), [str(2**63)]),
        ([[1], [], [2.5]], pa.list_(pa.float64()), [[1.0], [], [2.5]]),
        ([[1, "a"]], pa.list_(pa.string()), [["1", "a"]]),
        ([{}], pa.string(), ["{}"]),
        (
            [{"a": 1}, {"b": "x"}, None],
            pa.struct([("a", pa.int64()), ("b", pa.string())]),
            [{"a": 1, "b": None}, {"a": None, "b": "x"}, None],
        ),
        ([{"a": 1}, [1]], pa.string(), ['{"a": 1}', "[1]"]),
    ],
)
def test_json_types_unite_or_fall_back_to_text(tmp_path, values, kind, stored):
    write_jsonl(tmp_path / "a.jsonl", [{"v": value} for value in values])
    source = opened(tmp_path)
    schema = source.schema()
    assert schema.field("v").type == kind
    assert pa.Table.from_batches(batches(source, schema)).column("v").to_pylist() == stored


def test_a_field_that_appears_late_is_in_the_schema(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"a": 1}] * 2000 + [{"a": 2.5, "late": "x"}])
    schema = opened(tmp_path).schema()
    assert schema == pa.schema([("a", pa.float64()), ("late", pa.string())])


def test_parquet_text_that_is_not_utf8_is_that_rows_error(tmp_path):
    raw = pa.array([b"fine", b"b\xff\xfed", b"fine too"], pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"id": [1, 2, 3], "prompt": text}), tmp_path / "a.parquet")
    source = opened(tmp_path)
    rows = list(source.rows(["prompt"]))
    assert [row.fields.get("prompt") for row in rows] == ["fine", None, "fine too"]
    assert [row.error is None for row in rows] == [True, False, True]
    assert "row 1" in rows[1].error
    assert "UTF-8" in rows[1].error
    assert [o["prompt"] for o in objects(source)] == ["fine", "b\ufffd\ufffdd", "fine too"]


@pytest.mark.parametrize("dictionary", [True, False])
def test_large_cells_are_read_a_few_at_a_time(tmp_path, dictionary):
    """200 cells of 1 MiB in one row group: 200 MiB if they were read as other rows are."""
    cells = [("x" if dictionary else chr(65 + i % 50)) * (1 << 20) for i in range(200)]
    path = tmp_path / "large.parquet"
    table = pa.table({"prompt": cells})
    # A page is the least that can be read: small batches make small pages.
    pq.write_table(table, path, row_group_size=200, use_dictionary=dictionary, write_batch_size=4)
    del table
    del cells
    source = opened(path)
    before = pa.total_allocated_bytes()
    peak = 0
    tracemalloc.start()
    try:
        for row in source.rows(["prompt"]):
            assert len(row.fields["prompt"]) == 1 << 20
            peak = max(peak, pa.total_allocated_bytes() - before)
        assert row.index == 199
        python_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 3 * BATCH_BYTES
    assert python_peak <= 3 * BATCH_BYTES
