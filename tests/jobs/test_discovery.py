"""Folders as people have them: partitions, links, datasets of a hub, files without a suffix."""

import json
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.errors import InputError
from batchrun.jobs.options import ModelSpec, PromptSpec, SamplingSpec
from batchrun.jobs.rows.formats import sniffed
from batchrun.jobs.rows.source import expand_inputs, open_source
from batchrun.jobs.spec import InputFile, JobSpec
from tests.jobs.reading import objects


def put(path, kind, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.with_suffix(f".{kind}")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(*paths):
    return open_source(*expand_inputs([str(path) for path in paths]))


def values(source, name):
    return [row.fields[name] for row in source.rows(["prompt", name])]


KINDS = ["parquet", "jsonl", "csv"]


@pytest.mark.parametrize("kind", KINDS)
class TestPartitions:
    def test_folders_names_are_columns(self, tmp_path, kind):
        put(tmp_path / "d/lang=de/year=2024/a", kind, {"prompt": "a"})
        put(tmp_path / "d/lang=fr/year=2025/b", kind, {"prompt": "b"}, {"prompt": "c"})
        source = opened(tmp_path / "d")
        assert source.column_names == ["prompt", "lang", "year"]
        assert values(source, "lang") == ["de", "fr", "fr"]
        assert values(source, "year") == [2024, 2025, 2025]
        assert [row["year"] for row in objects(source)] == [2024, 2025, 2025]
        [*chunks] = source.chunks()
        table = pa.Table.from_batches([chunk.arrow(source.schema()) for chunk in chunks])
        assert table.column("year").to_pylist() == [2024, 2025, 2025]
        assert table.schema.field("year").type == pa.int64()

    def test_what_would_change_as_a_number_stays_text(self, tmp_path, kind):
        for i, month in enumerate(("01", "12")):
            put(tmp_path / f"d/month={month}/{i}", kind, {"prompt": "a"})
        assert values(opened(tmp_path / "d"), "month") == ["01", "12"]

    @pytest.mark.parametrize(
        ("folder", "value"),
        [
            ("k=a%20b%2Fc", "a b/c"),
            ("k=__HIVE_DEFAULT_PARTITION__", None),
            ("k=a=b", "a=b"),
            ("k=-7", -7),
            ("k=1.10", "1.10"),
        ],
    )
    def test_names_and_values(self, tmp_path, kind, folder, value):
        put(tmp_path / "d" / folder / "a", kind, {"prompt": "a"})
        assert values(opened(tmp_path / "d"), "k") == [value]

    def test_a_column_of_the_file_itself_comes_first(self, tmp_path, kind):
        put(tmp_path / "d/lang=de/a", kind, {"prompt": "a", "lang": "own"})
        put(tmp_path / "d/lang=fr/b", kind, {"prompt": "b"})
        source = opened(tmp_path / "d")
        assert values(source, "lang") == ["own", "fr"]
        assert [row["lang"] for row in objects(source)] == ["own", "fr"]

    def test_files_without_a_partition_have_null(self, tmp_path, kind):
        put(tmp_path / "d/a", kind, {"prompt": "a"})
        put(tmp_path / "d/lang=fr/b", kind, {"prompt": "b"})
        source = opened(tmp_path / "d")
        assert values(source, "lang") == [None, "fr"]
        assert [row["lang"] for row in objects(source)] == [None, "fr"]

    def test_a_number_that_other_files_have_as_text_is_text(self, tmp_path, kind):
        put(tmp_path / "d/year=2024/a", kind, {"prompt": "a", "year": "own"})
        put(tmp_path / "d/year=2025/b", kind, {"prompt": "b"})
        source = opened(tmp_path / "d")
        table = pa.Table.from_batches([c.arrow(source.schema()) for c in source.chunks()])
        assert table.column("year").to_pylist() == ["own", "2025"]
        number = 2025 if kind == "jsonl" else "2025"  # JSON has a type for each value
        assert values(source, "year") == ["own", number]
        assert [row["year"] for row in objects(source)] == ["own", number]

    def test_globs_and_files_say_it_too(self, tmp_path, kind):
        paths = [put(tmp_path / f"d/lang={v}/a", kind, {"prompt": v}) for v in ("de", "fr")]
        assert values(opened(tmp_path / "d/lang=*/a.*"), "lang") == ["de", "fr"]
        assert values(opened(*paths), "lang") == ["de", "fr"]
        assert values(opened(tmp_path / "d/lang=de"), "lang") == ["de"]

    def test_only_the_partition_is_asked_for(self, tmp_path, kind):
        put(tmp_path / "d/lang=de/a", kind, *[{"prompt": f"{i}"} for i in range(600)])
        rows = list(opened(tmp_path / "d").rows(["lang"], 260))
        assert [(row.index, row.fields) for row in rows] == [
            (i, {"lang": "de"}) for i in range(260)
        ]


def test_a_folder_whose_value_is_none_of_the_column_in_other_files_is_refused(tmp_path):
    put(tmp_path / "d/year=2024/a", "parquet", {"prompt": "a", "year": 7})
    other = put(tmp_path / "d/year=new/b", "parquet", {"prompt": "b"})
    with pytest.raises(InputError, match="'year' is int64 in some files"):
        opened(tmp_path / "d")
    put(other.with_suffix(""), "parquet", {"prompt": "b", "year": 8})  # which counts
    assert values(opened(tmp_path / "d"), "year") == [7, 8]


def test_a_file_has_the_partition_of_its_own_folder_not_of_a_link_to_it(tmp_path):
    for name in ("z", "a", "m"):
        (tmp_path / f"d/k={name}").parent.mkdir(exist_ok=True)
        if name != "a":
            (tmp_path / f"d/k={name}").symlink_to("k=a")
        else:
            put(tmp_path / "d/k=a/x", "jsonl", {"prompt": "p"})
    assert values(opened(tmp_path / "d"), "k") == ["a"]


@pytest.mark.parametrize(
    ("content", "why", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid x\n", "a Git LFS pointer", "git lfs"),
        (b'{"prompt": "a"}\n', "is not a Parquet file", "name that says what it is"),
        (b"PAR1 and no end", "is damaged or cut short", "copy or write the file again"),
        (b"", "is damaged or cut short", "copy or write the file again"),
    ],
)
def test_what_only_its_name_makes_parquet_is_told_so(tmp_path, content, why, hint):
    path = tmp_path / "train.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match=why) as refused:
        opened(path)
    assert hint in refused.value.hint


def test_a_moved_file_keeps_its_partition_and_another_one_is_another_job(tmp_path):
    path = put(tmp_path / "lang=de/a", "jsonl", {"prompt": "a"})
    [part], _ = expand_inputs([str(path)])
    file = InputFile.of(part.path, part.partition)

    def spec(file):
        return JobSpec((file,), "jsonl", PromptSpec(), ModelSpec(), SamplingSpec())

    again = JobSpec.of(json.loads(json.dumps(asdict(spec(file)))))
    assert again.parts[0].partition == {"lang": "de"}
    assert again.fingerprint() == spec(file).fingerprint()
    other = InputFile.of(part.path, {"lang": "fr"})
    assert spec(other).fingerprint() != spec(file).fingerprint()
    assert spec(InputFile.of(part.path)).fingerprint() != spec(file).fingerprint()


@pytest.mark.parametrize("kind", KINDS)
def test_linked_folders_are_followed_and_each_file_is_read_once(tmp_path, kind):
    put(tmp_path / "elsewhere/x/a", kind, {"prompt": "linked"})
    put(tmp_path / "d/b", kind, {"prompt": "own"})
    (tmp_path / "d/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d/link2").symlink_to(tmp_path / "elsewhere/x")
    (tmp_path / "elsewhere/x/up").symlink_to(tmp_path / "d")  # a cycle
    source = opened(tmp_path / "d")
    assert sorted(row.fields["prompt"] for row in source.rows()) == ["linked", "own"]


def test_what_is_left_out_of_a_folder_is_told(tmp_path):
    put(tmp_path / "data/train-00000-of-00001", "parquet", {"prompt": "a"})
    for name in ("README.md", "dataset_infos.json", "notes.txt", ".gitattributes", "_SUCCESS"):
        (tmp_path / name).write_text("{}")
    told = []
    parts, kind = expand_inputs([str(tmp_path)], told.append)
    assert (kind, [part.path.name for part in parts]) == (
        "parquet",
        ["train-00000-of-00001.parquet"],
    )
    [line] = told
    assert "3 files are skipped" in line
    assert "README.md" in line


def test_a_dataset_of_arrow_files_is_told_how_to_become_parquet(tmp_path):
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff")
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match="save_to_disk") as refused:
        expand_inputs([str(tmp_path)])
    assert "to_parquet" in refused.value.hint


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"prompt": "a"}\n', "jsonl"),
        (b' [{"prompt": "a"}]', "jsonl"),
        ('{"prompt": "a"}'.encode("utf-16"), "jsonl"),
        (b"id,prompt\n1,a\n", "csv"),
        (b"id\tprompt\n1\ta\n", "csv"),
        (b"prompt\nhello\n", "csv"),
        (b"hello world\n", None),
        (b"", None),
    ],
)
def test_a_file_without_a_suffix_is_known_by_how_it_begins(tmp_path, content, kind):
    path = tmp_path / "part-00000"
    path.write_bytes(content)
    found = sniffed(path)
    assert (found and found.name) == kind
    if kind is None:
        with pytest.raises(InputError, match="does not say which format it has"):
            expand_inputs([str(path)])
    else:
        assert opened(path).count() == 1


def test_parquet_without_a_suffix(tmp_path):
    path = put(tmp_path / "a", "parquet", {"prompt": "a"}).rename(tmp_path / "data")
    assert sniffed(path).name == "parquet"
    assert opened(path).count() == 1
