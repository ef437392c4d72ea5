"""`--name` and `--tag` on the command line and in Python."""

from batchrun.jobs.folder import list_jobs
from batchrun.options import OPTIONS
from batchrun.specs import read_options


def test_a_dry_run_shows_them_and_refuses_what_is_no_line(batchrun):
    source = batchrun.write("in.jsonl", ["one"])
    shown = batchrun.submit(
        *(source, "-o", "o.jsonl", "--dry-run", "--json", "--name", " Judge "),
        *("--tag", "lang=de", "--tag", "new"),
    )
    assert (shown.json["name"], shown.json["tags"]) == ("Judge", ["lang=de", "new"])
    refused = batchrun.submit(source, "-o", "o.jsonl", "--dry-run", "--tag", "a\nb")
    assert refused.code == 2
    assert "one line" in refused.error
    planned = batchrun("plan", source, "--model", batchrun.model, "--tag", "x", "--json")
    assert planned.code == 0, planned.err
    assert list_jobs(batchrun.home) == []


def test_python_has_the_same_names():
    asked = read_options({"name": "judge", "tag": "one"})
    assert (asked["name"], asked["tag"]) == ("judge", ("one",))
    assert {"name", "tag"} <= set(OPTIONS)
