"""Exports: each answer beside its own row, whole files or none."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.jobs.errors import JobError, OutputError
from batchrun.jobs.journal.results import Result
from batchrun.jobs.output.export import check_columns, export
from batchrun.jobs.output.joined import Joined
from batchrun.jobs.output.result_reader import ResultReader
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.rows.formats import output_format
from batchrun.jobs.rows.source import open_source
from tests.jobs.adding import added_columns

OUTPUT_COLUMNS = ("completion", "finish_reason", "prompt_tokens", "completion_tokens", "error")
REPO = Path(__file__).parents[2]


def answer(row, sample=0):
    if row % 5 == 4:
        return Result(row, sample, "error", error=f"row {row} is bad", error_kind="prompt")
    return Result(row, sample, "ok", f"answer {row}.{sample}", (row, sample), "stop", 3, 2)


def answers(rows, n=1):
    return (answer(row, sample) for row in range(rows) for sample in range(n))


@pytest.fixture
def source(tmp_path):
    """Ten rows of Parquet in row groups of four."""
    path = tmp_path / "in.parquet"
    pq.write_table(
        pa.table({"id": range(10), "prompt": [f"p{i}" for i in range(10)]}), path, row_group_size=4
    )
    return open_source([path], "parquet")


def write(source, path, results, *, n=1, token_ids=False, limit=None, partial=False, keep=None):
    added = added_columns(token_ids=token_ids, n=n, keep=keep)
    joined = Joined(source, ResultReader(results, n, partial, keep), added, limit)
    return export(joined, path, format=output_format(path))


def scored(row, sample, sums):
    return answer(row, sample)._replace(logprob=sums[sample] if row % 5 < 4 else None)


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    data = path.read_bytes()
    if path.suffix in {".gz", ".zst"}:
        codec = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
        data = pa.CompressedInputStream(path, codec).read()
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl", "o.ndjson", "o.jsonl.gz", "o.jsonl.zst"])
class TestContent:
    def test_every_row_with_its_own_answer_in_order(self, source, tmp_path, name):
        assert write(source, tmp_path / name, answers(10)) == 10
        rows = read(tmp_path / name)
        assert list(rows[0]) == ["id", "prompt", *OUTPUT_COLUMNS]
        assert rows[7] == {
            "id": 7,
            "prompt": "p7",
            "completion": "answer 7.0",
            "finish_reason": "stop",
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "error": None,
        }
        assert [row["error"] for row in rows if row["id"] in {4, 9}] == [
            "row 4 is bad",
            "row 9 is bad",
        ]
        assert rows[4]["completion"] is None
        assert [row["id"] for row in rows] == list(range(10))
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.parquet", name])

    def test_samples_and_token_ids(self, source, tmp_path, name):
        assert write(source, tmp_path / name, answers(10, 3), n=3, token_ids=True) == 30
        rows = read(tmp_path / name)
        assert list(rows[0]) == ["id", "prompt", *added_columns(token_ids=True, n=3)]
        assert list(rows[0])[-2:] == ["completion_token_ids", "sample"]
        assert [(row["id"], row["sample"]) for row in rows] == [
            (i, k) for i in range(10) for k in range(3)
        ]
        assert rows[4]["completion"] == "answer 1.1"
        assert rows[4]["completion_token_ids"] == [1, 1]

    def test_the_best_of_the_samples(self, source, tmp_path, name):
        """Two tokens each; two of them tie, one has no log-probability."""
        sums = (-4.0, -1.0, None, -1.0)
        results = [scored(row, sample, sums) for row in range(10) for sample in range(4)]
        for result in (results[3 * 4 + 1], results[3 * 4 + 3]):  # the best of row 3 failed
            results[result.row * 4 + result.sample] = result._replace(status="error", logprob=None)
        assert write(source, tmp_path / name, iter(results), n=4, keep=3) == 30
        rows = read(tmp_path / name)
        assert list(rows[0]) == ["id", "prompt", *OUTPUT_COLUMNS, "mean_logprob", "sample"]
        assert [row["sample"] for row in rows] == [0, 1, 2] * 10
        assert [row["completion"] for row in rows[:3]] == [f"answer 0.{k}" for k in (1, 3, 0)]
        assert [row["mean_logprob"] for row in rows[:3]] == [-0.5, -0.5, -2.0]
        assert [row["completion"] for row in rows[9:12]] == [f"answer 3.{k}" for k in (0, 2, 1)]
        assert [row["mean_logprob"] for row in rows[9:12]] == [-2.0, None, None]
        assert [row["mean_logprob"] for row in rows[12:15]] == [None] * 3

        del results[5]
        assert write(source, tmp_path / name, iter(results), n=4, keep=1, partial=True) == 9
        rows = read(tmp_path / name)
        assert [row["id"] for row in rows] == [0, *range(2, 10)]
        assert "sample" not in rows[0]

    def test_limit(self, source, tmp_path, name):
        assert write(source, tmp_path / name, answers(6), limit=6) == 6
        assert [row["prompt"] for row in read(tmp_path / name)] == [f"p{i}" for i in range(6)]

    def test_nothing_missing_unless_partial(self, source, tmp_path, name):
        some = [answer(row) for row in (0, 3, 8)]
        with pytest.raises(JobError, match="row 1 has the samples") as info:
            write(source, tmp_path / name, iter(some))
        assert "--partial" in info.value.hint
        assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]
        assert write(source, tmp_path / name, iter(some), partial=True) == 3
        assert [(r["id"], r["completion"]) for r in read(tmp_path / name)] == [
            (0, "answer 0.0"),
            (3, "answer 3.0"),
            (8, "answer 8.0"),
        ]

    def test_partial_samples_and_none_at_all(self, source, tmp_path, name):
        some = [answer(2, 1), answer(9, 0), answer(9, 2)]
        assert write(source, tmp_path / name, iter(some), n=3, partial=True) == 3
        assert [(r["id"], r["sample"]) for r in read(tmp_path / name)] == [(2, 1), (9, 0), (9, 2)]
        assert write(source, tmp_path / name, iter([]), n=3, partial=True) == 0
        assert read(tmp_path / name) == []

    @pytest.mark.parametrize("partial", [False, True])
    @pytest.mark.parametrize(
        "rows",
        [
            [*range(10), 10],
            [0, 1, 1, *range(2, 10)],
            [1, 0, *range(2, 10)],
            [*range(9), 9, 3],
        ],
    )
    def test_a_wrong_result_is_never_written(self, source, tmp_path, name, rows, partial):
        with pytest.raises(JobError):
            write(source, tmp_path / name, (answer(row) for row in rows), partial=partial)
        assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]

    def test_a_sample_too_many(self, source, tmp_path, name):
        with pytest.raises(JobError):
            write(source, tmp_path / name, answers(10, 2), n=1, partial=True)

    def test_the_same_bytes_each_time(self, source, tmp_path, name):
        path = tmp_path / name
        write(source, path, answers(10))
        first = path.read_bytes()
        write(source, path, answers(10))
        assert path.read_bytes() == first

    def test_what_no_encoding_holds(self, tmp_path, name):
        path = tmp_path / "in.jsonl"
        path.write_bytes(b'{"prompt": "x\\ud800"}\n')
        source = open_source([path], "jsonl")
        write(source, tmp_path / name, iter([Result(0, 0, "ok", "y\udc80", error="\udfff")]))
        (row,) = read(tmp_path / name)
        assert row["completion"] == "y\ufffd"
        assert row["error"] == "\ufffd"
        assert row["prompt"] == "x\ufffd"


class TestTypes:
    def test_rich_parquet_types_come_back_as_they_were(self, tmp_path):
        moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        message = pa.struct(
            [pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string())]
        )
        columns = {
            "id": (pa.uint16(), [1, 2, 65535]),
            "small": (pa.int8(), [-1, None, 3]),
            "half": (pa.float16(), [0.5, None, 2.0]),
            "ns": (pa.timestamp("ns"), [1, None, 1 << 61]),
            "when": (pa.timestamp("ms", "Europe/Berlin"), [moment, None, moment]),
            "day": (pa.date32(), [moment.date(), None, None]),
            "clock": (pa.time64("ns"), [1, None, 3]),
            "long": (pa.duration("us"), [1, None, 3]),
            "money": (pa.decimal128(20, 4), [Decimal("1.1000"), None, Decimal(7)]),
            "raw": (pa.binary(), [b"\x00\xff", None, b""]),
            "key": (pa.binary(3), [b"abc", None, b"xyz"]),
            "big": (pa.large_string(), ["a", None, "c"]),
            "word": (pa.dictionary(pa.int8(), pa.string()), ["x", None, "x"]),
            "map": (pa.map_(pa.string(), pa.int16()), [[("a", 1)], None, []]),
            "vector": (pa.list_(pa.float32(), 2), [[1, 2], None, [3, 4]]),
            "lists": (pa.large_list(pa.int32()), [[1], None, []]),
            "messages": (
                pa.list_(message),
                [[{"role": "user", "content": "hi"}], None, [{"role": "s", "content": None}]],
            ),
            "none": (pa.null(), [None, None, None]),
        }
        schema = pa.schema(
            [
                pa.field(name, kind, nullable=name != "id", metadata={"note": name})
                for name, (kind, _) in columns.items()
            ],
            metadata={"pandas": "{}", "made": "here"},
        )
        table = pa.table(
            [pa.array(values, kind) for kind, values in columns.values()], schema=schema
        )
        for compliant in (True, False):
            path = tmp_path / "in.parquet"
            pq.write_table(table, path, row_group_size=2, use_compliant_nested_type=compliant)
            source = open_source([path], "parquet")
            for n in (1, 2):
                write(source, tmp_path / "o.parquet", answers(3, n), n=n)
                out = pq.read_table(tmp_path / "o.parquet")
                was = pq.read_table(path)
                added = len(added_columns(n=n))
                assert out.num_columns == was.num_columns + added
                kept = out.select(was.column_names)
                assert kept.schema.equals(was.schema, check_metadata=True)
                assert str(kept.schema) == str(was.schema)  # names inside of lists as well
                indices = [i for i in range(3) for _ in range(n)]
                assert kept.equals(was.take(indices))

    def test_the_added_columns_types(self, source, tmp_path):
        write(source, tmp_path / "o.parquet", answers(10, 2), n=2, token_ids=True)
        schema = pq.read_schema(tmp_path / "o.parquet")
        assert {
            name: str(schema.field(name).type) for name in added_columns(token_ids=True, n=2)
        } == {
            "completion": "string",
            "finish_reason": "string",
            "prompt_tokens": "int64",
            "completion_tokens": "int64",
            "error": "string",
            "completion_token_ids": "list<element: int32>",
            "sample": "int64",
        }

    def test_jsonl_to_jsonl_keeps_fields_their_order_and_values(self, tmp_path):
        records = [
            {"prompt": "a", "id": 2**80, "mixed": [1, "x", None, {"k": 1.5}]},
            {"mixed": {}, "prompt": "ü", "late": True},
        ]
        path = tmp_path / "in.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n".join(lines) + "\nbroken\n")
        write(open_source([path], "jsonl"), tmp_path / "o.jsonl", answers(3))
        rows = read(tmp_path / "o.jsonl")
        for record, row in zip(records, rows, strict=False):
            assert list(row) == [*record, *OUTPUT_COLUMNS]
            assert {name: row[name] for name in record} == record
        assert list(rows[2]) == list(OUTPUT_COLUMNS)
        assert "ü" in (tmp_path / "o.jsonl").read_text()

    def test_jsonl_to_parquet_takes_every_column_of_every_row(self, tmp_path):
        path = tmp_path / "in.jsonl"
        lines = [{"prompt": "a", "n": 1}, "not an object", {"prompt": None, "n": 0.5, "late": [1]}]
        path.write_text("\n".join(map(json.dumps, lines)))
        write(open_source([path], "jsonl"), tmp_path / "o.parquet", answers(3))
        assert pq.read_table(tmp_path / "o.parquet").select(
            ["prompt", "n", "late"]
        ).to_pylist() == [
            {"prompt": "a", "n": 1.0, "late": None},
            {"prompt": None, "n": None, "late": None},
            {"prompt": None, "n": 0.5, "late": [1]},
        ]

    @pytest.mark.parametrize("name", ["o.parquet", "o.jsonl"])
    def test_a_clash_that_no_check_could_see_loses_nothing(self, tmp_path, name):
        path = tmp_path / "in.jsonl"
        lines = [{"prompt": "a"}] * 100 + [{"error": "mine", "input_error": "also mine"}]
        path.write_text("\n".join(map(json.dumps, lines)))
        source = open_source([path], "jsonl")
        check_columns(source.column_names, added_columns())
        write(source, tmp_path / name, (Result(i, 0, "ok", "x") for i in range(101)))
        row = read(tmp_path / name)[100]
        assert row["error"] is None
        assert row["input_error"] == "also mine"
        assert row["input_input_error"] == "mine"

    def test_no_columns_at_all(self, tmp_path):
        path = tmp_path / "in.jsonl"
        path.write_text("{}\n{}\n")
        assert write(open_source([path], "jsonl"), tmp_path / "o.parquet", answers(2)) == 2
        assert pq.read_table(tmp_path / "o.parquet")["completion"].to_pylist() == [
            "answer 0.0",
            "answer 1.0",
        ]

    def test_an_unsupported_type_is_an_output_error(self, tmp_path):
        path = tmp_path / "in.parquet"
        pq.write_table(pa.table({"prompt": ["a"]}), path)

        class Odd:
            def __getattr__(self, name):
                return getattr(open_source([path], "parquet"), name)

            def schema(self):
                return pa.schema([("prompt", pa.month_day_nano_interval())])

        with pytest.raises(OutputError, match="can't be written"):
            write(Odd(), tmp_path / "o.parquet", answers(1))


@given(
    groups=st.lists(st.integers(0, 400), min_size=1, max_size=5).filter(any),
    n=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_any_results_meet_their_rows(tmp_path_factory, groups, n, data):
    folder = tmp_path_factory.mktemp("any")
    with pq.ParquetWriter(folder / "in.parquet", pa.schema([("id", pa.int64())])) as writer:
        first = 0
        for size in groups:
            writer.write_table(pa.table({"id": pa.array(range(first, first + size), pa.int64())}))
            first += size
    missing = data.draw(st.sets(st.tuples(st.integers(0, first), st.integers(0, n - 1))))
    results = [r for r in answers(first, n) if (r.row, r.sample) not in missing]
    source = open_source([folder / "in.parquet"], "parquet")
    for name in ("o.parquet", "o.jsonl"):
        assert write(source, folder / name, iter(results), n=n, partial=True) == len(results)
        assert [(r["id"], r.get("sample", 0), r["completion"]) for r in read(folder / name)] == [
            (r.row, r.sample, r.text) for r in results
        ]


class TestChecks:
    def test_formats_by_name(self):
        for name in ["a.parquet", "a.PQ"]:
            assert output_format(Path(name)) == "parquet"
        for name in ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.x.ndjson.ZST"]:
            assert output_format(Path(name)) == "jsonl"
        for name in ["a.csv", "a.TSV", "a.csv.gz"]:
            assert output_format(Path(name)) == "csv"
        for name in ["a", "a.json", "a.xlsx", "a.gz", "a.parquet.gz", "jsonl"]:
            with pytest.raises(OutputError, match="which format") as info:
                output_format(Path(name))
            assert ".jsonl" in info.value.hint

    def test_columns_that_clash(self):
        check_columns(["prompt", "sample", "completion_token_ids"], added_columns())
        with pytest.raises(OutputError, match="a column 'error', which") as info:
            check_columns(["error", "prompt"], added_columns())
        assert "'error' to 'input_error'" in info.value.hint
        with pytest.raises(OutputError, match="columns 'completion', 'sample'"):
            check_columns(["sample", "completion"], added_columns(n=2))
        with pytest.raises(OutputError, match="'completion_token_ids'"):
            check_columns(["completion_token_ids"], added_columns(token_ids=True))

    def test_destination_leaves_nothing_behind(self, tmp_path):
        OUTPUTS.check(tmp_path / "o.parquet", overwrite=False)
        assert list(tmp_path.iterdir()) == []

    def test_destination_exists(self, tmp_path):
        path = tmp_path / "o.parquet"
        path.write_text("precious")
        with pytest.raises(OutputError, match="already exists") as info:
            OUTPUTS.check(path, overwrite=False)
        assert "--overwrite" in info.value.hint
        OUTPUTS.check(path, overwrite=True)
        assert path.read_text() == "precious"

    def test_destination_is_no_file(self, tmp_path):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="is a folder"):
                OUTPUTS.check(tmp_path, overwrite=overwrite)
            with pytest.raises(OutputError, match="not a regular file"):
                OUTPUTS.check(Path("/dev/null"), overwrite=overwrite)

    def test_destination_without_a_folder(self, tmp_path):
        path = tmp_path / "a" / "b" / "o.parquet"
        with pytest.raises(OutputError, match="there is no folder") as info:
            OUTPUTS.check(path, overwrite=False)
        assert info.value.hint == f"mkdir -p '{path.parent}'"
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="can't be written: Not a directory"):
            OUTPUTS.check(tmp_path / "file" / "o.parquet", overwrite=False)

    def test_destination_with_a_name_too_long(self, tmp_path):
        with pytest.raises(OutputError, match="can't be written: File name too long"):
            OUTPUTS.check(tmp_path / ("x" * 260 + ".parquet"), overwrite=False)
        with pytest.raises(OutputError, match="can't be written"):
            OUTPUTS.check(tmp_path / ("x" * 245 + ".jsonl"), overwrite=False)


@pytest.fixture
def visible():
    """A folder that other users see, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def run_export(code, *arguments):
    """Run code that has `run`, which exports `count` results; the rest is in `sys.argv[4:]`."""
    code = textwrap.dedent(EXPORT) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


EXPORT = """
    import os, resource, signal, sys
    from pathlib import Path
    from batchrun.jobs.errors import OutputError
    from batchrun.jobs.output.result_reader import ResultReader
    from batchrun.jobs.output.export import export
    from batchrun.jobs.output.joined import Joined
    from batchrun.jobs.output.store import OUTPUTS
    from batchrun.jobs.rows.formats import output_format
    from batchrun.jobs.journal.journal import Result
    from batchrun.jobs.rows.source import open_source
    from tests.jobs.adding import added_columns

    source, out, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

    def run():
        results = (Result(i, 0, "ok", os.urandom(40).hex()) for i in range(count))
        source_ = open_source([source], source.suffix[1:])
        joined = Joined(source_, ResultReader(results, 1, False), added_columns())
        export(joined, out, format=output_format(out))
"""


class TestFailures:
    @pytest.mark.parametrize("name", ["o.parquet", "o.jsonl", "o.jsonl.gz", "o.jsonl.zst"])
    @pytest.mark.parametrize("allowed", [0, 1000, 300_000])
    def test_a_full_disk(self, tmp_path, name, allowed):
        path = tmp_path / "in.parquet"
        pq.write_table(pa.table({"id": range(20_000)}), path)
        (tmp_path / name).write_text("what was there")
        code = """
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), -1))
            try:
                run()
            except OutputError as error:
                print(error, error.hint, sep="|")
        """
        done = run_export(code, path, tmp_path / name, 20_000, allowed)
        assert done.stderr == ""
        assert done.stdout == (
            f"{tmp_path / name} can't be written: File too large; the results are safe in the job"
            "|make room on the disk, then: batchrun export\n"
        )
        assert (tmp_path / name).read_text() == "what was there"
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.parquet", name])

    def test_no_permission(self, visible):
        path = visible / "in.parquet"
        pq.write_table(pa.table({"id": [1]}), path)
        (visible / "locked").mkdir(mode=0o555)
        code = """
            if os.getuid() == 0:
                os.setuid(65534)
            for act in (run, lambda: OUTPUTS.check(out, overwrite=False)):
                try:
                    act()
                except OutputError as error:
                    print(error)
        """
        out = visible / "locked" / "o.parquet"
        done = run_export(code, path, out, 1)
        message = f"{out} can't be written: Permission denied"
        assert done.stdout == f"{message}; the results are safe in the job\n{message}\n", (
            done.stderr
        )

    def test_a_folder_that_went_away(self, source, tmp_path):
        with pytest.raises(OutputError, match="No such file") as info:
            write(source, tmp_path / "gone" / "o.parquet", answers(10))
        assert "batchrun export" in info.value.hint

    def test_an_error_of_the_journal_passes_and_leaves_nothing(self, source, tmp_path):
        def broken():
            yield answer(0)
            raise JobError("the journal is damaged")

        for name in ("o.parquet", "o.jsonl.gz", "o.jsonl.zst"):
            with pytest.raises(JobError, match="the journal is damaged"):
                write(source, tmp_path / name, broken())
        assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]

    def test_an_interrupt_leaves_nothing(self, source, tmp_path):
        def interrupted():
            yield answer(0)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(source, tmp_path / "o.parquet", interrupted())
        assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]

    def test_gzip_is_readable_by_others(self, source, tmp_path):
        write(source, tmp_path / "o.jsonl.gz", answers(10))
        with gzip.open(tmp_path / "o.jsonl.gz", "rt") as file:
            assert len(file.readlines()) == 10


class TestMemory:
    # Not getrusage: its peak includes the process that forked this one.
    MEASURE = """
        run()
        status = Path("/proc/self/status").read_text()
        print(status.split("VmHWM:")[1].split()[0])
    """

    def peak(self, path, out, count):
        done = run_export(self.MEASURE, path, out, count)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    @pytest.mark.parametrize("name", ["o.parquet", "o.jsonl"])
    def test_flat_in_the_number_of_rows(self, tmp_path, name):
        peaks = []
        for count in (12_000, 60_000):  # 48 MB are more than a row group, 240 MB far more
            path = tmp_path / f"{count}.parquet"
            with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])) as writer:
                for first in range(0, count, 2000):
                    prompts = [f"{i:04x}" * 1000 for i in range(first, first + 2000)]
                    writer.write_table(pa.table({"prompt": prompts}))
            peaks.append(self.peak(path, tmp_path / name, count))
        assert peaks[1] < 1.25 * peaks[0]

    def test_large_cells(self, tmp_path):
        cell = "0123456789" * (1 << 20)  # 10 MiB
        path = tmp_path / "in.jsonl"
        with path.open("w") as file:
            for i in range(12):
                file.write(json.dumps({"prompt": f"{i}{cell}"}) + "\n")
        assert self.peak(path, tmp_path / "o.parquet", 12) < 420 << 10
        sizes = pq.ParquetFile(tmp_path / "o.parquet").metadata
        assert sizes.num_row_groups >= 3
