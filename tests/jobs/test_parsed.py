"""The columns `parsed`, `parse_error` and `choice_logprob`, in every format."""

import json
from pathlib import Path

import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.jobs.journal.journal import READ
from batchrun.jobs.journal.results import Result
from batchrun.jobs.lease import Lease
from batchrun.jobs.options import OutputSpec, SamplingSpec
from batchrun.jobs.output.export import export
from batchrun.jobs.output.joined import Joined
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.output.result_reader import ResultReader
from batchrun.jobs.output.schematypes import type_of
from batchrun.jobs.output.typed import JsonText, List, Map, Struct
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.verify import verify
from tests.jobs.adding import added_columns
from tests.jobs.reading import objects

FORMATS = ["parquet", "jsonl", "csv"]
ITEM = {"type": "object", "properties": {"name": {"type": "string"}, "price": {"type": "number"}}}
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "items": {"type": "array", "items": ITEM},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "by": {"type": "object", "additionalProperties": {"type": "integer"}},
        "more": {},
    },
    "required": ["id"],
}
JSON = {"json_schema": json.dumps(SCHEMA)}
CHOICES = {"choices": ("no", "yes", "north", "other")}


def ok(text, finish_reason="stop", **more):
    return Result(0, 0, "ok", text, (1,), finish_reason, 3, 2, **more)


def written(folder, kind, results, **options):
    """A file with these results, a row each, and its columns."""
    rows, path = len(results), Path(folder) / f"o.{kind}"
    source = Path(folder) / "in.jsonl"
    source.write_text("".join(f'{{"id": {i}}}\n' for i in range(rows)))
    numbered = (result._replace(row=i) for i, result in enumerate(results))
    joined = Joined(
        open_source([source], "jsonl"),
        ResultReader(numbered, 1, False),
        added_columns(**options),
    )
    assert export(joined, path, format=kind) == rows
    return path


def read(path):
    """The rows; of CSV, null is None and all else text."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return objects(open_source([path], path.suffix[1:]))


def column(folder, kind, results, name="parsed", **options):
    return [row[name] for row in read(written(folder, kind, results, **options))]


class TestJson:
    TEXT = (
        '{"note": "x", "id": 7, "items": [{"name": "a", "price": 1.10}], "by": {"k": 1}, '
        '"more": ["é", 1e5], "extra": true}'
    )

    def test_parquet_has_the_types(self, tmp_path):
        path = written(tmp_path, "parquet", [ok(self.TEXT)], **JSON)
        item = pa.struct([("name", pa.string()), ("price", pa.float64())])
        assert pq.read_schema(path).field("parsed").type == pa.struct(
            [
                ("id", pa.int64()),
                ("items", pa.list_(pa.field("element", item))),
                ("note", pa.string()),
                ("by", pa.map_(pa.string(), pa.int64())),
                ("more", pa.string()),
            ]
        )
        (row,) = read(path)
        assert row["parse_error"] is None
        assert row["parsed"] == {
            "id": 7,
            "items": [{"name": "a", "price": 1.1}],
            "note": "x",
            "by": [("k", 1)],
            "more": '["é", 1e5]',
        }

    def test_json_lines_has_the_value(self, tmp_path):
        path = written(tmp_path, "jsonl", [ok(self.TEXT)], **JSON)
        (line,) = path.read_text().splitlines()
        assert f'"parsed": {self.TEXT}, "parse_error": null' in line

    def test_csv_has_its_json(self, tmp_path):
        (cell,) = column(tmp_path, "csv", [ok(self.TEXT)], **JSON)
        assert cell == self.TEXT

    def test_pandas_and_polars_read_it(self, tmp_path):
        path = written(tmp_path, "parquet", [ok(self.TEXT), ok("{")], **JSON)
        value, none = pandas.read_parquet(path)["parsed"]
        assert (value["id"], value["items"][0]["price"], dict(value["by"])) == (7, 1.1, {"k": 1})
        assert none is None
        frame = polars.read_parquet(path)
        kind = frame.schema["parsed"].to_schema()
        price = polars.Struct({"name": polars.String, "price": polars.Float64})
        assert (kind["id"], kind["items"]) == (polars.Int64, polars.List(price))
        assert frame["parsed"].is_null().to_list() == [False, True]
        assert frame["parsed"].struct.field("id").to_list() == [7, None]

    def test_values_of_other_types_are_columns_of_these(self, tmp_path):
        for schema, text, stored, kind, cell in [
            ({"type": "integer"}, "12", 12, "int64", "12"),
            ({"type": "number"}, "12", 12.0, "double", "12"),
            ({"type": "boolean"}, "true", True, "bool", "true"),
            ({"enum": ["a"]}, '"a"', "a", "string", "a"),
            ({"type": "string"}, '""', "", "string", ""),
            ({"type": "array", "items": {"type": "string"}}, '["a"]', ["a"],
             "list<element: string>", '["a"]'),
            ({"type": "null"}, "null", None, "null", None),
            ({}, '"a"', '"a"', "string", '"a"'),
            ({}, "1.10", "1.10", "string", "1.10"),
            ({}, "null", None, "string", None),
        ]:  # fmt: skip
            options = {"json_schema": json.dumps(schema)}
            path = written(tmp_path, "parquet", [ok(text)], **options)
            assert str(pq.read_schema(path).field("parsed").type) == kind
            (row,) = read(path)
            assert (row["parsed"], row["parse_error"]) == (stored, None)
            assert column(tmp_path, "csv", [ok(text)], **options) == [cell]
            line = written(tmp_path, "jsonl", [ok(text)], **options).read_text()
            assert f'"parsed": {text}, ' in line

    def test_any_object(self, tmp_path):
        results = [ok('{"b": "x", "a": [1.50]}'), ok("[]")]
        for kind in ("parquet", "csv"):
            assert column(tmp_path, kind, results, json_object=True) == [
                '{"b": "x", "a": [1.50]}',
                None,
            ]
        text = written(tmp_path, "jsonl", results, json_object=True).read_text()
        assert '"parsed": {"b": "x", "a": [1.50]},' in text
        assert (
            '"parsed": null, "parse_error": "parsed: expected an object, but found an array' in text
        )

    @pytest.mark.parametrize("kind", FORMATS)
    def test_errors(self, tmp_path, kind):
        results = {
            Result(0, 0, "error", error="bad", error_kind="x"): None,
            Result(0, 0, "error", '{"id": 1}', error="it failed at its end"): None,
            Result(0, 0, "skipped"): None,
            ok('{"id": 1'): "the answer is not valid JSON: Expecting ',' delimiter at character 9",
            ok('{"id": 1', "length"): "the answer was cut off after 2 tokens",
            ok('{"id": 1} x'): "the answer is not valid JSON: Extra data at character 11",
            ok(""): "the answer is not valid JSON: Expecting value at character 1",
            ok('{"id": "1"}'): "parsed.id: expected an integer, but found a string",
            ok('{"id": "1"}', "length"): "parsed.id: expected an integer, but found a string",
            ok('{"id": 1, "items": [{}, {"price": "?"}]}'): (
                "parsed.items[1].price: expected a number, but found a string"
            ),
            ok("{}"): 'parsed: an object without "id", which the schema requires',
            ok('{"id": 1, "more": [1e999]}'): "parsed.more[0]: 1e999 is not a finite 64-bit number",
            ok('{"id": 1, "extra": NaN}'): "parsed.extra: NaN is not a finite 64-bit number",
            ok(f'{{"id": 1, "more": {"[" * 70}{"]" * 70}}}'): (
                "the answer is nested more than 64 levels deep"
            ),
            ok(f'{{"id": {1 << 63}}}'): f"parsed.id: {1 << 63} does not fit in 64 bits",
        }
        assert column(tmp_path, kind, list(results), **JSON) == [None] * len(results)
        found = column(tmp_path, kind, list(results), "parse_error", **JSON)
        assert found == list(results.values())

    @pytest.mark.parametrize("kind", FORMATS)
    def test_an_answer_that_is_whole_counts_though_it_ended_at_the_limit(self, tmp_path, kind):
        """A number may lack digits."""
        results = [ok('{"id": 1}', "length"), ok('"a"', "length"), ok("12", "length")]
        found = column(tmp_path, kind, results, "parse_error", json_schema="{}")
        assert found == [None, None, "the answer was cut off after 2 tokens"]

    @pytest.mark.parametrize("kind", FORMATS)
    def test_text_that_no_encoding_holds(self, tmp_path, kind):
        results = [ok('{"id": 1, "note": "\\ud800", "more": {"\\udc00": "a\ud800"}}')]
        (found,) = column(tmp_path, kind, results, **JSON)
        if kind == "parquet":
            assert (found["note"], found["more"]) == ("\ufffd", '{"\ufffd": "a\ufffd"}')
        else:
            found = json.loads(found) if kind == "csv" else found
            assert (found["note"], found["more"]) == ("\ufffd", {"\ufffd": "a\ufffd"})

        assert column(tmp_path, kind, [ok('"a\ud800"')], json_schema='{"type": "string"}') == [
            "a\ufffd"
        ]

    def test_a_name_is_there_twice(self, tmp_path):
        for kind in ("parquet", "jsonl"):
            (found,) = column(tmp_path, kind, [ok('{"id": 1, "id": 2}')], **JSON)
            assert found["id"] == 2

    def test_odd_names(self, tmp_path):
        names = ["", " ", "a.b", "é", "e\u0301", "element", 'q"', "x" * 300, "list", "\n"]
        schema = {"type": "object", "properties": {name: {"type": "integer"} for name in names}}
        options = {"json_schema": json.dumps(schema)}
        value = {name: i for i, name in enumerate(names)}
        path = written(tmp_path, "parquet", [ok(json.dumps(value))], **options)
        assert read(path)[0]["parsed"] == value
        assert pandas.read_parquet(path)["parsed"][0] == value
        assert polars.read_parquet(path)["parsed"][0] == value
        assert column(tmp_path, "jsonl", [ok(json.dumps(value))], **options) == [value]

    def test_two_thousand_properties(self, tmp_path):
        value = {f"p{i}": i for i in range(2000)}
        schema = {"type": "object", "properties": {name: {"type": "integer"} for name in value}}
        options = {"json_schema": json.dumps(schema)}
        for kind in ("parquet", "jsonl"):
            results = [ok(json.dumps(value)), ok(json.dumps({"p1999": 1}))]
            first, second = column(tmp_path, kind, results, **options)
            assert first == value
            assert {k: v for k, v in second.items() if v is not None} == {"p1999": 1}

    def test_each_answer_is_parsed_once(self, tmp_path, monkeypatch):
        from batchrun.jobs.output import answers  # noqa: PLC0415 - to replace what it calls

        texts, parse = [], answers.parse_value
        monkeypatch.setattr(answers, "parse_value", lambda text: texts.append(text) or parse(text))
        for kind in FORMATS:
            written(tmp_path, kind, [ok('{"id": 1}'), ok('{"id": 1}')], **JSON)
            assert texts == ['{"id": 1}'] * 2
            texts.clear()


class TestChoices:
    RESULTS = (
        ok("yes", logprob=-1.5),
        ok("other", logprob=-0.25),
        ok("oth", "length", logprob=-1.0),
        ok("no", "length", logprob=-1.0),  # or north
        ok("yes", "length", logprob=-2.0),
        ok("maybe", logprob=-3.0),
        Result(0, 0, "error", error="bad"),
        Result(0, 0, "skipped"),
    )
    VALUES = ("yes", "other", None, None, "yes", None, None, None)
    CUT = "the answer was cut off after 2 tokens"
    ERRORS = (None, None, CUT, CUT, None, "the answer is not one of the job's choices", None, None)

    @pytest.mark.parametrize("kind", FORMATS)
    def test_values_and_errors(self, tmp_path, kind):
        rows = read(written(tmp_path, kind, self.RESULTS, **CHOICES))
        assert [row["parsed"] for row in rows] == list(self.VALUES)
        assert [row["parse_error"] for row in rows] == list(self.ERRORS)
        assert "choice_logprob" not in rows[0]

    @pytest.mark.parametrize("kind", FORMATS)
    def test_log_probabilities(self, tmp_path, kind):
        found = column(
            tmp_path, kind, self.RESULTS, "choice_logprob", **CHOICES, choice_logprob=True
        )
        found = [None if value is None else float(value) for value in found]
        assert found == [-1.5, -0.25, None, None, -2.0, None, None, None]

    @pytest.mark.parametrize("results", [RESULTS, RESULTS[5:]])
    def test_readers_see_all_choices_in_the_order_of_the_job(self, tmp_path, results):
        path = written(tmp_path, "parquet", results, **CHOICES)
        assert pq.read_schema(path).field("parsed").type == pa.dictionary(pa.int32(), pa.string())
        frame = pandas.read_parquet(path)["parsed"]
        assert list(frame.cat.categories) == ["no", "yes", "north", "other"]
        assert [v if isinstance(v, str) else None for v in frame] == list(
            self.VALUES[-len(results) :]
        )
        assert polars.read_parquet(path)["parsed"].dtype == polars.Categorical

    def test_several_row_groups(self, tmp_path, monkeypatch):
        monkeypatch.setattr("batchrun.jobs.rows.parquet._GROUP_BYTES", 1)
        monkeypatch.setattr("batchrun.jobs.rows.row.BATCH_ROWS", 10)
        results = [ok("no")] * 30_000 + [ok("other")] * 30_000
        path = written(tmp_path, "parquet", results, **CHOICES)
        assert pq.ParquetFile(path).num_row_groups > 1
        frame = pandas.read_parquet(path)["parsed"]
        assert list(frame.cat.categories) == ["no", "yes", "north", "other"]
        assert frame.value_counts()[["no", "other"]].tolist() == [30_000, 30_000]

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("own", ["choices", "regex", "json_schema"])
    def test_rows_with_constraints_of_their_own(self, tmp_path, kind, own):
        """What they say is no mistake. Only what the row's own choices say is a choice."""
        options = {**CHOICES, "choice_logprob": True, "param_columns": ("stop", own)}
        path = written(tmp_path, kind, self.RESULTS, **options)
        rows = read(path)
        assert [row["parsed"] for row in rows] == [*self.VALUES[:5], "maybe", None, None]
        assert [row["parse_error"] for row in rows] == [*self.ERRORS[:5], None, None, None]
        assert (rows[5]["choice_logprob"] is not None) is (own == "choices")
        assert rows[0]["choice_logprob"] is not None
        if kind == "parquet":
            assert pq.read_schema(path).field("parsed").type == pa.string()

    def test_other_columns_of_rows_change_nothing(self, tmp_path):
        path = written(tmp_path, "parquet", self.RESULTS, **CHOICES, param_columns=("stop",))
        assert pa.types.is_dictionary(pq.read_schema(path).field("parsed").type)


def test_jobs_without_a_constraint_have_no_such_columns():
    for options in ({}, {"regex": "a+"}, {"grammar": "start: A"}, {"param_columns": ("choices",)}):
        assert not {"parsed", "parse_error", "choice_logprob"} & set(added_columns(**options))


def test_names_and_their_order(tmp_path):
    names = list(added_columns(**CHOICES, choice_logprob=True, prefix="x_", n=2, token_ids=True))
    assert names[4:] == [
        *("x_error", "x_parsed", "x_parse_error", "x_choice_logprob"),
        *("x_completion_token_ids", "x_sample"),
    ]
    (error,) = column(tmp_path, "jsonl", [ok("[]")], "x_parse_error", **JSON, prefix="x_")
    assert error.startswith("x_parsed: expected an object, but found an array")


# --- jobs ----------------------------------------------------------------------------------------

SHAPES = {
    "json": (JSON, ['{"id": 1, "more": {"a": "b"}}', '{"id": 2', "[]"]),
    "object": ({"json_object": True}, ['{"id": 1}', '{"id": 2', "[]"]),
    "choices": ({**CHOICES, "choice_logprob": True}, ["yes", "no", "maybe"]),
}


@pytest.fixture(params=SHAPES)
def shaped(request, make_job, tmp_path):
    """Makes a job with an answer of each kind and sample, and its journal."""
    options, texts = SHAPES[request.param]

    def make(kind, without=(), **changes):
        output = OutputSpec(path=str(tmp_path / f"out.{kind}"), format=kind)
        job = make_job(sampling=SamplingSpec(**options), output=output, **changes)
        spec = job.spec()
        source = open_source(spec.parts, spec.input_format)
        results = [
            ok(texts[row], logprob=-float(1 + (row + sample) % spec.n))._replace(
                row=row, sample=sample
            )
            for row in range(3)
            for sample in range(spec.n)
            if (row, sample) not in without
        ]
        rows = source.rows(["prompt"])
        with job.journal(readonly=False) as journal:
            journal.begin_run()
            journal.set_meta("rows_total", 3)
            journal.set_meta(READ, ["prompt"])
            journal.write(results, digests=[(row.index, row.digest) for row in rows])
        return job

    return make


def exported(job, **options):
    spec = job.spec()
    path = Path(spec.output.path)
    with job.journal() as journal:
        export_job(spec, journal, path, format=spec.output.format, **options)
    return [(row["parsed"] is not None, row["parse_error"] is not None) for row in read(path)]


GOOD, BAD = (True, False), (False, True)


@pytest.mark.parametrize("kind", FORMATS)
class TestJobs:
    def test_samples_and_the_best_of_them(self, shaped, kind):
        second = BAD if shaped(kind).spec().sampling.choices is None else GOOD
        assert exported(shaped(kind, n=2)) == [GOOD] * 2 + [second] * 2 + [BAD] * 2
        assert exported(shaped(kind, n=3, keep=1)) == [GOOD, second, BAD]

    def test_some_rows(self, shaped, kind, prompts):
        job = shaped(kind, without={(1, 0)})
        assert exported(job, partial=True) == [GOOD, BAD]
        pq.write_table(pa.table({"id": [7, 8, 9], "prompt": ["one", "2", "three"]}), prompts)
        assert exported(job, partial=True) == [GOOD, BAD]
        assert [row["row"] for row in read(Path(job.spec().output.path))] in ([0, 2], ["0", "2"])

    def test_verify_compares_them(self, shaped, kind):
        job = shaped(kind)
        exported(job)
        with Lease(job.path):
            with job.journal(readonly=False) as journal:
                journal.begin_run()
                journal.end_run("done", {})
            job.set_state("done")
        assert verify(job) == []
        path = Path(job.spec().output.path)
        if kind == "parquet":
            table = pq.read_table(path)
            i = table.column_names.index("parse_error")
            changed = table.set_column(i, "parse_error", pa.array(["x", None, None]))
            pq.write_table(changed, path)
        else:
            path.write_text(path.read_text().replace("the answer is", "the answer was"))
            path.write_text(path.read_text().replace("parsed: an", "parsed: one"))
        (problem,) = verify(job)
        assert "differs from the job in" in problem


# --- any schema, any answer ----------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
LEAVES = [
    ({"type": "string"}, st.text(max_size=5)),
    ({"type": "integer"}, st.integers(-(1 << 63), (1 << 63) - 1)),
    ({"type": "number"}, st.floats(allow_nan=False, allow_infinity=False) | st.integers()),
    ({"type": "boolean"}, st.booleans()),
    ({"type": "null"}, st.none()),
    ({}, anything),
    ({"type": ["string", "integer"]}, st.text(max_size=3) | st.integers()),
    ({"type": "object"}, st.dictionaries(names, anything, max_size=2)),
]


def compound(inner):
    """Schemas of such schemas, each with a strategy for its values."""
    fields = st.lists(
        st.tuples(names, inner), min_size=1, max_size=4, unique_by=lambda pair: pair[0].casefold()
    )
    return (
        fields.map(
            lambda pairs: (
                {"type": "object", "properties": {name: schema for name, (schema, _) in pairs}},
                st.fixed_dictionaries({}, optional={name: values for name, (_, values) in pairs}),
            )
        )
        | inner.map(lambda of: ({"type": "array", "items": of[0]}, st.lists(of[1], max_size=3)))
        | inner.map(
            lambda of: (
                {"type": "object", "additionalProperties": of[0]},
                st.dictionaries(names, of[1], max_size=3),
            )
        )
        | inner.map(lambda of: ({"anyOf": [of[0], {"type": "null"}]}, of[1] | st.none()))
    )


schemas = st.recursive(st.sampled_from(LEAVES), compound, max_leaves=8)


def as_json(got, want, kind):
    """What was read from Parquet as the JSON value, as the table of types says.

    Absent properties are null, so those that the value lacks are left out.
    """
    if got is None or want is None:
        return got
    if isinstance(kind, Struct):
        assert all(value is None for name, value in got.items() if name not in want)
        parts = dict(kind.fields)
        return {name: as_json(got[name], want[name], parts[name]) for name in want}
    if isinstance(kind, Map):
        return {key: as_json(item, want.get(key), kind.item) for key, item in got}
    if isinstance(kind, List):
        return [as_json(*both, kind.item) for both in zip(got, want, strict=True)]
    return json.loads(got) if isinstance(kind, JsonText) else got


def rounded(value, kind):
    """The JSON value with float64 where the column has them."""
    if value is None:
        return None
    if isinstance(kind, Struct):
        return {name: rounded(value[name], part) for name, part in kind.fields if name in value}
    if isinstance(kind, Map):
        return {name: rounded(item, kind.item) for name, item in value.items()}
    if isinstance(kind, List):
        return [rounded(item, kind.item) for item in value]
    return float(value) if kind.arrow == pa.float64() else value


@given(data=st.data(), made=schemas)
@settings(max_examples=150, deadline=None)
def test_any_values_come_back(tmp_path_factory, data, made):
    schema, values = made
    found = data.draw(st.lists(values, min_size=1, max_size=4))
    results = [ok(json.dumps(value)) for value in found]
    folder = tmp_path_factory.mktemp("any")
    options = {"json_schema": json.dumps(schema)}
    path = written(folder, "parquet", results, **options)
    table = pq.read_table(path)
    assert table["parse_error"].null_count == len(found)
    kind = type_of(options["json_schema"])
    assert table.schema.field("parsed").type == kind.arrow
    for got, want in zip(table["parsed"].to_pylist(), found, strict=True):
        assert as_json(got, want, kind) == rounded(want, kind)
    assert column(folder, "jsonl", results, **options) == found
    pandas.read_parquet(path)
    assert polars.read_parquet(path)["parsed"].null_count() == found.count(None)


@given(data=st.data(), made=schemas)
@settings(max_examples=100, deadline=None)
def test_the_same_answers_are_null_for_the_same_reasons_in_every_format(
    tmp_path_factory, data, made
):
    """Answers of this schema or another, whole or cut, or any text at all."""
    schema, values = made
    text = (values | anything).map(json.dumps)
    cut = text.flatmap(lambda whole: st.integers(0, len(whole)).map(lambda end: whole[:end]))
    texts = data.draw(st.lists(text | cut | st.text(max_size=5), min_size=1, max_size=5))
    ends = data.draw(st.lists(st.sampled_from(["stop", "length"]), min_size=5, max_size=5))
    results = [ok(text, end) for text, end in zip(texts, ends, strict=False)]
    folder = tmp_path_factory.mktemp("same")
    options = {"json_schema": json.dumps(schema)}
    by_format = [
        [(row["parsed"] is None, row["parse_error"]) for row in read(path)]
        for path in (written(folder, kind, results, **options) for kind in FORMATS)
    ]
    assert by_format[0] == by_format[1] == by_format[2]
