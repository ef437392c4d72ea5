"""What a job is called: its id, its name and tags, and what users type to mean it."""

from dataclasses import replace

import pytest

from batchrun.jobs.about import AboutSpec
from batchrun.jobs.errors import JobNotFound, OptionError
from batchrun.jobs.files import read_json, write_json
from batchrun.jobs.folder import create, find
from batchrun.jobs.naming import matching, new_id
from batchrun.jobs.same import find_same
from batchrun.jobs.snapshot import JobSnapshot
from batchrun.jobs.spec import OPTIONS, InputFile


def named(spec, path, name=None):
    return new_id(replace(spec, inputs=(InputFile(path, 1, ""),), about=AboutSpec(name)))


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("/x/prompts.parquet", "prompts"),
        ("/x/prompts2.parquet", "prompts2"),
        ("/x/2026-01.jsonl", "2026-01"),
        ("/x/face1.jsonl", "face1"),
        ("/x/reviews/part-0.parquet", "reviews"),
        ("/x/reviews/lang=de/part-00000-3a5ba1c5-4e9b-c000.snappy.parquet", "reviews"),
        ("/x/imdb/data/train-00000-of-00004.parquet", "imdb"),
        ("/x/My Rows/0001.jsonl.gz", "my-rows"),
        ("s3://bucket/reviews/part-0.parquet", "reviews"),
        ("s3://bucket/part-0.parquet", "bucket"),
        ("/part-0.parquet", "part-0"),
        ("/x/....jsonl", "job"),
    ],
)
def test_an_id_begins_with_what_names_the_dataset(spec, path, stem):
    assert named(spec, path).rsplit("-", 3)[0] == stem


def test_a_name_takes_the_place_of_the_inputs(spec):
    assert named(spec, "/x/part-0.parquet", "Judge: round 2!").startswith("judge-round-2-20")
    assert named(spec, "/x/prompts.parquet", "???").startswith("prompts-20")
    long = named(spec, "/x/p.parquet", "x" * 31 + " y")
    assert long.startswith("x" * 31 + "-20")


def test_neither_name_nor_tags_make_it_other_work(home, spec):
    job = create(home, replace(spec, about=AboutSpec("first", ("a=1", "b"))))
    assert job.spec().about == AboutSpec("first", ("a=1", "b"))
    assert job.id.startswith("first-20")
    assert find_same(home, spec) == job
    now = job.snapshot()
    assert (now.name, now.tags) == ("first", ("a=1", "b"))


@pytest.mark.parametrize("text", ["", "  ", "a\nb", "x" * 101, "\x1b[2J"])
def test_a_tag_is_one_line(text):
    with pytest.raises(OptionError, match="one line"):
        OPTIONS["tag"].read([text])
    assert OPTIONS["tag"].read([" a=b ", "c"]) == ("a=b", "c")


def test_any_part_of_an_id_will_do_and_more_of_it_counts_first(home, spec, monkeypatch):
    ids = ["run", "run-b-x7k2", "other-run-y2", "y2-one"]
    assert matching(ids, "run") == ["run"]
    assert matching(ids, "run-") == ["run-b-x7k2"]
    assert matching(ids, "x7k") == ["run-b-x7k2"]
    assert matching(ids, "y2") == ["y2-one"]
    assert matching(ids, "un") == ["run", "run-b-x7k2", "other-run-y2"]
    assert matching(ids, "z") == matching(ids[1:], "")[:0]
    names = iter(["aa-1-zz", "bb-2-zz"])
    monkeypatch.setattr("batchrun.jobs.folder.new_id", lambda _: next(names))
    first, _ = create(home, spec), create(home, spec)
    assert find(home, "1-z") == first
    with pytest.raises(JobNotFound, match=r"'zz' matches 2 jobs: aa-1-zz, bb-2-zz"):
        find(home, "zz")


def test_a_state_that_an_older_program_noted_is_still_read(job):
    job.set_state("cancelled")
    old = read_json(job.path / "state.json")
    for name in ("name", "tags", "started", "ended", "seconds"):
        del old[name]
    write_json(job.path / "state.json", old)
    found = JobSnapshot.load(job.path)
    assert (found.state, found.model, found.tags, found.seconds) == ("cancelled", "tiny", (), None)
