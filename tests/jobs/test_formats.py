"""A file format is one class and one entry in a table: here is one more."""

import json

import pytest

from batchrun.jobs.errors import InputError, OutputError
from batchrun.jobs.journal.results import Result
from batchrun.jobs.output.export import export
from batchrun.jobs.output.joined import Joined
from batchrun.jobs.output.result_reader import ResultReader
from batchrun.jobs.rows.formats import FORMATS, input_format, output_format
from batchrun.jobs.rows.jsonl import JsonFormat
from batchrun.jobs.rows.source import expand_inputs, open_source
from tests.jobs.adding import added_columns


class BatchFormat(JsonFormat):
    """Requests of a batch API: prompt and parameters lie in a body, the answer in another."""

    name, title = "requests", "batch requests"
    suffixes, input_suffixes = (".requests",), ()

    def begins(self, head):
        return head.startswith(b'{"custom_id"')

    def fields(self, values):
        if not isinstance(values.get("body"), dict):
            raise ValueError("has no body")
        return values["body"]

    def record(self, row, result):
        asked = json.loads(row)
        body = {"text": result["completion"], "usage": result["completion_tokens"]}
        return json.dumps({"custom_id": asked.get("custom_id"), "response": {"body": body}})


@pytest.fixture
def requests(tmp_path, monkeypatch):
    known = dict(FORMATS)
    FORMATS.clear()
    FORMATS.update({"requests": BatchFormat(), **known})
    path = tmp_path / "in.requests"
    bodies = [{"prompt": "a", "max_tokens": 3}, {"prompt": "b", "top_p": 0.5}, "none"]
    rows = [{"custom_id": f"r{i}", "body": body} for i, body in enumerate(bodies)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield path
    FORMATS.clear()
    FORMATS.update(known)


def test_one_more_format_is_one_class_and_one_entry(requests, tmp_path):
    parts, name = expand_inputs([str(tmp_path)])
    assert name == "requests"
    source = open_source(parts, name)
    assert source.column_names == ["prompt", "max_tokens", "top_p"]
    first, second, broken = source.rows(["prompt", "max_tokens"])
    assert (first.fields, second.fields) == (
        {"prompt": "a", "max_tokens": 3},
        {"prompt": "b", "max_tokens": None},
    )
    assert broken.error == "line 3 of in.requests has no body"
    results = [Result(i, 0, "ok", f"to {i}", (1,), "stop", 1, 1) for i in range(3)]
    joined = Joined(source, ResultReader(iter(results), 1, False), added_columns())
    out = tmp_path / "out.requests"
    assert export(joined, out, format=output_format(out)) == 3
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [a["custom_id"] for a in answers] == ["r0", "r1", "r2"]
    assert answers[1]["response"]["body"] == {"text": "to 1", "usage": 1}


def test_it_is_known_by_how_it_begins_before_those_that_begin_alike(requests, tmp_path):
    bare = requests.rename(tmp_path / "part-0")
    assert expand_inputs([str(bare)])[1] == "requests"


@pytest.mark.parametrize("name", FORMATS)
def test_names_say_the_format(name, tmp_path):
    known = FORMATS[name]
    for suffix in known.suffixes:
        path = tmp_path / f"a{suffix}"
        assert input_format(path) is known
        assert output_format(path) == name
        packed = tmp_path / f"a{suffix}.gz"
        if known.columnar:
            assert input_format(packed) is None
            with pytest.raises(OutputError):
                output_format(packed)
        else:
            assert input_format(packed) is known
            assert output_format(packed) == name
    for suffix in known.input_suffixes:
        assert input_format(tmp_path / f"a{suffix}") is known
        with pytest.raises(OutputError):
            output_format(tmp_path / f"a{suffix}")
    assert known.stdout in FORMATS
    assert not FORMATS[known.stdout].columnar


@pytest.mark.parametrize("name", FORMATS)
def test_of_no_files_a_lenient_source_has_nothing(name):
    source = FORMATS[name].open([], lenient=True)
    assert (source.column_names, source.count(), len(source.schema())) == ([], 0, 0)
    assert [*source.rows(), *source.chunks()] == []


@pytest.mark.parametrize("name", FORMATS)
def test_what_cant_be_read_is_the_end_of_a_lenient_source(name, tmp_path):
    path = tmp_path / "a"
    with pytest.raises(InputError):
        open_source([path], name)
    assert list(open_source([path], name, lenient=True).rows()) == []
