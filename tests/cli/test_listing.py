"""`batchrun list`: what fits in a terminal, all of it as JSON, and no journal that need not be."""

import io
import json
import os
import re
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner

from batchrun.cli import cli
from batchrun.cli.listing import _duration, _print, _rate, _when, listed
from batchrun.jobs.about import AboutSpec
from batchrun.jobs.folder import create, list_jobs
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result
from batchrun.jobs.lease import Lease
from batchrun.runner.live import Progress, Reporter
from tests.jobs.conftest import home, prompts, spec  # noqa: F401 - fixtures

ANSI = re.compile(r"\x1b\[\d*m")


@pytest.fixture
def run(home, monkeypatch):  # noqa: F811
    monkeypatch.setenv("BATCHRUN_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments):
        return CliRunner().invoke(cli, ["list", *arguments])

    return call


def ended(job, state, *, rows=3, failed=0, seconds=2.0):
    with Lease(job.path):
        with job.journal(readonly=False) as journal:
            journal.begin_run()
            journal.set_meta("rows_total", 3)
            bad = [Result(row, 0, "error", error="no", error_kind="x") for row in range(failed)]
            journal.write(bad + [Result(row, 0, "ok", "x") for row in range(failed, rows)])
            journal.end_run(state, {"wall_s": seconds})
        job.set_state(state)
    return job


def made(home, spec, names):  # noqa: F811
    """Jobs of these names and tags, the first the oldest."""
    jobs = []
    for number, (name, *tags) in enumerate(names):
        job = create(home, replace(spec, about=AboutSpec(name, tuple(tags))))
        os.utime(job.path / "job.json", (1000 + number, 1000 + number))
        jobs.append(job)
    return jobs


def test_the_newest_comes_first(run, home, spec):  # noqa: F811
    jobs = made(home, spec, [["a"], ["b"], ["c"]])
    assert [row["job"] for row in json.loads(run("--json").output)] == [j.id for j in jobs[::-1]]
    lines = run().output.splitlines()
    assert lines[0].split()[:3] == ["JOB", "STATE", "ROWS"]
    assert [line.split()[0] for line in lines[1:]] == [job.id for job in jobs[::-1]]
    assert [row["job"] for row in json.loads(run("--json", "-n", "1").output)] == [jobs[2].id]


def test_filters(run, home, spec):  # noqa: F811
    a, b, c = made(home, spec, [["a", "lang=de", "new"], ["b", "lang=en"], ["c"]])
    ended(a, "done")
    ended(b, "failed", rows=1)

    def names(*arguments):
        return [row["job"] for row in json.loads(run("--json", *arguments).output)]

    assert names("--state", "done") == [a.id]
    assert names("--state", "done,failed", "--state", "new") == [c.id, b.id, a.id]
    assert names("--tag", "lang") == [b.id, a.id]
    assert names("--tag", "lang=de", "--tag", "new") == [a.id]
    assert names("--tag", "lan") == []
    assert names("--name", "b-20") == [b.id]
    assert "no job in" in run("--name", "zzz").output
    refused = run("--state", "finished")
    assert refused.exit_code == 2
    assert "done-with-errors" in refused.output


def test_json_has_all(run, home, spec):  # noqa: F811
    [job] = made(home, spec, [["judge", "k=v"]])
    ended(job, "done-with-errors", failed=1)
    [row] = json.loads(run("--json").output)
    assert {name: row[name] for name in ("job", "state", "done", "total", "failed")} == {
        "job": job.id,
        "state": "done-with-errors",
        "done": 3,
        "total": 3,
        "failed": 1,
    }
    assert (row["name"], row["tags"], row["created"]) == ("judge", ["k=v"], 1000)
    assert row["started"] <= row["ended"] <= time.time()
    assert row["rows_per_s"] == pytest.approx(3 / row["seconds"])
    assert row["seconds_left"] is None
    assert "done, 1 failed" in run().output


def test_no_journal_of_a_finished_job_is_opened(run, home, spec, monkeypatch):  # noqa: F811
    for job in made(home, spec, [["a"], ["b"]]):
        ended(job, "done")

    def opened(*_, **__):
        raise AssertionError("a journal was opened")

    monkeypatch.setattr(Journal, "__init__", opened)
    assert len(json.loads(run("--json").output)) == 2


def test_a_running_job_says_its_pace_and_what_is_left(home, spec):  # noqa: F811
    [job] = made(home, spec, [["a"]])
    with Lease(job.path), Reporter(job.path) as reporter:
        with job.journal(readonly=False) as journal:
            journal.begin_run()
            journal.set_meta("rows_total", 100)
            journal.write([Result(row, 0, "ok", "x") for row in range(40)])
        job.set_state("running")
        now = Progress(
            rows_total=100,
            rows_done=40,
            rows_failed=0,
            rows_resumed=20,
            completion_tokens=9,
            running=1,
            waiting=0,
            elapsed_s=10.0,
            phase="run",
            seconds_left=30.0,
        )
        reporter.update(now)
        row = listed(job)
        assert (row["state"], row["rows_per_s"], row["seconds_left"]) == ("running", 2.0, 30.0)
        assert row["seconds"] == 10.0  # the journal has no figures yet
        reporter.update(replace(now, rows_done=24, phase="next"))
        assert listed(job)["rows_per_s"] is None


def row_of(number, **more):
    return {
        "job": f"prompts-20261121-0837-x7k{number}",
        "state": "done",
        "done": 123_456,
        "total": 123_456,
        "failed": 0,
        "model": "smollm2-135m-instruct",
        "output": f"/data/{'x' * 60}/out.parquet",
        "created": time.time() - 86400 * 3,
        "seconds": 7230.0,
        "rows_per_s": 17.0,
        "seconds_left": None,
        **more,
    }


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_a_table_fits_the_terminal(width):
    rows = [row_of(1), row_of(2, state="running", done=5000, seconds_left=8000.0)]
    stream = io.StringIO()
    _print(rows, width, stream)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    titles = lines[0].split()
    assert (
        titles
        == ["JOB", "STATE", "ROWS", "LEFT", "CREATED", "TIME", "RATE", "MODEL", "OUTPUT"][
            : len(titles)
        ]
    )
    assert len(titles) >= {40: 2, 80: 6, 100: 7, 200: 9}[width]


def test_an_id_is_never_cut():
    stream = io.StringIO()
    _print([row_of(1, job="y" * 90)], 80, stream)
    assert "y" * 90 in stream.getvalue()


def test_colours_are_for_terminals_whose_users_want_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    rows = [row_of(1), row_of(2, state="failed"), row_of(3, state="\x1b[2J")]
    plain, coloured, refused = io.StringIO(), Terminal(), Terminal()
    _print(rows, 80, plain)
    _print(rows, 80, coloured)
    assert ANSI.search(plain.getvalue()) is None
    assert "\x1b[32mdone" in coloured.getvalue()
    assert "\x1b[31mfailed" in coloured.getvalue()
    assert "\x1b[2J" not in coloured.getvalue()
    assert ANSI.sub("", coloured.getvalue()) == plain.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    _print(rows, 80, refused)
    assert refused.getvalue() == plain.getvalue()


def test_cells_are_short():
    assert [_duration(s) for s in (0.04, 59.9, 59.96, 125, 3599.7, 11520, 190_000)] == [
        *("0.0s", "59.9s", "1m00s", "2m05s", "1h00m", "3h12m", "2d04h")
    ]
    assert [_rate(r) for r in (1234.5, 12.34, 1.26, 0.2)] == [
        "1,234/s",
        "12/s",
        "1.3/s",
        "12.0/min",
    ]
    now = time.time()
    assert re.fullmatch(r"\d\d:\d\d", _when(now, now))
    assert re.fullmatch(r"\w{3} \d\d", _when(now - 5 * 86400, now))
    assert re.fullmatch(r"\d{4}-\d\d", _when(now - 500 * 86400, now))
    assert _when(1e30, now) == "?"


def test_a_working_folder_that_was_removed_is_no_matter(run, home, spec, tmp_path, monkeypatch):  # noqa: F811
    [job] = made(home, spec, [["a"]])
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert job.id in run().output


def test_no_jobs(run, home, spec):  # noqa: F811
    assert "start one with" in run().output
    made(home, spec, [["a"]])
    assert len(list_jobs(home)) == 1
