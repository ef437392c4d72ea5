"""`submit` and the commands that follow it, as real processes with a tiny real model."""

import json
import os
import shlex
import shutil
import signal
import subprocess
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.cli.work import stopped_by_signals
from batchrun.jobs.lease import Lease
from tests.cli.conftest import obey_permissions
from tests.tiny import edit_config


def test_a_job_from_start_to_end(batchrun):
    source = batchrun.write("in.parquet", ["one", "two", "three"], weight=[0.5, None, 2.0])
    shown = batchrun.submit(source, "--max-tokens", 5, "-o", "out.parquet", "--token-ids")
    assert shown.code == 0
    assert "3 of 3 rows in" in shown.out
    assert f"output: {batchrun.folder / 'out.parquet'}" in shown.out
    table = pq.read_table(batchrun.folder / "out.parquet")
    assert table.column_names[:2] == ["prompt", "weight"]
    assert table.schema.field("weight").type == pa.float64()
    assert table["prompt"].to_pylist() == ["one", "two", "three"]
    assert table["error"].to_pylist() == [None] * 3
    for row in table.to_pylist():
        assert row["completion_tokens"] == len(row["completion_token_ids"]) <= 5

    job = shown.out.split("batchrun stats ")[1].strip()
    stats = batchrun("stats", "--json").json
    assert (stats["job"], stats["state"], stats["rows"]["done"]) == (job, "done", 3)
    assert job in batchrun("stats", job).out
    [samples] = batchrun("stats", "--samples").json["samples"]
    assert samples
    assert samples[-1]["completions"] <= 3
    listed = batchrun("list", "--json").json
    assert [(row["job"], row["done"], row["total"]) for row in listed] == [(job, 3, 3)]
    report = batchrun("report", "--json").json
    typed = ["batchrun", "submit", str(source), "--max-tokens", "5", "-o", "out.parquet"]
    assert shlex.split(report["command"])[: len(typed)] == typed
    assert "torch" in report["runs"][0]["setup"]["versions"]
    assert [example["prompt"] for example in report["examples"]] == ["one", "two", "three"]
    assert [e["answer"] for e in report["examples"]] == table["completion"].to_pylist()
    assert f"{job}  done   3/3" in batchrun("list").out
    assert batchrun("show", "--json").json["inputs"] == [str(source)]
    assert "max_tokens: 5" in batchrun("show", job[:6]).out
    exported = batchrun("export", "--output", "again.jsonl")
    assert exported.out == f"3 rows in {batchrun.folder / 'again.jsonl'}\n"
    completions = [row["completion"] for row in batchrun.read("again.jsonl")]
    assert completions == table["completion"].to_pylist()

    again = batchrun("resume", "--json")
    assert (again.code, again.json["state"], again.json["rows"]["resumed"]) == (0, "done", 3)


def test_json_on_stdout_is_one_object_and_progress_is_on_stderr(batchrun):
    source = batchrun.write("in.jsonl", ["one", "two"])
    shown = batchrun.submit(source, "--max-tokens", 3, "--json")
    assert shown.json["exit_code"] == shown.code == 0
    assert shown.json["output"] == str(batchrun.folder / "in-completions.jsonl")
    assert "writing the output: 2 of 2 rows" in shown.err
    assert [row["prompt"] for row in batchrun.read("in-completions.jsonl")] == ["one", "two"]


def test_samples_limit_and_chat(batchrun):
    source = batchrun.write("in.jsonl", ["one", "two", "three"])
    shown = batchrun.submit(
        source,
        *("--limit", 2, "--n", 2, "--temperature", 1, "--chat", "--system", "Be brief."),
        *("--max-tokens", 4, "--ignore-eos", "-o", "out.jsonl"),
    )
    assert shown.code == 0
    rows = batchrun.read("out.jsonl")
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        ("one", 0),
        ("one", 1),
        ("two", 0),
        ("two", 1),
    ]
    # system, user and assistant turns of the template, a token each byte
    assert rows[0]["prompt_tokens"] > len("Be brief.one")
    assert {row["completion_tokens"] for row in rows} == {4}
    assert rows[0]["completion"] != rows[1]["completion"]


def test_a_messages_column_is_used_where_there_is_no_prompt(batchrun):
    messages = [[{"role": "user", "content": "hello"}]]
    path = batchrun.folder / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages[0]}) + "\n")
    shown = batchrun.submit(path, "--dry-run", "--json")
    assert shown.json["prompt"] == {"column": "messages"}
    pq.write_table(pa.table({"messages": messages}), batchrun.folder / "chat.parquet")
    shown = batchrun.submit(batchrun.folder / "chat.parquet", "--max-tokens", 2, "-o", "o.jsonl")
    assert shown.code == 0
    assert batchrun.read("o.jsonl")[0]["messages"] == messages[0]


def test_dry_run_checks_everything_and_starts_nothing(batchrun):
    source = batchrun.write("in.parquet", ["one"])
    shown = batchrun.submit(
        source,
        *("--dry-run", "--json", "--stop", "END", "--stop", "\n", "--kv-budget", "1.5MiB"),
        *("--temperature", 0.5, "-o", "out.jsonl"),
    )
    assert shown.code == 0
    assert shown.json["sampling"] == {
        "temperature": 0.5,
        "stop": ["END", "\n"],
        "seed": 0,
        "n": 1,
    }
    assert shown.json["runtime"]["kv_budget"] == 3 << 19
    assert shown.json["output"] == {"path": str(batchrun.folder / "out.jsonl"), "format": "jsonl"}
    assert "nothing was started" in batchrun.submit(source, "--dry-run").out
    assert batchrun("list", "--json").json == []
    assert sorted(p.name for p in batchrun.folder.iterdir()) == ["in.parquet"]


def test_a_second_signal_kills(batchrun):
    code = (
        "import os, signal\n"
        "from batchrun.cli.work import stopped_by_signals\n"
        "with stopped_by_signals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop.is_set()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('not reached')\n"
    )
    shown = subprocess.run(
        [batchrun.argv()[0], "-c", code], capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stdout) == (-signal.SIGINT, "")


def test_handlers_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with stopped_by_signals():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_a_job_of_another_process_is_refused(batchrun):
    job = batchrun.unstarted(batchrun.write("in.jsonl", ["one"]))
    with Lease(job):
        shown = batchrun("resume")
        assert (shown.code, str(os.getpid()) in shown.error) == (1, True)
        assert batchrun("list", "--json").json[0]["state"] == "running"


def test_an_input_that_changed_is_refused(batchrun):
    batchrun.unstarted(batchrun.write("in.jsonl", ["one"]))
    batchrun.write("in.jsonl", ["two"])
    shown = batchrun("resume")
    assert shown.code == 1
    assert "in.jsonl" in shown.error


def test_a_model_that_changed_is_refused(batchrun, tmp_path):
    copy = shutil.copytree(batchrun.model, tmp_path / "copy")
    batchrun = replace(batchrun, model=copy)
    batchrun.unstarted(batchrun.write("in.jsonl", ["one"]))
    edit_config(copy, rms_norm_eps=0.1)
    shown = batchrun("resume")
    assert shown.code == 1
    assert f"the model in {copy}: its weights, config or tokenizer changed" in shown.error


def test_a_damaged_job_hides_no_other(batchrun):
    job = batchrun.unstarted(batchrun.write("in.jsonl", ["one"]))
    broken = job.with_name("broken-job")
    broken.mkdir()
    (broken / "journal.db").write_bytes(b"not a database, at all" * 100)
    (broken / "job.json").write_text("{")
    states = {row["job"]: row["state"] for row in batchrun("list", "--json").json}
    assert states == {job.name: "new", "broken-job": "damaged"}
    shown = batchrun("list").out
    assert job.name in shown
    assert "broken-job" in shown


def test_a_job_that_never_ran_can_be_looked_at(batchrun):
    job = batchrun.unstarted(batchrun.write("in.jsonl", ["one"]))
    assert "0 of ? done" in batchrun("stats").out
    assert f"folder       {job}" in batchrun("show").out
    assert batchrun("export", "--partial").out == f"0 rows in {batchrun.folder / 'out.jsonl'}\n"


def test_doctor_finds_this_machine_fit(batchrun):
    shown = batchrun("doctor", "--json")
    assert (shown.code, shown.json["problems"]) == (0, [])
    assert shown.json["packages"]["torch"]
    assert shown.json["memory"]["total"] > 1 << 30
    assert "cpu (" in batchrun("doctor").out


def test_doctor_names_a_home_that_cannot_be_written(batchrun):
    batchrun.home.mkdir(mode=0o500)
    shown = batchrun("doctor", "--json", before=obey_permissions)
    assert shown.code == 1
    assert str(batchrun.home) in shown.json["problems"][0]


@pytest.mark.parametrize("command", ["stats", "show", "resume", "export"])
def test_an_unknown_job_is_told_what_there_is(batchrun, command):
    shown = batchrun(command)
    assert (shown.code, shown.hint) == (1, "batchrun submit prompts.parquet")
