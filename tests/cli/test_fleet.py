"""Several devices, as users ask for them."""

from __future__ import annotations

import json

import pytest

from batchrun.jobs.holders import holders
from batchrun.jobs.lease import LOCK
from tests.cli.conftest import CommandLine

PROMPTS = [f"{'alike ' * (i % 3 * 5)}row {i}" for i in range(40)]
OPTIONS = ("--max-tokens=8", "--temperature=0.7", "--dtype=float32")


def test_two_workers_write_what_one_device_does(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", PROMPTS)
    alone = batchrun.submit(source, *OPTIONS, "--output", "one.jsonl")
    assert alone.code == 0, alone.err
    both = ("--output", "two.jsonl", "--devices", "cpu:2")
    done = batchrun.submit(source, *OPTIONS, *both, "--again")
    assert done.code == 0, done.err
    assert batchrun.read("two.jsonl") == batchrun.read("one.jsonl")
    stats = batchrun("stats", "--json").json
    assert [device["device"] for device in stats["devices"]] == ["cpu:0", "cpu:1"]
    shown = batchrun("show").out
    assert "cpu:2" in shown
    failed = batchrun("resume", "--workers", "2")
    assert failed.code == 2
    assert "--workers needs --ray" in failed.error


def test_a_job_goes_on_with_other_devices(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", PROMPTS)
    job = batchrun.unstarted(source)
    assert batchrun("resume", job.name, "--devices", "cpu:2").code == 0
    assert len(batchrun.read("out.jsonl")) == len(PROMPTS)
    limits = json.loads((job / "limits.json").read_text())
    assert limits["devices"] == "cpu:2"
    assert limits["ray"] is None
    assert "cpu:1" in batchrun("stats").out


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        (["--devices", "gpu"], "'gpu' names no devices", None),
        (["--devices", "0,1,0"], "names a device twice", None),
        (["--devices", "cpu:0"], "names no devices", None),
        (["--devices", "all", "--ray", "auto"], "Ray places the workers", None),
        (["--devices", "all", "--device", "cpu"], "both say where to compute", None),
        (["--workers", "2"], "--workers needs --ray", None),
        (["--ray", "auto", "--gpus-per-worker", "1.5"], "a whole number, or a fraction", None),
        (["--ray", "auto", "--gpus-per-worker", "-1"], "not a number of 0 or more", None),
        (["--devices", "cpu:9999"], "this machine has", "use --devices cpu:"),
        (["--devices", "0"], "the device cuda:0 can't be used", "batchrun doctor"),
    ],
)
def test_what_can_not_be_is_said_before_there_is_a_job(
    batchrun: CommandLine, options: list[str], said: str, hint: str | None
) -> None:
    source = batchrun.write("in.jsonl", PROMPTS[:2])
    failed = batchrun.submit(source, *options)
    assert failed.code == (2 if hint is None else 1)
    assert said in failed.error
    assert (hint or "") in failed.hint
    assert batchrun("list", "--json").json == []


def test_a_cluster_that_is_not_there(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", PROMPTS[:2])
    failed = batchrun.submit(source, "--ray", "127.0.0.1:1")
    assert failed.code == 1
    assert "the Ray cluster 127.0.0.1:1 can't be reached" in failed.error
    assert "ray start --head" in failed.hint


def test_a_cancelled_job_leaves_no_worker(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", [f"row {i}" for i in range(3000)])
    options = ("--devices", "cpu:2", "--max-tokens", "200", "--ignore-eos", "--detach", "--json")
    job = batchrun.home / "jobs" / batchrun.submit(source, *options).json["job"]
    while batchrun("stats", "--json").json["tokens"]["completion"] == 0:
        assert holders(job / LOCK)
    assert len(holders(job / LOCK)) == 4  # supervisor, coordinator, workers
    assert "cancelled" in batchrun("cancel", job.name).out
    assert holders(job / LOCK) == []


def test_the_plan_of_two_workers(batchrun: CommandLine) -> None:
    source = batchrun.write("in.jsonl", PROMPTS)
    one, two = (
        batchrun("plan", source, *OPTIONS, "--max-num-seqs=4", *more, "--json").json
        for more in ([], ["--devices", "cpu:2"])
    )
    assert (one["engines"], two["engines"]) == (1, 2)
    assert two["steps"] < 0.7 * one["steps"]
    assert two["kv"]["budget_bytes"] < one["kv"]["budget_bytes"]
    assert "each of 2 devices" in batchrun("plan", source, *OPTIONS, "--devices", "cpu:2").out
