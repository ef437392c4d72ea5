"""Parquet files whose schemas differ: one input where that changes no value, else refused."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.jsonable import json_values
from batchrun.jobs.rows.row import BATCH_BYTES
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.rows.unify import cast, unite
from tests.jobs.reading import batches, objects

EXACT = 1 << 53
WORD = pa.dictionary(pa.int32(), pa.string())


def written(folder, *tables, **options):
    """A file of each table, in order."""
    paths = [folder / f"{i}.parquet" for i in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        pq.write_table(table, path, **options)
    return paths


def column(kind, *values, name="x"):
    return pa.table([pa.array(list(values), kind)], names=[name])


def opened(folder, *tables, **options):
    return open_source(written(folder, *tables, **options), "parquet")


def stored(source):
    return pa.Table.from_batches(batches(source, source.schema()), source.schema())


def values(source):
    return [row.fields for row in source.rows()]


def struct(**types):
    return pa.struct(list(types.items()))


# None where what Arrow reads back of the two depends on its version.
UNITED = [
    (pa.null(), pa.string(), pa.string()),
    (pa.null(), pa.int16(), pa.int16()),
    (pa.null(), pa.list_(struct(a=pa.int8())), pa.list_(struct(a=pa.int8()))),
    (pa.string(), pa.large_string(), pa.large_string()),
    (pa.string(), WORD, pa.string()),
    (pa.large_string(), WORD, pa.large_string()),
    (pa.dictionary(pa.int8(), pa.string()), WORD, None),
    (pa.int32(), pa.int64(), pa.int64()),
    (pa.int8(), pa.uint8(), pa.int16()),
    (pa.uint32(), pa.int32(), pa.int64()),
    (pa.uint16(), pa.uint64(), pa.uint64()),
    (pa.uint64(), pa.int8(), pa.int64()),
    (pa.float32(), pa.float64(), pa.float64()),
    (pa.float16(), pa.float32(), pa.float32()),
    (pa.int32(), pa.float32(), pa.float64()),
    (pa.int64(), pa.float16(), pa.float64()),
    (pa.decimal128(5, 2), pa.decimal128(9, 4), pa.decimal128(9, 4)),
    (pa.decimal128(38, 2), pa.decimal128(38, 10), pa.decimal256(46, 10)),
    (pa.timestamp("ms"), pa.timestamp("ns"), pa.timestamp("ns")),
    (pa.timestamp("ms", "UTC"), pa.timestamp("us", "UTC"), pa.timestamp("us", "UTC")),
    (pa.duration("s"), pa.duration("us"), pa.duration("us")),
    (pa.time32("ms"), pa.time64("ns"), pa.time64("ns")),
    (pa.binary(), pa.large_binary(), pa.large_binary()),
    (pa.binary(2), pa.binary(3), pa.binary()),
    (pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.large_list(pa.int64())),
    (pa.list_(pa.int32(), 2), pa.list_(pa.int32(), 3), pa.list_(pa.int32())),
    (pa.list_(pa.null()), pa.list_(pa.string()), pa.list_(pa.string())),
    (struct(a=pa.int8(), b=pa.bool_()), struct(c=pa.date32(), b=pa.bool_()), None),
    (pa.map_(pa.string(), pa.int32()), pa.map_(pa.large_string(), pa.int64()), None),
]
REFUSED = [
    (pa.bool_(), pa.int8()),
    (pa.string(), pa.int64()),
    (pa.string(), pa.binary()),
    (pa.string(), pa.timestamp("us")),
    (pa.timestamp("us"), pa.timestamp("us", "UTC")),
    (pa.timestamp("us", "Europe/Berlin"), pa.timestamp("us", "UTC")),
    (pa.timestamp("us"), pa.date32()),
    (pa.decimal128(5, 2), pa.int32()),
    (pa.decimal128(5, 2), pa.float64()),
    (pa.decimal256(76, 2), pa.decimal256(76, 10)),
    (pa.duration("s"), pa.int64()),
    (pa.list_(pa.int32()), pa.int32()),
    (pa.list_(pa.string()), pa.list_(pa.int32())),
    (pa.list_(pa.int32()), pa.map_(pa.int32(), pa.int32())),
    (struct(a=pa.int32()), pa.string()),
    (struct(a=pa.bool_()), struct(a=pa.int32())),
    (WORD, pa.int32()),
]
# Of every type above: a few values, in the order of the first type that fits.
EXAMPLES = [
    (pa.types.is_null, [None]),
    (pa.types.is_boolean, [True]),
    (pa.types.is_integer, [0, 1, 127]),
    (pa.types.is_float16, [np.float16(0.5), np.float16(-2)]),
    (pa.types.is_floating, [0.5, -1e30, float("inf")]),
    (pa.types.is_decimal, [0, 12, -3]),
    (pa.types.is_duration, [0, 1, -1]),
    (pa.types.is_temporal, [0, 1, 86_399]),
    (pa.types.is_fixed_size_binary, None),
    (lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind), [b"", b"\xff"]),
]


def examples(kind):
    if pa.types.is_dictionary(kind):
        return examples(kind.value_type)
    if pa.types.is_map(kind):
        keys, items = examples(kind.key_type), examples(kind.item_type)
        return [list(zip(filter(None, keys), items, strict=False)), [], None]
    if pa.types.is_struct(kind):
        fields = {field.name: examples(field.type) for field in kind}
        return [{name: found[0] for name, found in fields.items()}, None]
    if pa.types.is_nested(kind):
        size = getattr(kind, "list_size", None)
        items = examples(kind.value_type)
        return [(items * 3)[:size], *([] if size else [None])]  # older Arrow can't read it back
    if pa.types.is_fixed_size_binary(kind):
        return [b"\x00" * kind.byte_width, None]
    found = next((some for fits, some in EXAMPLES if fits(kind)), ["a", "", "ü"])
    return [*found, None]


def same(found, expected):
    """Whether a value is the one it was: fields more are null, fractions have digits more."""
    if isinstance(expected, dict) and found is not None:
        return found.keys() >= expected.keys() and all(
            same(value, expected.get(name)) for name, value in found.items()
        )
    if isinstance(expected, list) and found is not None:
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, str) and re.match("[-+]?[0-9]", expected):
        return without_zeros(found) == without_zeros(expected)
    return found == expected and (found is None) == (expected is None)


def without_zeros(text):
    whole, point, rest = text.partition(".")
    fraction, zone = re.fullmatch(r"(\d*)(.*)", rest).groups()
    return (whole, fraction.rstrip("0"), zone) if point else (whole, "", "")


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("was", "now", "united"), UNITED, ids=str)
def test_types_that_differ_harmlessly_are_one(tmp_path, was, now, united, swapped):
    tables = [column(kind, *examples(kind)) for kind in ([now, was] if swapped else [was, now])]
    source = opened(tmp_path, *tables)
    if united is not None:
        assert source.schema().field("x").type == united
    expected = [cell for table in tables for cell in json_values(table["x"].combine_chunks())]
    found = [fields["x"] for fields in values(source)]
    assert same(found, expected), (found, expected)
    assert json_values(stored(source)["x"].combine_chunks()) == found
    assert [o["x"] for o in objects(source)] == found


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("was", "now"), REFUSED, ids=str)
def test_types_that_no_type_holds_are_refused(tmp_path, was, now, wrap, swapped):
    kinds = [now, was] if swapped else [was, now]
    if wrap:
        kinds = [pa.list_(struct(y=kind)) for kind in kinds]
    paths = written(tmp_path, *(column(kind, None) for kind in kinds))
    with pytest.raises(
        InputError, match=r"the Parquet files differ in their columns: 'x"
    ) as refused:
        open_source(paths, "parquet")
    message = str(refused.value)
    assert str(paths[0]) in message
    assert str(paths[1]) in message
    assert "separate jobs" in refused.value.hint
    if not pa.types.is_nested(was) and not wrap:
        first, second = (kind.value_type if kind == WORD else kind for kind in kinds)
        assert message.endswith(f"'x' is {first} in {paths[0]}, {second} in {paths[1]}")
    if wrap:
        assert "'x.y" in message


def test_views_become_what_they_are_views_of():
    assert unite(pa.string_view(), pa.string()) == pa.string()
    assert unite(pa.binary_view(), pa.large_binary()) == pa.large_binary()
    assert unite(pa.list_view(pa.int8()), pa.list_(pa.int64())) == pa.list_(pa.int64())
    views = pa.ListViewArray.from_arrays([3, 0], [1, 2], pa.array([7, 8, None, 9], pa.int8()))
    assert cast(views, pa.large_list(pa.int64())).to_pylist() == [[9], [7, 8]]


@pytest.mark.parametrize(("low", "length"), [(0, 3), (1, 2), (2, 1)])
def test_lists_of_one_size_become_lists(low, length):
    cells = [[{"a": 1}, None], None, [{"a": 2}, {"a": 3}]]
    array = pa.array(cells, pa.list_(struct(a=pa.int8()), 2)).slice(low, length)
    to = unite(array.type, pa.list_(struct(b=pa.bool_(), a=pa.int64())))
    assert to == pa.list_(struct(a=pa.int64(), b=pa.bool_()))
    found = cast(array, to)
    found.validate(full=True)
    assert same(found.to_pylist(), cells[low : low + length])


def test_lists_of_lists_of_one_size_of_nothing():
    array = pa.array([[[None, None]], None], pa.list_(pa.list_(pa.null(), 2)))
    to = pa.large_list(array.type.value_type)  # which Arrow's own cast makes an invalid array of
    assert cast(array, to).to_pylist() == array.to_pylist()
    array.validate(full=True)


def test_the_files_named_are_those_that_differ(tmp_path):
    tables = [column(kind, None) for kind in (pa.null(), pa.int8(), pa.int64(), pa.string())]
    paths = written(tmp_path, *tables)
    with pytest.raises(InputError) as refused:
        open_source(paths, "parquet")
    assert str(refused.value).endswith(f"'x' is int8 in {paths[1]}, string in {paths[3]}")


class TestProof:
    """Integers beside floats, and whatever else is exact up to a value only."""

    @pytest.mark.parametrize("numbers", [[EXACT, -EXACT, None], [None], []])
    @pytest.mark.parametrize("order", [1, -1])
    def test_integers_that_a_double_holds(self, tmp_path, numbers, order):
        tables = [column(pa.int64(), *numbers), column(pa.float64(), 0.5)][::order]
        source = opened(tmp_path, *tables)
        assert source.schema().field("x").type == pa.float64()
        expected = [x for table in tables for x in table["x"].to_pylist()]
        assert [fields["x"] for fields in values(source)] == expected

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize(
        ("kind", "value", "other"),
        [
            (pa.int64(), EXACT + 1, pa.float64()),
            (pa.int64(), -EXACT - 1, pa.float64()),
            (pa.int64(), -(1 << 63), pa.float16()),
            (pa.uint64(), (1 << 64) - 1, pa.float32()),
            (pa.uint64(), 1 << 63, pa.int64()),
            (pa.timestamp("ms"), 253_402_300_799_000, pa.timestamp("ns")),
            (pa.timestamp("us", "UTC"), -(1 << 62), pa.timestamp("ns", "UTC")),
            (pa.duration("s"), 1 << 40, pa.duration("ns")),
        ],
        ids=str,
    )
    def test_a_value_that_the_wider_type_does_not_hold(self, tmp_path, kind, value, other, order):
        good, bad = column(kind, 1, None), column(kind, 1, value)
        third = column(other, None)
        source = opened(tmp_path, *[good, good, third][::order])
        assert len(values(source)) == 5
        paths = written(tmp_path, *[good, bad, third][::order])
        with pytest.raises(InputError, match="differ in their columns: 'x' is ") as refused:
            open_source(paths, "parquet")
        message, last = str(refused.value), paths[::order][2]
        assert f"{kind} in {paths[1]}, {other} in {last}" in message
        assert f"{paths[1]} has the value {value}, but" in message

    @pytest.mark.parametrize("inside", [False, True])
    def test_without_statistics_nothing_is_proved(self, tmp_path, inside):
        def kind(of):
            return pa.list_(struct(skip=pa.string(), y=of)) if inside else of

        cells = [[{"skip": "z", "y": 3}]] if inside else [3]
        tables = [column(kind(pa.int64()), *cells), column(kind(pa.float64()), None)]
        assert len(values(opened(tmp_path, *tables))) == 2
        paths = written(tmp_path, *tables, write_statistics=False)
        message = f"int64 in {paths[0]}, double in {paths[1]}, and {paths[0]} has no statistics"
        with pytest.raises(InputError, match=re.escape(message)) as refused:
            open_source(paths, "parquet")
        assert ("'x.y' is" in str(refused.value)) == inside

    def test_each_row_group_is_looked_at(self, tmp_path):
        numbers = [*range(20), EXACT + 2]
        tables = [column(pa.int64(), *numbers), column(pa.float64(), 0.5)]
        with pytest.raises(InputError, match=f"has the value {EXACT + 2},"):
            opened(tmp_path, *tables, row_group_size=7)


class TestColumns:
    def test_order_is_the_first_file_s_then_that_of_appearance(self, tmp_path):
        source = opened(
            tmp_path,
            pa.table({"b": [1], "a": ["x"]}),
            pa.table({"z": [2.5], "a": ["y"], "b": [2]}),
            pa.table({"k": [True], "z": [0.5]}),
        )
        assert source.column_names == ["b", "a", "z", "k"]
        assert values(source) == [
            {"b": 1, "a": "x", "z": None, "k": None},
            {"b": 2, "a": "y", "z": 2.5, "k": None},
            {"b": None, "a": None, "z": 0.5, "k": True},
        ]
        assert stored(source).to_pylist() == values(source)
        assert [row.fields for row in source.rows(["k", "a"], 2)] == [
            {"k": None, "a": "x"},
            {"k": None, "a": "y"},
        ]

    def test_a_column_of_other_files_is_null_in_every_row(self, tmp_path):
        first = pa.table({"a": range(1000)})
        source = opened(tmp_path, first, pa.table({"b": ["x"]}), row_group_size=300)
        rows = list(source.rows(["b"]))
        assert [row.index for row in rows] == list(range(1001))
        assert [row.fields["b"] for row in rows] == [None] * 1000 + ["x"]

    def test_files_without_rows_join_in(self, tmp_path):
        none = pa.table({"a": pa.array([], pa.null()), "late": pa.array([], pa.int8())})
        source = opened(tmp_path, none, pa.table({"a": ["x"]}))
        assert values(source) == [{"a": "x", "late": None}]
        assert source.schema().field("a").type == pa.string()
        with pytest.raises(InputError, match="has no rows"):
            opened(tmp_path, none, pa.table({"a": pa.array([], pa.string())}))

    def test_what_may_be_null_in_one_file_may_be_null(self, tmp_path):
        must = pa.schema([pa.field("a", pa.int8(), nullable=False)])
        may = pa.schema([pa.field("a", pa.int8())])
        table = pa.table([pa.array([1], pa.int8())], must)
        assert stored(opened(tmp_path, table, table)).schema == must
        assert not opened(tmp_path, table, table).schema().field("a").nullable
        for tables in ([table, table.cast(may)], [table, pa.table({"b": [1]})]):
            assert opened(tmp_path, *tables).schema().field("a").nullable

    def test_messages_of_which_some_have_tool_calls(self, tmp_path):
        plain = [{"role": "user", "content": "hi"}]
        call = [{"id": "1", "function": {"name": "f", "arguments": None}}]
        tools = [{"content": None, "role": "assistant", "tool_calls": call}]
        null = [{"role": "user", "content": "yo", "tool_calls": None}]
        plain_type = struct(role=pa.string(), content=pa.string())
        source = opened(
            tmp_path,
            column(pa.list_(plain_type), plain, name="messages"),
            *(pa.table({"messages": [m]}) for m in (tools, null)),
        )
        found = [fields["messages"] for fields in values(source)]
        assert found == [[{"tool_calls": None} | m[0]] for m in (plain, tools, null)]
        assert list(found[1][0]) == ["role", "content", "tool_calls"]

    def test_names_that_differ_in_case_only_are_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"'Prompt' is missing in .*0\.parquet") as refused:
            opened(tmp_path, pa.table({"prompt": ["a"]}), pa.table({"Prompt": ["a"]}))
        assert refused.value.hint == "'prompt' and 'Prompt' differ only in case: rename one"
        both = pa.table({"prompt": ["a"], "Prompt": ["b"]})
        assert values(opened(tmp_path, both, pa.table({"prompt": ["c"]})))[1]["Prompt"] is None

    def test_two_columns_of_one_name_in_a_later_file(self, tmp_path):
        twice = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
        with pytest.raises(InputError, match=r"1\.parquet has more than one column named 'a'"):
            opened(tmp_path, pa.table({"a": [1]}), twice)

    def test_fields_inside_of_one_name_stay_where_they_are_the_same(self, tmp_path):
        def table(number, kind):
            fields = [pa.array([1], pa.timestamp("us")), pa.array(["z"])]
            twice = pa.StructArray.from_arrays(fields, names=["a", "a"])
            return pa.table({"s": twice, "x": pa.array([number], kind)})

        source = opened(tmp_path, table(1, pa.int64()), table(0.5, pa.float64()))
        assert values(source) == [{"s": {"a": "z"}, "x": 1.0}, {"s": {"a": "z"}, "x": 0.5}]

    def test_metadata_is_the_first_file_s_where_it_describes_the_columns(self, tmp_path):
        metadata = {"pandas": "{}", "huggingface": "{}", "made": "here"}
        schema = pa.schema([pa.field("a", pa.int8(), metadata={"unit": "m"})], metadata)
        first = pa.table([pa.array([1], pa.int8())], schema)
        same_fields = pa.table({"a": pa.array([None], pa.null())})
        assert opened(tmp_path, first, same_fields).schema().metadata == {
            key.encode(): text.encode() for key, text in metadata.items()
        }
        source = opened(tmp_path, first, pa.table({"a": [1 << 40]}))
        assert source.schema().metadata == {b"made": b"here"}
        assert source.schema().field("a").metadata == {b"unit": b"m"}


def test_columns_that_are_not_asked_for_are_not_read(tmp_path):
    tables = [
        pa.table({"a": pa.array([1], pa.int8())}),
        pa.table({"big": ["x" * 99] * 9, "a": range(9)}),
    ]
    paths = written(tmp_path, *tables, compression="none", use_dictionary=False)
    data = bytearray(paths[1].read_bytes())
    data[4:400] = b"\xff" * 396  # inside of `big`, which is first
    paths[1].write_bytes(data)
    source = open_source(paths, "parquet")
    assert [row.fields["a"] for row in source.rows(["a"])] == [1, *range(9)]
    with pytest.raises(InputError, match="damaged"):
        list(source.rows(["big"]))


def test_batches_stay_small_where_a_dictionary_becomes_plain(tmp_path):
    cells = [f"{i % 2}" * 400_000 for i in range(300)]
    words = pa.table({"x": pa.array(cells).dictionary_encode()})
    source = opened(tmp_path, words, column(pa.string(), "plain"))
    read = batches(source, source.schema())
    assert max(batch.nbytes for batch in read) <= BATCH_BYTES
    assert [cell for batch in read for cell in batch["x"].to_pylist()] == [*cells, "plain"]


def test_a_cast_that_arrow_does_not_have_is_found_before_the_job_starts(tmp_path, monkeypatch):
    def missing(array, to):
        raise pa.ArrowNotImplementedError("no such cast")

    paths = written(tmp_path, column(pa.int8(), 1), column(pa.int16(), 1))
    monkeypatch.setattr("batchrun.jobs.rows.united.cast", missing)
    with pytest.raises(
        InputError, match=r"'x' is int8 in .*0\.parquet, which can't be read as int16"
    ):
        open_source(paths, "parquet")


def test_a_file_that_changes_after_opening_does_not_change_values(tmp_path):
    paths = written(tmp_path, column(pa.int64(), 1), column(pa.float64(), 0.5))
    source = open_source(paths, "parquet")
    pq.write_table(column(pa.int64(), EXACT + 1), paths[0])
    with pytest.raises(InputError, match=str(EXACT + 1)):
        list(source.rows())


FAMILIES = [
    [pa.int8(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64(), pa.float16(), pa.float64()],
    [pa.string(), pa.large_string(), WORD, pa.binary(), pa.binary(2)],
    [pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("ns"), pa.timestamp("ns", "UTC")],
    [pa.duration("s"), pa.duration("ns"), pa.time32("ms"), pa.time64("us"), pa.date32()],
    [pa.decimal128(5, 2), pa.decimal128(20, 0), pa.decimal128(38, 30), pa.bool_()],
]
SHAPES = st.recursive(
    st.sampled_from(FAMILIES).map(lambda family: ("leaf", family)),
    lambda inner: st.one_of(
        inner.map(lambda shape: ("list", shape)),
        inner.map(lambda shape: ("map", shape)),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3).map(
            lambda fields: ("struct", fields)
        ),
    ),
    max_leaves=4,
)


@st.composite
def types_of(draw, shape):
    """A type of a shape, with some fields and any width."""
    what, inner = shape
    if draw(st.integers(0, 9)) == 0:
        return pa.null()
    if what == "leaf":
        return draw(st.sampled_from(inner))
    if what == "list":
        # Not those of one size: older Arrow can't read back a null among or around them.
        return draw(st.sampled_from([pa.list_, pa.large_list]))(draw(types_of(inner)))
    if what == "map":
        return pa.map_(draw(st.sampled_from([pa.string(), WORD])), draw(types_of(inner)))
    names = draw(st.lists(st.sampled_from(list(inner)), min_size=1, unique=True))
    return pa.struct([(name, draw(types_of(inner[name]))) for name in names])


def cells_of(kind):
    """Values of a type, with those at its edges."""
    return st.none() | _cells_of(kind)


def _cells_of(kind):  # noqa: PLR0911
    if pa.types.is_null(kind):
        return st.none()
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_struct(kind):
        return st.fixed_dictionaries({field.name: cells_of(field.type) for field in kind})
    if pa.types.is_map(kind):
        return st.lists(st.tuples(st.sampled_from("kl"), cells_of(kind.item_type)), max_size=2)
    if pa.types.is_nested(kind):
        return st.lists(cells_of(kind.value_type), max_size=2)
    if pa.types.is_decimal(kind):
        return st.integers(-9, 9).map(lambda i: i if kind.precision > kind.scale else 0)
    if pa.types.is_floating(kind):
        return st.sampled_from([0.0, -0.5, float("inf")]).map(
            np.float16 if kind.bit_width == 16 else float
        )
    if pa.types.is_fixed_size_binary(kind):
        return st.binary(min_size=2, max_size=2)
    if pa.types.is_binary(kind):
        return st.binary(max_size=3)
    if pa.types.is_integer(kind) or pa.types.is_temporal(kind):
        day = pa.types.is_time(kind)
        bits = 16 if day else kind.bit_width - 1
        edges = [0, 1, EXACT, EXACT + 1, (1 << 63) - 1]
        if pa.types.is_unsigned_integer(kind):
            edges.append((1 << 64) - 1)
            bits += 1
        elif not day:
            edges += [-1, -EXACT - 1, -(1 << 63)]
        return st.sampled_from([e for e in edges if -(1 << bits) <= e < 1 << bits])
    return st.text("xyz", max_size=2)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_two_files_are_refused_or_read_as_they_are(tmp_path_factory, data):
    shape = data.draw(SHAPES)
    arrays = []
    for kind in data.draw(st.lists(types_of(shape), min_size=2, max_size=3)):
        cells = data.draw(st.lists(cells_of(kind), min_size=1, max_size=4))
        arrays.append(pa.array(cells, kind))
    folder = tmp_path_factory.getbasetemp()
    paths = written(folder, *(pa.table([array], names=["x"]) for array in arrays))
    try:
        source = open_source(paths, "parquet")
    except InputError as error:
        assert "differ in their columns: 'x" in str(error)  # noqa: PT017 - or it is no error
        return
    alone = [pq.read_table(path)["x"].combine_chunks() for path in paths]
    expected = [cell for array in alone for cell in json_values(array)]
    found = [fields["x"] for fields in values(source)]
    assert same(found, expected), (found, expected)
    stored(source).validate(full=True)
