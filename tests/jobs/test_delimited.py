"""CSV and TSV: every value as the file has it, a bad record is one bad row."""

import csv
import io

import pandas
import polars
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.jobs.errors import InputError
from batchrun.jobs.journal.results import Result
from batchrun.jobs.output.export import export
from batchrun.jobs.output.joined import Joined
from batchrun.jobs.output.result_reader import ResultReader
from batchrun.jobs.rows.delimited import record_of
from batchrun.jobs.rows.formats import output_format
from batchrun.jobs.rows.source import open_source
from tests.jobs.adding import added_columns
from tests.jobs.reading import objects


def opened(tmp_path, text, name="x.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source([path], "csv")


def fields(source):
    return [row.fields if row.error is None else row.error for row in source.rows()]


def test_every_value_is_text_as_it_stands(tmp_path):
    source = opened(
        tmp_path,
        'id,prompt,x\r\n007,"hi, ""you""\nthere",\r\n1.10,1E5,""\r\n\r\nNA,null, a \r\n',
    )
    assert fields(source) == [
        {"id": "007", "prompt": 'hi, "you"\nthere', "x": None},
        {"id": "1.10", "prompt": "1E5", "x": ""},
        {"id": "NA", "prompt": "null", "x": " a "},
    ]
    assert source.count() == 3
    assert objects(source) == fields(source)
    assert source.schema() == pa.schema([(n, pa.string()) for n in ("id", "prompt", "x")])


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("1,2,3", "has 3 cells, but the header has 2"),
        ("1", "has 1 cells, but the header has 2"),
        ('"a"b,2', "is not valid CSV"),
        (b"\xff,2", "is not valid UTF-8: byte 0xff at byte 1"),
    ],
)
def test_a_bad_record_is_one_bad_row(tmp_path, record, why):
    record = record if isinstance(record, bytes) else record.encode()
    source = opened(tmp_path, b"a,b\n1,2\n" + record + b"\n3,4\n")
    first, bad, last = fields(source)
    assert (first, last) == ({"a": "1", "b": "2"}, {"a": "3", "b": "4"})
    assert bad.startswith(f"line 3 of x.csv {why}")
    assert objects(source)[1] is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no rows"),
        ("a,b\n", "has no rows"),
        ('{"a": 1}\n{"a": 2}\n', "x.csv holds JSON"),
        ("a,a\n1,2\n", "more than one column named 'a'"),
        ('a,b\n1,"x\n2,3\n', "the quote that opens on line 2 is never closed"),
        ("a,b\n1\n2\n", "no record that fits its header in the first 2 rows"),
        (b"\xff,b\n1,2\n", "its header can't be read"),
    ],
)
def test_a_file_that_can_be_no_input(tmp_path, text, why):
    with pytest.raises(InputError, match=why):
        opened(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.tsv", "a\tb,c\n1\t2,5\n"),
        ("X.TSV", "a\tb,c\n1\t2,5\n"),
        ("x.tsv.csv", 'a,bc\n1,"2,5"\n'),
        ("x.csv", "a;b,c\n1;2,5\n".replace("b,c", "bc")),
        ("x.csv", "a\tbc\n1\t2,5\n"),
        ("x.csv", "a|bc\n1|2,5\n"),
        ("x.csv", '"a";"b;c,d"\n1;"2,5"\n'),
        ("x.csv", '"a"\t"b"\n"1"\t"2,5"\n'),
        ("x.csv", '\n\r\n"a"|"b"\n"1"|"2,5"\n'),
    ],
)
def test_the_delimiter_is_the_names_or_the_headers(tmp_path, name, text):
    [row] = fields(opened(tmp_path, text, name))
    assert list(row.values()) == ["1", "2,5"]


def test_a_file_has_the_delimiter_that_its_header_has_most_of(tmp_path):
    source = opened(tmp_path, "id;name, first;x\n1;a,b;2\n")
    assert fields(source) == [{"id": "1", "name, first": "a,b", "x": "2"}]


def test_a_lone_carriage_return_is_text_unless_it_ends_the_header(tmp_path):
    """Python's csv and pandas write it without quotes."""
    text = 'a,b\nx\ry,1\r\n"u\rv\r\nw",\rz\n"",\r\r\n'
    source = opened(tmp_path, text)
    assert fields(source) == [
        {"a": "x\ry", "b": "1"},
        {"a": "u\rv\r\nw", "b": "\rz"},
        {"a": "", "b": None},
    ]
    assert [row["a"] for row in objects(source)] == ["x\ry", "u\rv\r\nw", ""]
    [chunk] = source.chunks()
    records = [record_of(cells, ",") for cells in chunk.cells(["a", "b"], ",")]
    assert records == ['"x\ry",1', '"u\rv\r\nw","\rz"', '"",']
    table = pandas.read_csv(io.BytesIO("\n".join(["a,b", *records]).encode()), dtype=str)
    assert list(table["a"][:2]) == ["x\ry", "u\rv\r\nw"]
    old = opened(tmp_path, 'a,b\r1,"x\ry"\r2,z\r', "old.csv")
    assert fields(old) == [{"a": "1", "b": "x\ry"}, {"a": "2", "b": "z"}]
    assert [record.line for part in old._parts for record in old.records(part)] == [2, 4]


def test_files_with_columns_of_their_own_are_one_input(tmp_path):
    for name, text in (("a.csv", "x,y\n1,2\n"), ("b.csv", "y,z\n3,4\n"), ("c.csv", "y,x,w\n")):
        (tmp_path / name).write_text(text)
    source = open_source([tmp_path / name for name in ("a.csv", "b.csv", "c.csv")], "csv")
    assert source.column_names == ["x", "y", "z", "w"]
    assert [row.fields for row in source.rows(["x", "y"])] == [
        {"x": "1", "y": "2"},
        {"x": None, "y": "3"},
    ]


def write(source, path):
    results = (Result(i, 0, "ok", f'"{i}",\n', (5,), "stop", 1, 1) for i in range(source.count()))
    export(
        Joined(source, ResultReader(results, 1, False), added_columns(token_ids=True)),
        path,
        format=output_format(path),
    )


def test_csv_comes_out_as_it_went_in(tmp_path):
    records = ["007, b ,", '"x, ""y""",1.10,""', "'a,1E5,é"]
    source = opened(tmp_path, "\r\n".join(["id,v,w", *records]) + "\r\n")
    write(source, tmp_path / "o.csv")
    text = (tmp_path / "o.csv").read_bytes().decode()
    assert text.startswith("id,v,w,completion,finish_reason,prompt_tokens,")
    for record in records:
        assert f'\n{record},"""' in text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["completion"] for row in rows] == ['"0",\n', '"1",\n', '"2",\n']
    assert {row["completion_token_ids"] for row in rows} == {"[5]"}
    for read in (pandas.read_csv, polars.read_csv):
        assert len(read(tmp_path / "o.csv")) == 3
    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    assert pyarrow.csv.read_csv(tmp_path / "o.csv", parse_options=options).num_rows == 3


@pytest.mark.parametrize("name", ["o.tsv", "o.parquet", "o.jsonl", "o.csv.gz"])
def test_csv_goes_into_every_format(tmp_path, name):
    source = opened(tmp_path, 'id,v\n007,"a,b"\n1.10,\n')
    write(source, tmp_path / name)
    if name == "o.parquet":
        rows = pq.read_table(tmp_path / name).to_pylist()
    elif name == "o.jsonl":
        rows = polars.read_ndjson(tmp_path / name).to_dicts()
    else:
        separator = "\t" if name == "o.tsv" else ","
        rows = pandas.read_csv(tmp_path / name, sep=separator, dtype=str, keep_default_na=False)
        rows = [{**row, "v": row["v"] or None} for row in rows.to_dict("records")]
    assert [(row["id"], row["v"]) for row in rows] == [("007", "a,b"), ("1.10", None)]


def test_every_format_goes_into_csv(tmp_path):
    table = pa.table(
        {
            "t": ["a\tb", "", None],
            "l": [[1, None], [], None],
            "s": [{"x": "é"}, None, {"x": None}],
            "f": [1.5, float("nan"), None],
            "b": [True, False, None],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    write(open_source([tmp_path / "x.parquet"], "parquet"), tmp_path / "o.csv")
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["t"] for row in rows] == ["a\tb", "", ""]
    assert [row["l"] for row in rows] == ["[1, null]", "[]", ""]
    assert [row["s"] for row in rows] == ['{"x": "é"}', "", '{"x": null}']
    assert [row["f"] for row in rows] == ["1.5", "", ""]
    assert [row["b"] for row in rows] == ["true", "false", ""]
    (tmp_path / "x.jsonl").write_text(
        '{"n": 1.10, "big": 12345678901234567890123, "z": -0}\n{"n": NaN}\n'
    )
    write(open_source([tmp_path / "x.jsonl"], "jsonl"), tmp_path / "p.csv")
    assert (
        (tmp_path / "p.csv")
        .read_text()
        .splitlines()[1]
        .startswith("1.10,12345678901234567890123,-0,")
    )


def test_quotes_where_other_readers_want_none_are_written_anew(tmp_path):
    """Into CSV a record goes as it is, but for a quote inside of a cell that has none around it."""
    source = opened(tmp_path, 'id,v\n007,5" pipe\n"8",say ""hi""\n"9","a ""b"", c"\n')
    [chunk] = source.chunks()
    records = [record_of(cells, ",") for cells in chunk.cells(["id", "v"], ",")]
    assert records == ['007,"5"" pipe"', '8,"say """"hi"""""', '"9","a ""b"", c"']
    text = "\n".join(["id,v", *records]).encode()
    for read in (polars.read_csv, pandas.read_csv, pyarrow.csv.read_csv):
        column = read(io.BytesIO(text))["v"]
        values = column.to_list() if hasattr(column, "to_list") else column.to_pylist()
        assert values == ['5" pipe', 'say ""hi""', 'a "b", c']


cells = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(
    st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6),
    st.sampled_from([",", "\t", ";"]),
)
@settings(max_examples=150, deadline=None)
def test_any_text_survives(tmp_path_factory, records, delimiter):
    path = tmp_path_factory.getbasetemp() / ("x.tsv" if delimiter == "\t" else "x.csv")
    lines = [record_of(record, delimiter) for record in (("a", "b", "c"), *records)]
    path.write_text("\n".join(lines) + "\n", newline="")
    source = open_source([path], "csv")
    assert [tuple(row.fields.values()) for row in source.rows()] == records
