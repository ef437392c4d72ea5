"""JSON that is carried along keeps its text, and every reader takes what comes out."""

import io
import json
import math
import time

import pandas
import polars
import pyarrow.json
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.jobs.rows.jsontext import Number, carried, encode, parse_object


def out(text, taken=()):
    found = carried(text, taken)
    return encode(parse_object(text)) if found is None else found


AS_IT_IS = [
    '{"a": 1.10, "b": 1E5, "c": -0, "d": -0.0, "e": 1e-400}',
    '{"a":0.1000000000000000055511151231257827,"b":12345678901234567.89}',
    '{"a": 9223372036854775807, "b": 18446744073709551615, "c": 1.7976931348623157e308}',
    '{"a": 12345678901234567890123, "b": 0.30000000000000004, "c": 100}',
    '{"a": "\\u00e9\\/\\ud83d\\ude00 1e99", "b\\n": [1.0, {"x": 2.50}]}',
    '{ "a" :\t[ ] , "b" : { } }',
    '{"": null, "t": true}',
]


@pytest.mark.parametrize("text", AS_IT_IS)
def test_what_is_fine_stays_as_it_is(text):
    assert out(text) == text
    assert out(f"  {text}\r\n") == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": NaN, "b": 1.10}', '{"a": null, "b": 1.10}'),
        ('{"a": [Infinity, -Infinity], "b": -0}', '{"a": [null, null], "b": -0}'),
        ('{"a": 1e400, "b": -1E+999, "c": 1E5}', '{"a": null, "b": null, "c": 1E5}'),
        ('{"a": ' + "9" * 400 + "}", '{"a": null}'),
        ('{"a": 1, "a": 2.50}', '{"a": 2.50}'),
        ('{"a": {"x": 1, "x": 1.0}}', '{"a": {"x": 1.0}}'),
        ('{"a": "\\ud800", "b": 1.10}', '{"a": "\ufffd", "b": 1.10}'),
        ('{"a": "\\ud83d\\ud83d\\ude00\\ude00"}', '{"a": "�😀�"}'),
        ('{"a": "\\\\ud83d\\ude00"}', '{"a": "\\\\ud83d�"}'),
        ('{"\\udc00": 1e5}', '{"\ufffd": 1e5}'),
        ('{"a": "NaN", "b": 1e0999}', '{"a": "NaN", "b": null}'),
        ('{\n  "a": "x  y",\r\n  "b": 1.0\n}', '{ "a": "x  y", "b": 1.0 }'),
    ],
)
def test_what_some_reader_refuses_has_one_rule(text, expected):
    assert out(text) == expected


@pytest.mark.parametrize(
    "text", ["[1]", "5", '{"a": 1', "nul", "", '{"a": 01}', '{"a": ' + "[" * 99 + "]" * 99 + "}"]
)
def test_what_is_no_object_is_carried_by_nobody(text):
    assert carried(text) is None
    with pytest.raises(ValueError, match="is n"):
        parse_object(text)


def test_a_name_that_is_taken_is_left_to_the_caller():
    assert carried('{"a": 1.10}', ["a"]) is None
    assert out('{"a": 1.10, "b": -0}', ["a"]) == '{"a": 1.10, "b": -0}'


def test_a_number_is_exact_up_to_17_digits_or_if_a_float_says_the_same():
    exact = {text: Number(text).exact for text in ("1.10", "0.10000000000000001", "1e22", "0.5000")}
    assert all(exact.values())
    assert Number("0." + "50" + "0" * 40).exact
    assert not Number("12345678901234567.89").exact
    assert not Number("0.1000000000000000055511151231257827").exact
    assert not Number("1e400").exact
    assert not Number("1e-400").exact  # a float64 has 0 for it
    assert not Number("4.9406564584124654e-324").exact
    assert all(Number(text).exact for text in ("0.0", "-0e5", "5e-324", "2.5e-310"))


def readers(text):
    """What pyarrow, pandas and polars read: each a list of rows; each raises what it refuses."""
    for line in text.splitlines():
        json.loads(line, parse_constant=pytest.fail)
    return (
        pyarrow.json.read_json(io.BytesIO(text.encode())).to_pylist(),
        pandas.read_json(io.StringIO(text), lines=True).to_dict("records"),
        polars.read_ndjson(io.BytesIO(text.encode())).to_dicts(),
    )


ODD = ["NaN", "Infinity", "-Infinity", "1e400", "-1e999", "9" * 400, "1.10", "1E5", "-0", "null"]
ODD += ["0.1000000000000000055511151231257827", "12345678901234567.89", "1e-400", "0.5"]


@given(st.lists(st.sampled_from(ODD), min_size=1, max_size=5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_reader_takes_every_output_and_reads_the_same(values, twice):
    more = ', "v": 1.5' if twice else ""
    lines = [out(f'{{"id": {i}, "s": "\\ud800", "v": {v}{more}}}') for i, v in enumerate(values)]
    for rows in readers("\n".join(lines) + "\n"):
        assert [row["id"] for row in rows] == list(range(len(values)))
        assert {row["s"] for row in rows} == {"\ufffd"}
        for row, value in zip(rows, values, strict=True):
            wanted = 1.5 if twice else float(value if value != "null" else "nan")
            if math.isfinite(wanted):
                assert row["v"] == pytest.approx(wanted, rel=1e-15)
            else:
                assert row["v"] is None or math.isnan(row["v"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), json_values, max_size=4), st.booleans())
@settings(max_examples=150, deadline=None)
def test_carried_and_encoded_are_the_same_values(record, escaped):
    text = json.dumps(record, ensure_ascii=escaped)
    text = text.encode(errors="replace").decode()  # a file has no lone surrogate but as an escape
    assert text.isascii() or not escaped

    def strict(value):
        return json.loads(value, parse_constant=pytest.fail)

    line = out(text)
    assert "\n" not in line
    assert strict(line) == strict(encode(parse_object(text)))
    line.encode()


def test_blanks_take_no_longer_for_being_many() -> None:
    text = '{"a": 1, \n "b":' + " " * 200_000 + '"' + " " * 200_000 + '"}'
    began = time.thread_time()
    assert carried(text) == text.replace(" \n ", " ")
    assert time.thread_time() - began < 5, "quadratic"
