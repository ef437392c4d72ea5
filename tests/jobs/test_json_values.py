"""Whatever JSON can say goes through a source and into Parquet, and nothing is lost on the way."""

import json
import math

import polars
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.jobs.rows.source import open_source
from tests.jobs.reading import batches
from tests.jobs.reading import objects as objects_of

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.integers() | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | text
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from("abc") | text, inner, max_size=4)
    ),
    max_leaves=12,
)
names = st.sampled_from(["prompt", "a", "b", ""]) | text
records = st.lists(st.dictionaries(names, values, max_size=4), min_size=1, max_size=12)


def same(stored, value, kind):
    """Whether a Parquet cell of this type holds a JSON value."""
    if value is None:
        return stored is None
    if pa.types.is_string(kind) and not isinstance(value, str):
        return json.loads(stored) == value
    if pa.types.is_list(kind):
        return len(stored) == len(value) and all(
            same(s, v, kind.value_type) for s, v in zip(stored, value, strict=True)
        )
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return set(value) <= set(fields) and all(
            same(stored[name], value.get(name), fields[name]) for name in fields
        )
    if pa.types.is_floating(kind):
        return math.copysign(1, stored) == math.copysign(1, value) and stored == value
    return type(stored) is type(value) and stored == value


@given(records)
@settings(max_examples=80, deadline=None)
def test_any_json_objects_survive(tmp_path_factory, objects):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(o, ensure_ascii=len(o) % 2 == 0) + "\n" for o in objects))
    source = open_source([path], "jsonl")
    assert [row.fields for row in source.rows()] == objects
    assert [json.dumps(o) for o in objects_of(source)] == [json.dumps(o) for o in objects]

    schema = source.schema()
    parquet = path.with_suffix(".parquet")
    table = pa.Table.from_batches(batches(source, schema), schema)
    # As in an export there is always a column more: without any, Arrow forgets how many rows.
    pq.write_table(table.append_column("answer column", pa.array(range(len(objects)))), parquet)
    stored = pq.read_table(parquet).drop_columns("answer column")
    assert stored.num_rows == len(objects)
    assert stored.column_names == list(dict.fromkeys(name for o in objects for name in o))
    for i, field in enumerate(stored.schema):
        cells = stored.column(i).to_pylist()
        for cell, o in zip(cells, objects, strict=True):
            assert same(cell, o.get(field.name), field.type), (cell, o, field)


def stored(tmp_path, text):
    """The rows of a JSON text as Parquet has them, written and read again."""
    path = tmp_path / "x.json"
    path.write_text(text)
    source = open_source([path], "jsonl")
    schema = source.schema()
    table = pa.Table.from_batches(batches(source, schema), schema)
    pq.write_table(table, tmp_path / "x.parquet", use_compliant_nested_type=False)
    assert [row.fields for row in source.rows()] == objects_of(source)
    return pq.read_table(tmp_path / "x.parquet")


def test_what_json_does_not_have_is_null_in_every_column(tmp_path):
    table = stored(
        tmp_path,
        '[{"only": NaN, "whole": 1, "far": 1.5, "list": [1e400, -Infinity], "in": {"x": NaN}},'
        ' {"only": Infinity, "whole": NaN, "far": -1e400, "list": [2], "in": {"x": 5}}]',
    )
    assert table.to_pylist() == [
        {"only": None, "whole": 1, "far": 1.5, "list": [None, None], "in": {"x": None}},
        {"only": None, "whole": None, "far": None, "list": [2], "in": {"x": 5}},
    ]
    assert table.schema.field("whole").type == pa.int64()


def test_what_is_nested_deeper_than_readers_of_parquet_go_is_json(tmp_path):
    deep = "[" * 60 + "1.10" + "]" * 60
    value = stored(tmp_path, '{"d": ' + deep + "}")["d"].to_pylist()[0]
    assert len(polars.read_parquet(tmp_path / "x.parquet")) == 1
    levels = 0
    while isinstance(value, list):
        [value], levels = value, levels + 1
    assert (levels, value) == (32, deep[32:-32])
