"""Whatever became of an input, no answer is put beside a row that is not the one it is of.

Each answer says which prompt it is of, so an output proves itself: by a row's columns, or, where
these are gone, by the row's number.
"""

import csv
import json
import os
import sqlite3
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.jobs.errors import InputError, JobError, SpecChanged
from batchrun.jobs.folder import create
from batchrun.jobs.journal.journal import READ
from batchrun.jobs.journal.results import Result
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.output import rejoin
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.verify import verify

KINDS = ["jsonl", "json", "csv", "parquet"]  # of JSON there are lines, and an array
TEXTS = KINDS[:3]
OUTPUTS = ["parquet", "jsonl", "csv"]
ROWS = [{"prompt": f"prompt {i}", "note": f"note {i}"} for i in range(6)]
HINT = "batchrun export --partial -o FILE"


def record(row, kind):
    return ",".join(row.values()) if kind == "csv" else json.dumps(row)


def written(path, kind, rows, **options):
    if kind == "parquet":
        options = {"compression": "none", "use_dictionary": False, "row_group_size": 4} | options
        names = dict.fromkeys(name for row in rows for name in row)
        table = pa.table({name: [row.get(name) for row in rows] for name in names or ["prompt"]})
        pq.write_table(table, path, **options)
        return path
    lines = [record(row, kind) for row in rows]
    if kind == "json":
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    else:
        head = [",".join(rows[0])] if kind == "csv" else []
        path.write_text("".join(f"{line}\n" for line in head + lines))
    return path


def answer(prompt, row, sample):
    """Of three samples the second is the likeliest."""
    likely = (-3.0, -1.0, -2.0)[sample]
    return Result(row, sample, "ok", f"{prompt}#{sample}", (sample,), "stop", 1, 1, logprob=likely)


def job_of(home, *paths, kind, **changes):
    spec = JobSpec(
        inputs=tuple(InputFile.of(path) for path in paths),
        input_format="jsonl" if kind == "json" else kind,
        prompt=PromptSpec(column="prompt"),
        model=ModelSpec(name="m"),
        sampling=SamplingSpec(),
        output=OutputSpec(path=str(home / "out.jsonl"), format="jsonl"),
    )
    return create(home, replace(spec, **changes))


def answered(job, without=(), digests=True):
    """The job with the results that a worker would have written, but for some samples."""
    spec = job.spec()
    source = open_source(spec.parts, spec.input_format)
    rows = list(source.rows(["prompt"], spec.limit))
    keys = [(row.index, s) for row in rows for s in range(spec.n) if (row.index, s) not in without]
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.set_meta("rows_total", len(rows))
        journal.set_meta(READ, ["prompt"])
        journal.write(
            [answer(rows[row].fields["prompt"], row, sample) for row, sample in keys],
            digests=[(row.index, row.digest) for row in rows] if digests else [],
        )
    return keys


def export(job, path, *, partial=False):
    kind = path.suffix[1:]
    with job.journal() as journal:
        return export_job(job.spec(), journal, path, format=kind, partial=partial)


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        rows = [{k: v or None for k, v in row.items()} for row in csv.DictReader(file)]
    numbers = ("row", "sample")
    return [
        {k: int(v) if k in numbers and (v or "").isdigit() else v for k, v in row.items()}
        for row in rows
    ]


def expected(keys, prompts, n=1, keep=None):
    """(row, completion) of each line of an output."""
    lines = []
    for row in sorted({row for row, _ in keys}):
        samples = [sample for other, sample in keys if other == row]
        if keep is not None:
            best = sorted(samples, key=lambda s: (3, 1, 2)[s])[:keep]
            samples = best if len(samples) == n else []
        lines += [(row, f"{prompts[row]}#{sample}") for sample in samples]
    return lines


def refused(job, path, *names):
    """A strict export names what changed, and what can be done; it leaves nothing behind."""
    with pytest.raises((SpecChanged, InputError)) as error:
        export(job, path)
    assert any(name in str(error.value) for name in names), str(error.value)
    assert HINT in error.value.hint
    assert not path.exists()
    assert verify(job) != []


def by_number(path, lines, *, same, was, columns, prefix=""):
    """A partial export: every result once, and of rows that are the same these columns."""
    found = read(path)
    assert [(line["row"], line[f"{prefix}completion"]) for line in found] == lines
    for line in found:
        row = line["row"]
        for name in was[row]:
            want = was[row][name] if row in same and name in columns else None
            assert line.get("input_row" if name == "row" else name) == want, line


def edited(rows):
    return [*rows[:2], {**rows[2], "prompt": "PROMPT 2"}, *rows[3:]]


EDITS = {
    "reversed": lambda rows: rows[::-1],
    "edited": edited,
    "front": lambda rows: [{"prompt": "new", "note": "new"}, *rows],
    "deleted": lambda rows: rows[:2] + rows[3:],
    "shorter": lambda rows: rows[:4],
    "two exchanged": lambda rows: [*rows[:3], rows[4], rows[3], rows[5]],
}


def still(rows, now):
    return {i for i, (a, b) in enumerate(zip(rows, now, strict=False)) if a == b}


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_answer_is_never_beside_another_row(tmp_path, kind, out, edit):
    source = written(tmp_path / f"in.{kind}", kind, ROWS)
    job = job_of(tmp_path, source, kind=kind)
    keys = answered(job)
    output = tmp_path / f"o.{out}"
    assert export(job, output).unknown is None
    assert [line["completion"] for line in read(output)] == [f"{r['prompt']}#0" for r in ROWS]
    assert [line["note"] for line in read(output)] == [r["note"] for r in ROWS]
    output.unlink()

    before = source.stat()
    now = EDITS[edit](ROWS)
    written(source, kind, now)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    if edit in ("edited", "reversed", "two exchanged"):
        assert source.stat().st_size == before.st_size
    refused(
        job, output, *(("row ", "ends inside", "ended") if kind != "parquet" else (str(source),))
    )
    same = still(ROWS, now)
    found = export(job, output, partial=True)
    assert (found.rows, found.unknown) == (len(ROWS), len(ROWS) - len(same))
    columns = ["prompt"] if kind == "parquet" else ["prompt", "note"]
    lines = expected(keys, [row["prompt"] for row in ROWS])
    by_number(output, lines, same=same, was=ROWS, columns=columns)


SHAPES = {
    "samples": {"n": 3},
    "limit": {"limit": 4},
    "best of": {"n": 3, "keep": 1},
    "best two of": {"n": 3, "keep": 2},
    "prefix": {"prefix": "new_"},
}


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", ["edited", "deleted"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_result_is_there_once_with_its_number(tmp_path, kind, out, edit, shape):
    """Of jobs with samples, a limit, a prefix; and some results are not there yet."""
    changes = dict(SHAPES[shape])
    prefix = changes.pop("prefix", "")
    output_of = {"path": str(tmp_path / "x.jsonl"), "format": "jsonl", "prefix": prefix}
    source = written(tmp_path / f"in.{kind}", kind, ROWS)
    job = job_of(tmp_path, source, kind=kind, output=output_of, **changes)
    keys = answered(job, without={(1, 0), (3, 2)})
    now = EDITS[edit](ROWS)
    written(source, kind, now)
    output = tmp_path / f"o.{out}"
    lines = expected(keys, [r["prompt"] for r in ROWS], job.spec().n, job.spec().keep)
    same = still(ROWS, now)
    found = export(job, output, partial=True)
    assert found.rows == len(lines)
    assert found.unknown == sum(row not in same for row, _ in lines)
    columns = ["prompt"] if kind == "parquet" else ["prompt", "note"]
    by_number(output, lines, same=same, was=ROWS, columns=columns, prefix=prefix)


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_column_row_of_the_input_gives_way(tmp_path, kind, out):
    rows = [{"prompt": f"p{i}", "row": f"r{i}"} for i in range(4)]
    source = written(tmp_path / f"in.{kind}", kind, rows)
    job = job_of(tmp_path, source, kind=kind)
    keys = answered(job)
    output = tmp_path / f"o.{out}"
    export(job, output)
    assert [line["row"] for line in read(output)] == [row["row"] for row in rows]
    now = [*rows[:3], {"prompt": "p9", "row": "r3"}]
    written(source, kind, now)
    export(job, output, partial=True)
    columns = ["prompt"] if kind == "parquet" else ["prompt", "row"]
    lines = expected(keys, [row["prompt"] for row in rows])
    by_number(output, lines, same={0, 1, 2}, was=rows, columns=columns)
    if kind != "parquet":
        assert read(output)[1]["input_row"] == "r1"


def rows_left(tmp_path, job, keys, out, *, same, columns=("prompt", "note"), was=ROWS):
    """A partial export has these rows' columns, and all results."""
    output = tmp_path / f"o.{out}"
    found = export(job, output, partial=True)
    assert (found.rows, found.unknown) == (len(was), len(was) - len(same))
    lines = expected(keys, [row["prompt"] for row in was])
    by_number(output, lines, same=same, was=was, columns=columns)


def inside_of(data, text):
    return data[: data.index(text) + 3]


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_before_a_cut_stay(tmp_path, kind, out):
    source = written(tmp_path / f"in.{kind}", kind, ROWS)
    job = job_of(tmp_path, source, kind=kind)
    keys = answered(job)
    source.write_bytes(inside_of(source.read_bytes(), b"note 4"))
    refused(job, tmp_path / f"o.{out}", "row 4", str(source))
    rows_left(tmp_path, job, keys, out, same=range(4) if kind != "parquet" else ())


@pytest.mark.parametrize("out", OUTPUTS)
def test_rows_before_a_cut_in_packed_text_stay(tmp_path, out):
    source = tmp_path / "in.jsonl.zst"
    rows = [{"prompt": os.urandom(20_000).hex(), "note": f"{i}"} for i in range(40)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    with pa.CompressedOutputStream(source, "zstd") as stream:
        stream.write(text.encode())
    job = job_of(tmp_path, source, kind="jsonl")
    keys = answered(job)
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    output = tmp_path / f"o.{out}"
    found = export(job, output, partial=True)
    assert 0 < found.unknown < 40
    lines = expected(keys, [row["prompt"] for row in rows])
    same = range(40 - found.unknown)
    by_number(output, lines, same=same, was=rows, columns=["prompt", "note"])


@pytest.mark.parametrize("newline", [True, False])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_file_that_only_grew_is_as_it_was(tmp_path, kind, newline):
    """Also in the middle of its last line, which had no end."""
    source = written(tmp_path / f"in.{kind}", kind, ROWS)
    if not newline:
        source.write_bytes(source.read_bytes().rstrip())
    job = job_of(tmp_path, source, kind=kind)
    answered(job)
    export(job, tmp_path / "want.jsonl")
    with source.open("a") as file:
        file.write(" and more\n" + record(ROWS[0], kind) + "\n")
    assert export(job, tmp_path / "got.jsonl").unknown is None
    assert (tmp_path / "got.jsonl").read_bytes() == (tmp_path / "want.jsonl").read_bytes()
    assert export(job, tmp_path / "got.jsonl", partial=True).unknown is None
    assert verify(job) == []


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["deleted", "folder", "garbage", "other format", "empty"])
def test_an_input_of_which_nothing_is_left(tmp_path, kind, out, what):
    source = written(tmp_path / f"in.{kind}", kind, ROWS)
    job = job_of(tmp_path, source, kind=kind)
    keys = answered(job)
    source.unlink()
    if what == "folder":
        source.mkdir()
    elif what == "garbage":
        source.write_bytes(bytes(range(256)) * 9)
    elif what == "other format":
        written(source, "parquet" if kind != "parquet" else "csv", ROWS)
    elif what == "empty":
        source.touch()
    refused(job, tmp_path / f"o.{out}", str(source), "row 0", "ended")
    rows_left(tmp_path, job, keys, out, same=())


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_of_several_files_those_before_the_one_that_is_gone_stay(tmp_path, kind, out):
    files = [written(tmp_path / f"{i}.{kind}", kind, ROWS[2 * i : 2 * i + 2]) for i in range(3)]
    job = job_of(tmp_path, *files, kind=kind)
    keys = answered(job)
    files[1].unlink()
    refused(job, tmp_path / f"o.{out}", str(files[1]))
    columns = ["prompt"] if kind == "parquet" else ["prompt", "note"]
    rows_left(tmp_path, job, keys, out, same=(0, 1), columns=columns)


@pytest.mark.parametrize("kind", TEXTS)
def test_what_no_answer_needs_may_change(tmp_path, kind):
    """A row beyond the limit, and one that has no result yet."""
    source = written(tmp_path / f"in.{kind}", kind, ROWS)
    job = job_of(tmp_path, source, kind=kind, limit=5)
    keys = answered(job, without={(2, 0)})
    written(source, kind, [*edited(ROWS)[:5], {"prompt": "another", "note": "row"}])
    output = tmp_path / "o.jsonl"
    assert export(job, output, partial=True).unknown is None
    assert [(i["note"], i["completion"]) for i in read(output)] == [
        (f"note {row}", f"prompt {row}#0") for row, _ in keys
    ]


# --- Parquet -------------------------------------------------------------------------------------

REWRITTEN = {
    "another compression": lambda path: written(path, "parquet", ROWS, compression="zstd"),
    "a column reordered": lambda path: written(
        path, "parquet", [dict(reversed(row.items())) for row in ROWS]
    ),
    "a column added": lambda path: written(path, "parquet", [{**r, "x": "y"} for r in ROWS]),
    "a column not read gone": lambda path: written(
        path, "parquet", [{"prompt": r["prompt"]} for r in ROWS]
    ),
    "a column not read changed": lambda path: written(
        path, "parquet", [{**r, "note": r["note"].upper()} for r in ROWS]
    ),
    "a row more": lambda path: written(path, "parquet", [*ROWS, ROWS[0]]),
    "other row groups": lambda path: written(path, "parquet", ROWS, row_group_size=2),
}


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("how", REWRITTEN)
def test_of_a_rewritten_parquet_the_columns_that_were_read_stay(tmp_path, how, out):
    source = written(tmp_path / "in.parquet", "parquet", ROWS)
    job = job_of(tmp_path, source, kind="parquet")
    keys = answered(job)
    REWRITTEN[how](source)
    refused(job, tmp_path / f"o.{out}", str(source))
    rows_left(tmp_path, job, keys, out, same=range(6), columns=["prompt"])
    names = set().union(*(line for line in read(tmp_path / f"o.{out}")))
    assert not {"note", "x"} & names


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize(
    "column", [None, pa.array(range(6)), pa.array([[b"a"]] * 6), pa.nulls(6, pa.string())]
)
def test_a_parquet_without_what_was_read_has_no_row_left(tmp_path, out, column):
    source = written(tmp_path / "in.parquet", "parquet", ROWS)
    job = job_of(tmp_path, source, kind="parquet")
    keys = answered(job)
    names = {"note": [row["note"] for row in ROWS]} | ({} if column is None else {"prompt": column})
    pq.write_table(pa.table(names), source)
    rows_left(tmp_path, job, keys, out, same=())


# --- what a digest tells apart -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        ("in.tsv", "prompt\tnote\n\tx\n", "prompt\tnote\nx\t\n"),
        ("in.csv", "prompt,note\nx, y\n", "prompt,note\nx, y \n"),
        ("in.csv", "prompt,note\n x,y\n", "prompt,note\nx,y\n"),
        ("in.csv", "prompt,note\nx,y\n", "note,prompt\nx,y\n"),
        ("in.csv", "prompt,note\nx|y,z\n", "prompt|note\nx|y,z\n"),
        ("in.csv", 'prompt,note\nx,""\n', "prompt,note\nx,\n"),
        ("in.jsonl", '{"prompt": "x"}\n', '{"prompt": "x "}\n'),
        ("in.jsonl", '{"prompt": 1}\n', '{"prompt": "1"}\n'),
    ],
)
def test_rows_that_differ_by_little_are_not_the_same(tmp_path, name, was, now):
    source = tmp_path / name
    source.write_text(was)
    kind = "jsonl" if name.endswith("jsonl") else "csv"
    job = job_of(tmp_path, source, kind=kind)
    answered(job)
    source.write_text(now)
    refused(job, tmp_path / "o.jsonl", "row 0", str(source))
    assert export(job, tmp_path / "o.jsonl", partial=True).unknown == 1


def test_blanks_around_a_json_row_make_no_other_row(tmp_path):
    source = written(tmp_path / "in.jsonl", "jsonl", ROWS)
    job = job_of(tmp_path, source, kind="jsonl")
    answered(job, without={(5, 0)})  # what was added pushes out the end
    source.write_text("".join(f" {record(row, 'jsonl')}\r\n" for row in ROWS))
    assert export(job, tmp_path / "o.jsonl", partial=True).unknown is None


def test_a_folder_named_like_the_added_column_gives_way(tmp_path):
    source = written(tmp_path / "in.jsonl", "jsonl", ROWS[:3])
    job = job_of(tmp_path, source, kind="jsonl")
    file = replace(job.spec().inputs[0], partition={"row": 77})
    job = job_of(tmp_path / "other", source, kind="jsonl", inputs=(file,))
    answered(job)
    written(source, "jsonl", [ROWS[0], ROWS[3], ROWS[2]])
    export(job, tmp_path / "o.jsonl", partial=True)
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    for line in lines:
        names = [name for name, _ in json.loads(line, object_pairs_hook=list)]
        assert len(names) == len(set(names)), line
    found = [(line["row"], line.get("input_row")) for line in map(json.loads, lines)]
    assert found == [(0, 77), (1, None), (2, 77)]


# --- journals from before digests ----------------------------------------------------------------


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("digests", [0, 3])
def test_without_digests_the_whole_input_has_to_be_what_it_was(tmp_path, kind, out, digests):
    """Of all rows, or of some: a run of today has begun to read them again."""
    source = written(tmp_path / f"in.{kind}", kind, ROWS)
    job = job_of(tmp_path, source, kind=kind)
    keys = answered(job)
    db = sqlite3.connect(job.path / "journal.db")
    with db:
        db.execute("DELETE FROM rows WHERE row >= ?", (digests,))
    db.close()
    output = tmp_path / f"o.{out}"
    assert export(job, output).unknown is None
    assert [line["completion"] for line in read(output)] == [f"{r['prompt']}#0" for r in ROWS]
    output.unlink()
    assert verify(job) == []

    before = source.stat()
    now = [*ROWS[:4], {**ROWS[4], "prompt": "PROMPT 4"}, ROWS[5]]
    written(source, kind, now)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused(job, output, str(source))
    columns = ["prompt"] if kind == "parquet" else ["prompt", "note"]
    rows_left(tmp_path, job, keys, out, same=range(digests), columns=columns)


# --- while an export reads -----------------------------------------------------------------------


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("what", ["changed", "deleted"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_happens_to_the_input_during_an_export_is_seen(
    tmp_path, monkeypatch, kind, what, digests
):
    """Just after the files were compared, and before a row is read."""
    source = written(tmp_path / f"in.{kind}", kind, ROWS)
    job = job_of(tmp_path, source, kind=kind)
    keys = answered(job, digests=digests)
    joined = rejoin._joined

    def meanwhile(*args, **kwargs):
        monkeypatch.setattr(rejoin, "_joined", joined)
        source.unlink()
        if what == "changed":
            written(source, kind, [{**row, "note": row["note"].upper()} for row in ROWS])
        return joined(*args, **kwargs)

    output = tmp_path / "o.jsonl"
    monkeypatch.setattr(rejoin, "_joined", meanwhile)
    with pytest.raises((SpecChanged, InputError), match=rf"row 0|{source.name}"):
        export(job, output)
    assert not output.exists()
    written(source, kind, ROWS)
    monkeypatch.setattr(rejoin, "_joined", meanwhile)
    found = export(job, output, partial=True)
    kept = kind == "parquet" and what == "changed" and digests
    assert (found.rows, found.unknown) == (6, 0 if kept else 6)
    lines = expected(keys, [row["prompt"] for row in ROWS])
    by_number(output, lines, same=range(6) if kept else (), was=ROWS, columns=["prompt"])


def test_a_result_of_no_row_is_an_error_in_any_export(tmp_path):
    job = job_of(tmp_path, written(tmp_path / "in.jsonl", "jsonl", ROWS), kind="jsonl")
    answered(job)
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.write([answer("x", 9, 0)])
    for partial in (False, True):
        with pytest.raises(JobError, match="result for row 9"):
            export(job, tmp_path / "o.jsonl", partial=partial)


# --- any history ---------------------------------------------------------------------------------

words = st.text("abc 1", max_size=4)
a_row = st.tuples(words, words).map(lambda t: {"prompt": f"p{t[0]}", "note": f"n{t[1]}x"})
some_rows = st.lists(a_row, min_size=1, max_size=12)


@st.composite
def edits(draw, rows):
    """The rows after some edits."""
    rows = list(rows)
    for _ in range(draw(st.integers(0, 3))):
        new = draw(a_row)
        at = draw(st.integers(0, len(rows)))
        how = draw(st.sampled_from(["replace", "insert", "delete", "append", "note"]))
        if how == "append":
            rows.append(new)
        elif how == "insert":
            rows.insert(at, new)
        elif at < len(rows) and how == "delete":
            del rows[at]
        elif at < len(rows):
            rows[at] = new if how == "replace" else {**rows[at], "note": new["note"]}
    return rows


def as_read(path, kind, size):
    """What a simple reader makes of the first bytes of a file, a row each."""
    if kind == "parquet":
        return [(row.get("prompt"),) for row in pq.read_table(path).to_pylist()]
    lines = path.read_bytes()[:size].split(b"\n")
    lines = [line for line in lines if line.strip()]
    return [(lines[0], line) for line in lines[1:]] if kind == "csv" else lines


@given(data=st.data(), rows=some_rows)
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_any_edit_of_any_rows(kind, data, rows):
    n = data.draw(st.sampled_from([1, 3]))
    every = [(row, sample) for row in range(len(rows)) for sample in range(n)]
    without = set(data.draw(st.lists(st.sampled_from(every), unique=True)))
    now = data.draw(edits(rows))
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, f"in.{kind}"), Path(folder, "o.jsonl")
        job = job_of(Path(folder), written(source, kind, rows), kind=kind, n=n)
        keys = answered(job, without)
        size = source.stat().st_size
        was, bytes_were = as_read(source, kind, size), source.read_bytes()
        if now or kind != "csv":
            written(source, kind, now)
        else:
            source.write_text("")
        is_now = as_read(source, kind, size) if source.stat().st_size else []
        same = still(was, is_now)
        there = {row for row, _ in keys}
        whole = bytes_were == source.read_bytes() if kind == "parquet" else there <= same
        found = export(job, out, partial=True)
        lines = expected(keys, [row["prompt"] for row in rows], n)
        if not lines:  # what can't be opened is told, and nobody misses it
            assert not found.unknown
        elif whole:
            assert found.unknown is None
            assert [(line["prompt"], line["note"], line["completion"]) for line in read(out)] == [
                (rows[row]["prompt"], rows[row]["note"], text) for row, text in lines
            ]
        else:
            assert found.unknown == sum(row not in same for row, _ in lines)
            columns = ["prompt"] if kind == "parquet" else ["prompt", "note"]
            by_number(out, lines, same=same, was=rows, columns=columns)
        out.unlink()
        if whole and not without:
            assert export(job, out).rows == len(lines)
        elif without:
            with pytest.raises(JobError):
                export(job, out)
        else:
            refused(job, out, "row ", "ended", str(source))
