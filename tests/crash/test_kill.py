"""Nothing is lost, doubled or changed by SIGKILL at any moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_kills_change_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.harness", "--tiny", "--kills", "12", "--rows", "80"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == 12
    assert report["outputs_equal"]
    assert report["runs_that_left_part_of_the_rows"] > 4
