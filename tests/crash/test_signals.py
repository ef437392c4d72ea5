"""Signals at random moments, and workers that race for one job: samples of `make crash-test`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_signals_to_worker_viewer_both_and_group() -> None:
    report = run("tests.crash.signals", "--trials", "15")
    assert report["trials"] == 15
    assert report["outputs_equal"]


def test_one_of_two_workers_writes_and_the_other_leaves_with_a_message() -> None:
    report = run("tests.crash.races", "--races", "9")
    assert report["left_with"] == {"LeaseHeld": 6, "Fenced": 3}
