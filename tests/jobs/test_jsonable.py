"""Arrow's values on their way to JSON: by the type of the column, whatever the value."""

import json
import os
import re
import subprocess
import sys
import textwrap
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.jobs.rows.jsonable import json_values

REPO = Path(__file__).parents[2]
DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def not_utf8(*cells):
    raw = pa.array(cells, pa.binary())
    return pa.StringArray.from_buffers(len(cells), raw.buffers()[1], raw.buffers()[2])


def by_numpy(value, unit):
    """What numpy makes of a time, with the sign and digits of the year that ISO 8601 wants."""
    text = str(np.datetime64(value, unit))
    year, rest = re.fullmatch(r"(-?\d+)(-.*)", text).groups()
    if int(year) < 0:
        return f"{int(year):05d}{rest}"
    return f"{'+' if int(year) > 9999 else ''}{text}"


def maps(keys, values, *rows):
    return pa.array(list(rows), pa.map_(keys, values))


VALUES = {
    "text": (pa.array(["a", None, "ü"]), ["a", None, "ü"]),
    "large text": (pa.array(["a", None], pa.large_string()), ["a", None]),
    "bool": (pa.array([True, None]), [True, None]),
    "uint64": (pa.array([(1 << 64) - 1, None], pa.uint64()), [(1 << 64) - 1, None]),
    "null": (pa.nulls(2), [None, None]),
    "half": (pa.array([np.float16(1.5), None, np.float16("inf")]), [1.5, None, None]),
    "float": (pa.array([0.25, None, float("nan")], pa.float32()), [0.25, None, None]),
    "double": (
        pa.array([0.1, float("-inf"), None, float("nan"), 1e300]),
        [0.1, None, None, None, 1e300],
    ),
    "decimal": (
        pa.array([Decimal("1.10"), None, Decimal("0E-10")], pa.decimal128(20, 10)),
        ["1.1000000000", None, "0.0000000000"],
    ),
    "wide decimal": (pa.array([Decimal(10) ** 60], pa.decimal256(76, 2)), [f"1{'0' * 60}.00"]),
    "date32": (
        pa.array([0, None, -719_529, 2_932_897], pa.date32()),
        ["1970-01-01", None, "-0001-12-31", "+10000-01-01"],
    ),
    "date64": (pa.array([86_400_000, None], pa.date64()), ["1970-01-02", None]),
    "time s": (pa.array([3723], pa.time32("s")), ["01:02:03"]),
    "time ms": (pa.array([3_723_004, None], pa.time32("ms")), ["01:02:03.004", None]),
    "time us": (pa.array([0], pa.time64("us")), ["00:00:00.000000"]),
    "time ns": (pa.array([86_399_999_999_999], pa.time64("ns")), ["23:59:59.999999999"]),
    "stamp s": (pa.array([0, None], pa.timestamp("s")), ["1970-01-01T00:00:00", None]),
    "stamp ms": (pa.array([-1], pa.timestamp("ms")), ["1969-12-31T23:59:59.999"]),
    "stamp us": (pa.array([1_000_000], pa.timestamp("us")), ["1970-01-01T00:00:01.000000"]),
    "stamp ns": (
        pa.array([0, 1], pa.timestamp("ns")),
        ["1970-01-01T00:00:00.000000000", "1970-01-01T00:00:00.000000001"],
    ),
    "stamp far": (
        pa.array([1 << 48, -(1 << 50)], pa.timestamp("ms", "UTC")),
        ["+10889-08-02T05:31:50.656+00:00", "-33709-08-27T01:52:37.376+00:00"],
    ),
    "duration s": (pa.array([90, None, -5], pa.duration("s")), ["90", None, "-5"]),
    "duration ms": (pa.array([-1, 1500], pa.duration("ms")), ["-0.001", "1.500"]),
    "duration ns": (
        pa.array([(1 << 63) - 1, 0], pa.duration("ns")),
        ["9223372036.854775807", "0.000000000"],
    ),
    "binary": (pa.array([b"\x00\xff", None, b""]), ["AP8=", None, ""]),
    "fixed binary": (pa.array([b"ab", None], pa.binary(2)), ["YWI=", None]),
    "dictionary": (pa.array(["x", None, "x"]).dictionary_encode(), ["x", None, "x"]),
    "dictionary of stamps": (
        pa.array([1, None, 1], pa.timestamp("s")).dictionary_encode(),
        ["1970-01-01T00:00:01", None, "1970-01-01T00:00:01"],
    ),
    "runs": (
        pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array([b"a", None])),
        ["YQ==", "YQ==", None],
    ),
    "tensor": (
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), [2]),
            pa.array([[1, float("nan")], None], pa.list_(pa.float32(), 2)),
        ),
        [[1.0, None], None],
    ),
    "map": (
        maps(pa.string(), pa.duration("s"), [("a", 1), ("b", None)], None, []),
        [[["a", "1"], ["b", None]], None, []],
    ),
    "list": (
        pa.array([[1, None], None, []], pa.list_(pa.timestamp("s"))),
        [["1970-01-01T00:00:01", None], None, []],
    ),
    "large list": (pa.array([[b"a"], None], pa.large_list(pa.binary())), [["YQ=="], None]),
    "fixed list": (
        pa.array([[0.5, float("nan")], None], pa.list_(pa.float64(), 2)),
        [[0.5, None], None],
    ),
    "struct": (
        pa.array(
            [{"f": float("nan"), "l": [{"t": 1}]}, None],
            pa.struct([("f", pa.float32()), ("l", pa.list_(pa.struct([("t", pa.time32("s"))])))]),
        ),
        [{"f": None, "l": [{"t": "00:00:01"}]}, None],
    ),
    "no fields": (pa.array([{}, None], pa.struct([])), [{}, None]),
    "same name twice": (
        pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]),
        [{"a": 2}],
    ),
}
if hasattr(pa, "uuid"):
    VALUES["uuid"] = (
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16), None], pa.binary(16))),
        ["00000000-0000-0000-0000-000000000000", None],
    )
if hasattr(pa, "bool8"):
    VALUES["bool8"] = (
        pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, None], pa.int8())),
        [True, False, None],
    )


@pytest.mark.parametrize("name", VALUES)
def test_every_type_has_one_rule(name):
    array, expected = VALUES[name]
    found = json_values(array)
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("wrap", ["slice", "list", "struct"])
def test_the_rule_is_the_same_inside_and_in_a_part(name, wrap):
    array, expected = VALUES[name]
    if wrap == "slice":
        for i in range(len(array)):
            assert json_values(array.slice(i, 1)) == expected[i : i + 1]
            assert json_values(array.slice(i)) == expected[i:]
    elif wrap == "list":
        lists = pa.ListArray.from_arrays(
            [0, 1, 1, len(array)], array, mask=pa.array([False, True, False])
        )
        assert json_values(lists) == [expected[:1], None, expected[1:]]
        assert json_values(lists.slice(2)) == [expected[1:]]
    else:
        structs = pa.StructArray.from_arrays([array], names=["x"])
        assert json_values(structs) == [{"x": value} for value in expected]


@given(INT64, st.sampled_from(["s", "ms", "us", "ns"]))
def test_any_timestamp_is_what_numpy_says(value, unit):
    if value == -(1 << 63):
        value += 1  # numpy's own null
    assert json_values(pa.array([value], pa.timestamp(unit))) == [by_numpy(value, unit)]


@given(
    st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 28)),
    st.sampled_from(["UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kathmandu", "-03:30"]),
)
def test_a_zone_s_times_are_those_of_python(moment, zone):
    array = pa.array([moment.replace(tzinfo=UTC)], pa.timestamp("us", zone))
    [text] = json_values(array)
    assert datetime.fromisoformat(text) == moment.replace(tzinfo=UTC)
    if moment.year > 1:
        assert text == array[0].as_py().isoformat(timespec="microseconds")


def test_zones_have_their_rules_in_years_that_python_does_not_have():
    summer, winter = (
        int(datetime(2024, month, 1, tzinfo=UTC).timestamp()) + 25 * 400 * 31_556_952
        for month in (7, 1)
    )
    assert json_values(pa.array([summer, winter], pa.timestamp("s", "Europe/Berlin"))) == [
        "+12024-07-01T02:00:00+02:00",
        "+12024-01-01T01:00:00+01:00",
    ]
    assert json_values(pa.array([-(10**12)], pa.timestamp("s", "Europe/Berlin")))[0].endswith(
        "+00:53:28"
    )
    assert json_values(pa.array([0], pa.timestamp("ms", "Nowhere/Land"))) == [
        "1970-01-01T00:00:00.000+00:00"
    ]


@given(INT64, st.sampled_from(["s", "ms", "us", "ns"]))
def test_no_duration_loses_anything(value, unit):
    [text] = json_values(pa.array([value], pa.duration(unit)))
    whole, _, fraction = text.partition(".")
    assert len(fraction) == DIGITS[unit]
    assert int(whole + fraction) == value


@given(st.integers(-(1 << 31), (1 << 31) - 1))
def test_any_date_is_what_numpy_says(days):
    assert json_values(pa.array([days], pa.date32())) == [by_numpy(days, "D")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05.000000+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (time(3, 4, 5), "03:04:05.000000"),
        (timedelta(days=-1, microseconds=1), "-86399.999999"),
        (Decimal("1.10"), "1.10"),
        (Decimal("1E+3"), "1000"),
        (b"\x00\xff", "AP8="),
        ({"a": [float("nan"), 1.5]}, {"a": [None, 1.5]}),
        ((1, None), [1, None]),
        (np.float16(1.5), 1.5),
        (np.int8(3), 3),
        (True, True),
    ],
)
def test_a_python_value_has_the_rule_of_its_type(value, expected):
    [found] = json_values(pa.array([value]))
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("wrap", [False, True])
def test_text_that_is_not_utf8(wrap):
    array, expected = not_utf8(b"fine", b"b\xff\xfed", b"too"), ["fine", "b\ufffd\ufffdd", "too"]
    if wrap:
        array = pa.StructArray.from_arrays([array.dictionary_encode()], names=["x"])
        array = pa.ListArray.from_arrays([0, 1, 3], array)
        expected = [[{"x": "fine"}], [{"x": expected[1]}, {"x": "too"}]]
    assert json_values(array, "replace") == expected
    with pytest.raises(UnicodeDecodeError, match="0xff in position 1"):
        json_values(array)
    assert json_values(array.slice(0, 1)) == expected[:1]


def test_pandas_makes_no_difference():
    code = """
        import json, sys, types
        if sys.argv[1] == "with":  # as much of it as pyarrow asks for
            class Stub(types.ModuleType):
                def __getattr__(self, name):
                    return type(name, (), {})
            pandas = Stub("pandas")
            pandas.__version__ = "2.2.3"
            pandas.Timestamp = pandas.Timedelta = lambda *a, **k: "of pandas"
            pandas.api = Stub("pandas.api")
            pandas.api.types = Stub("pandas.api.types")
            pandas.api.extensions = Stub("pandas.api.extensions")
            sys.modules |= {"pandas": pandas, "pandas.api": pandas.api}
            sys.modules["pandas.api.types"] = pandas.api.types
        else:
            class Missing:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] == "pandas":
                        raise ModuleNotFoundError(name)
            sys.meta_path.insert(0, Missing())
        import pyarrow as pa
        from batchrun.jobs.rows.jsonable import json_values
        arrays = [pa.array([0, 1], kind) for kind in (
            pa.timestamp("ns"), pa.timestamp("ns", "Europe/Berlin"), pa.duration("ns"),
            pa.time64("ns"), pa.timestamp("us"))]
        assert (arrays[0][0].as_py() == "of pandas") == (sys.argv[1] == "with")
        print(json.dumps([json_values(array) for array in arrays]))
    """
    outputs = []
    for pandas in ("with", "without"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), pandas],
            cwd=REPO,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout))
    assert outputs[0] == outputs[1]
    assert outputs[0][1] == [
        "1970-01-01T01:00:00.000000000+01:00",
        "1970-01-01T01:00:00.000000001+01:00",
    ]
