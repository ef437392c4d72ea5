"""Workers, coordinators and Ray's actors are killed, and every row has its own answer once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("options", "trials"),
    [((), 6), pytest.param(("--ray",), 3, marks=pytest.mark.long)],
    ids=["processes", "ray"],
)
def test_kills_change_nothing(options: tuple[str, ...], trials: int) -> None:
    if "--ray" in options:
        pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.fleet", "--trials", str(trials), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["trials"] == trials
    assert report["outputs_equal"]
