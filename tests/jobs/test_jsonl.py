"""JSON Lines beyond what every source does: any objects at all, and odd files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import InputError
from jobs.jsonl import JsonlSource
from jobs.row import valid_text


def jsonl(path, *lines):
    path.write_bytes(
        b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines)
    )
    return JsonlSource([path])


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
    assert list(source.objects()) == records
    table = pa.Table.from_batches(source.batches(source.schema()), source.schema())
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


def test_lone_surrogates_are_mended_in_names_and_batches_and_kept_in_objects(tmp_path):
    line = b'{"prompt": "x\\ud83d", "ok": "\\ud83d\\ude00", "k\\udc00": ["\\uDFFF"]}'
    source = jsonl(tmp_path / "x.jsonl", line)
    expected = {"prompt": "x\ufffd", "ok": "😀", "k\ufffd": ["\ufffd"]}
    assert [row.fields for row in source.rows()] == [expected]
    (batch,) = source.batches(source.schema())
    assert batch.to_pylist() == [expected]
    assert list(source.objects()) == [json.loads(line)]


def test_an_object_with_ever_new_keys_does_not_become_a_type(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", *[{"v": {f"k{i}": i}} for i in range(1500)])
    assert source.schema().field("v").type == pa.string()


def test_text_and_other_content_of_messages_stay_in_one_list_type(tmp_path):
    source = jsonl(
        tmp_path / "x.jsonl",
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    )
    batch = pa.Table.from_batches(source.batches(source.schema()))
    assert [row[0]["content"] for row in batch["messages"].to_pylist()] == [
        "hi",
        '[{"type": "text", "text": "hi"}]',
    ]


def test_an_endless_line_is_an_error_instead_of_all_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.jsonl._MAX_LINE", 1000)
    with pytest.raises(InputError, match=r"line 2 of .* is longer than"):
        jsonl(tmp_path / "x.jsonl", {"prompt": "a"}, {"prompt": "a" * 1000})


@pytest.mark.parametrize("text", ['[{"p": "a"},\n{"p": "b"}]', '{\n"p": "a"\n}', "just text\n"])
def test_json_that_is_not_lines_is_told_what_to_do(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match="no JSON object in the first") as refused:
        JsonlSource([path])
    assert "jq" in refused.value.hint


def test_an_empty_part_among_others_is_fine(tmp_path):
    parts = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for path, text in zip(parts, ['{"p": 1}\n', "", '{"p": 2}'], strict=True):
        path.write_text(text)
    source = JsonlSource(parts)
    assert [(row.index, row.fields) for row in source.rows()] == [(0, {"p": 1}), (1, {"p": 2})]
    assert source.count() == 2


def test_the_columns_of_the_first_100_rows_in_order_of_appearance(tmp_path):
    rows = [{"b": 1, "a": 2}, {"c": 3, "a": 4}, *[{"a": 0}] * 98, {"late": 1}]
    assert jsonl(tmp_path / "x.jsonl", *rows).column_names == ["b", "a", "c"]
