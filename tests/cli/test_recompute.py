"""`batchrun verify --recompute`: what it prints, and how it exits."""

from __future__ import annotations

import signal
import subprocess

from batchrun.jobs.folder import find
from tests.cli.conftest import CommandLine
from tests.jobs.test_verify import edit


def test_rows_are_computed_again_and_compared(batchrun: CommandLine) -> None:
    prompts = batchrun.write("in.jsonl", ["one", None, "three"], temperature=[0, 1, 1])
    submitted = batchrun.submit(prompts, "--max-tokens", 5, "--output", "out.jsonl")
    assert submitted.code == 3, submitted.err
    job = find(batchrun.home)

    same = batchrun("verify", "--recompute", 1000, "--seed", 7)
    assert same.code == 0, same.out + same.err
    lines = same.out.splitlines()
    assert lines[:2] == [
        f"{job.id} is sound: 3 rows",
        "2 of 2 rows are the same when recomputed (--seed 7)",
    ]
    varies = batchrun("stats", "--json").json["varies"]
    assert lines[2:] == ([] if varies is None else [f"rows may differ: {varies}"])
    assert "running: 2 of 2 rows" in same.err

    edit(job, "UPDATE results SET token_ids = x'63000000' WHERE id = 2")
    differs = batchrun("verify", "--recompute", 1000)
    assert differs.code == 1
    assert "row 2 differs from token 0 on: 99 " in differs.out
    assert "1 of 2 rows are the same when recomputed (--seed " in differs.out

    wrong = batchrun("verify", "--seed", 1)
    assert wrong.code == 2
    assert wrong.error == "--seed chooses the rows to recompute: add --recompute ROWS"


def test_ctrl_c_ends_it(batchrun: CommandLine) -> None:
    prompts = batchrun.write("in.jsonl", ["one"])
    assert batchrun.submit(prompts, "--max-tokens", 2, "--output", "out.jsonl").code == 0
    with subprocess.Popen(
        batchrun.argv("verify", "--recompute", 1),
        cwd=batchrun.folder,
        env=batchrun.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("loading the model"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)  # to the parent alone
        process.send_signal(signal.SIGINT)
        left = process.stderr.read()
    assert process.returncode == 130, left
    assert left.splitlines()[-1] == "error: interrupted"
