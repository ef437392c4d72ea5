"""JSON Lines beyond what every source does: any objects at all, and odd files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.jsonl import JsonSource
from batchrun.jobs.rows.row import valid_text
from batchrun.jobs.rows.store import Part
from tests.jobs.reading import batches, objects


def jsonl(path, *lines):
    path.write_bytes(
        b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines)
    )
    return JsonSource([Part(path)])


def valid(value):
    """What an output has of it: no reader takes lone surrogates."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, list):
        return [valid(item) for item in value]
    if isinstance(value, dict):
        return {valid_text(name): valid(item) for name, item in value.items()}
    return value


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), VALUES), min_size=1, max_size=6))
@settings(max_examples=120, deadline=None)
def test_any_objects_have_a_schema_that_parquet_holds(tmp_path_factory, records):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    source = jsonl(path, *records)
    assert objects(source) == [valid(record) for record in records]
    table = pa.Table.from_batches(batches(source, source.schema()), source.schema())
    assert table.num_rows == len(records)
    if table.num_columns:
        pq.write_table(table, path.with_suffix(".parquet"))
        assert pq.read_table(path.with_suffix(".parquet")).to_pylist() == table.to_pylist()
    for record, row in zip(records, table.to_pylist(), strict=True):
        for name, value in record.items():
            assert (row[name] is None) == (value is None)
            if isinstance(value, str):
                assert row[name] == valid_text(value)
            if isinstance(value, bool) and isinstance(row[name], bool):
                assert row[name] == value
            if isinstance(value, int) and isinstance(row[name], int | float):
                assert row[name] == value


@given(st.text(st.characters()))
@settings(max_examples=100)
def test_valid_text_can_be_encoded_and_leaves_the_rest(text):
    assert valid_text(text).encode().decode() == valid_text(text)
    if not any("\ud800" <= c <= "\udfff" for c in text):
        assert valid_text(text) == text


def test_lone_surrogates_are_mended_everywhere(tmp_path):
    line = b'{"prompt": "x\\ud83d", "ok": "\\ud83d\\ude00", "k\\udc00": ["\\uDFFF"]}'
    source = jsonl(tmp_path / "x.jsonl", line)
    expected = {"prompt": "x\ufffd", "ok": "😀", "k\ufffd": ["\ufffd"]}
    assert [row.fields for row in source.rows()] == [expected]
    (batch,) = batches(source, source.schema())
    assert batch.to_pylist() == [expected]
    assert objects(source) == [expected]


def test_an_object_with_ever_new_keys_does_not_become_a_type(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", *[{"v": {f"k{i}": i}} for i in range(1500)])
    assert source.schema().field("v").type == pa.string()


def test_text_and_other_content_of_messages_stay_in_one_list_type(tmp_path):
    source = jsonl(
        tmp_path / "x.jsonl",
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    )
    batch = pa.Table.from_batches(batches(source, source.schema()))
    assert [row[0]["content"] for row in batch["messages"].to_pylist()] == [
        "hi",
        '[{"type": "text", "text": "hi"}]',
    ]


def test_an_endless_line_is_an_error_instead_of_all_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("batchrun.jobs.rows.jsonl.MAX_RECORD", 1000)
    with pytest.raises(InputError, match=r"line 2 of .* is longer than"):
        jsonl(tmp_path / "x.jsonl", {"prompt": "a"}, {"prompt": "a" * 1000})


def test_json_that_is_not_lines_is_told_what_to_do(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("just text\n")
    with pytest.raises(InputError, match="no JSON object in the first") as refused:
        JsonSource([Part(path)])
    assert "jq" in refused.value.hint


def test_an_empty_part_among_others_is_fine(tmp_path):
    parts = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for path, text in zip(parts, ['{"p": 1}\n', "", '{"p": 2}'], strict=True):
        path.write_text(text)
    source = JsonSource([Part(p) for p in parts])
    assert [(row.index, row.fields) for row in source.rows()] == [(0, {"p": 1}), (1, {"p": 2})]
    assert source.count() == 2


def test_the_columns_of_the_first_100_rows_in_order_of_appearance(tmp_path):
    rows = [{"b": 1, "a": 2}, {"c": 3, "a": 4}, *[{"a": 0}] * 98, {"late": 1}]
    assert jsonl(tmp_path / "x.jsonl", *rows).column_names == ["b", "a", "c"]


LAYOUTS = [
    json.dumps,
    lambda objects: json.dumps(objects, indent=2, ensure_ascii=False),
    lambda objects: "[" + ",\n".join(map(json.dumps, objects)) + "]\n",
    lambda objects: "[\n" + "\n,".join(map(json.dumps, objects)) + "\n]",
    lambda objects: "\n".join(json.dumps(o, indent=1) for o in objects),
    lambda objects: "{\n" + " ".join(json.dumps(o) for o in objects)[1:],
    lambda objects: "\n".join(map(json.dumps, objects)),
]
TEXTS = st.text(st.sampled_from('[]{},:"\\\n ü😀a'), max_size=6)
OBJECTS = st.lists(
    st.dictionaries(
        st.just("p") | TEXTS,
        st.none() | TEXTS | st.lists(TEXTS, max_size=2) | st.dictionaries(TEXTS, TEXTS, max_size=2),
        min_size=1,
        max_size=3,
    ),
    min_size=1,
    max_size=6,
)


@given(OBJECTS, st.sampled_from(LAYOUTS), st.sampled_from([1, 2, 3, 7, 64, 1 << 18]))
@settings(max_examples=300, deadline=None)
def test_every_layout_has_the_same_rows_however_it_is_read(tmp_path_factory, objects, layout, size):
    path = tmp_path_factory.getbasetemp() / "layout.json"
    path.write_text(layout(objects))
    with pytest.MonkeyPatch.context() as patch:
        source = JsonSource([Part(path)])
        patch.setattr("batchrun.jobs.rows.jsonl._READ", size)
        assert [row.fields for row in source.rows()] == objects
        assert [row.index for row in source.rows()] == list(range(len(objects)))
        assert source.count() == len(objects)


def test_a_row_is_named_by_the_line_in_which_it_begins(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[\n {"a": 1},\n\n {"a":\n  oops},\n 5, {"a": 3}\n]\n')
    first, broken, number, last = JsonSource([Part(path)]).rows()
    assert (first.fields, last.fields) == ({"a": 1}, {"a": 3})
    assert broken.error.startswith("line 4 of x.json is not valid JSON")
    assert number.error == "line 6 of x.json is not a JSON object but a number"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[{"a": 1}, {"a": 2}', "cut short"),
        ('[{"a": 1}, {"a": "x', "cut short"),
        ('{\n "a": 1', "cut short"),
        ('[{"a": 1}] {"a": 2}', "goes on after its array ends on line 1"),
    ],
)
def test_a_file_that_does_not_end_as_it_began(tmp_path, text, why):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=why):
        JsonSource([Part(path)]).count()


def test_arrays_as_lines_are_bad_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('[1, 2]\n{"a": 1}\n[3]\n')
    assert [row.error is None for row in JsonSource([Part(path)]).rows()] == [False, True, False]
