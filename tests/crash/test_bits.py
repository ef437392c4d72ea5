"""Answers are the same, bit by bit, however a job is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


def bits(examples: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.bits", "--examples", str(examples)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_a_job_has_the_same_answers_however_it_runs() -> None:
    report = bits(30)
    assert report["examples"] == 30
    assert report["kills"] > 5
    assert report["answers_equal"]


@pytest.mark.long
def test_500_jobs_do() -> None:
    assert bits(500)["examples"] == 500
