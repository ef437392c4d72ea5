"""What a run tells of its stages, and who sees it."""

import json
import math

from click.testing import CliRunner

from batchrun.cli import cli
from batchrun.jobs.journal.results import Counts
from batchrun.jobs.options import ModelSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import JobSpec
from batchrun.runner.live import NOTE, STORY, LogTail, Progress, Reporter, read_progress
from batchrun.runner.story import Story


def spec_with(budget=None):
    runtime = RuntimeSpec(kv_budget=budget)
    model = ModelSpec(name="tiny")
    return JobSpec((), "jsonl", PromptSpec(), model, SamplingSpec(), runtime=runtime)


def test_each_stage_is_a_line():
    lines = []
    story = Story(lines.append)
    measured = {"model": "tiny", "arithmetic": "bfloat16 avx512", "device": "cpu"}
    measured |= {"attention": "native", "weights_bytes": 256 << 20, "max_num_seqs": 256}
    story.begins(2, Counts(310, 310, 0, 0, 0, 0), 1000)
    story.loaded(spec_with(), measured, 3.1)
    story.loaded(spec_with(1 << 30), {}, 3.1)
    story.computes(690)
    story.writes("/data/out.parquet")
    story.ends("done-with-errors", 1000, 1000, failed=3, wall_s=125.0, reason=None)
    story.ends("cancelled", 400, 1000, failed=0, wall_s=2.0, reason=None)
    story.ends("failed", 0, 1000, failed=0, wall_s=2.0, reason="the disk is full")
    assert lines == [
        "run 2 begins: 310 of 1,000 rows are done",
        "model tiny in bfloat16 on cpu (native attention), loaded in 3.1 s, weights 256.0 MiB",
        "KV memory: what the device has free; at most 256 rows at a time",
        "model tiny, loaded in 3.1 s",
        "KV memory: at most 1.0 GiB",
        "running: 690 rows",
        "writing the output: /data/out.parquet",
        "done: 1,000 rows (3 failed) in 2 min 5 s",
        "cancelled: 400 of 1,000 rows in 2.0 s",
        "failed: 0 of 1,000 rows in 2.0 s: the disk is full",
    ]


def test_one_row_is_not_rows():
    lines = []
    story = Story(lines.append)
    story.computes(1)
    story.ends("done", 1, 1, failed=0, wall_s=2.0, reason=None)
    assert lines == ["running: 1 row", "done: 1 row in 2.0 s"]


def test_the_end_of_a_phase_is_published_however_soon_it_comes(tmp_path):
    """Else a view would end with `0 of 3 rows` of an output that was written."""
    with Reporter(tmp_path) as reporter:
        for done in (0, 1, 2, 3):
            reporter.update(Progress(phase="export", phase_done=done, phase_total=3))
    assert read_progress(tmp_path).phase_done == 3


def test_a_line_of_the_log_has_a_level(tmp_path):
    with Reporter(tmp_path) as reporter:
        reporter.message("a note")
        Story(reporter.story).computes(3)
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(b'{"time": 1.5, "message": "old"}\n')  # an older program's
        log.write(b'{"time":\n{"time": 2, "level": [], "message": 3}\n')  # damaged
    found = [(line["level"], line["message"]) for line in LogTail(tmp_path).lines()]
    assert found == [
        (NOTE, "a note"),
        (STORY, "running: 3 rows"),
        (NOTE, "old"),
        (NOTE, "'{\"time\":'"),
        (NOTE, "3"),
    ]
    assert math.isnan(list(LogTail(tmp_path).lines())[3]["time"])


def test_logs_as_json_has_an_object_a_line(tmp_path):
    (tmp_path / "journal.db").touch()  # so that it is a job's folder
    with Reporter(tmp_path) as reporter:
        reporter.message("a note")
        reporter.story("running: 3 rows")
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(b"damaged\n")
    shown = CliRunner().invoke(cli, ["logs", str(tmp_path), "--json"])
    lines = [json.loads(line) for line in shown.output.splitlines()]
    assert [line["level"] for line in lines] == [NOTE, STORY, NOTE]
    assert lines[0]["time"] > 0
    assert lines[2]["time"] is None
    assert "running: 3 rows" in CliRunner().invoke(cli, ["logs", str(tmp_path)]).output
