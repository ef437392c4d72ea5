"""Runs tests in a process of their own, which sees another machine."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_tests(file: Path, *options: str, **environment: str) -> None:
    """Run a test file; some of its tests have to run, and none may fail or be skipped.

    Args:
        file: The tests.
        options: Pytest's.
        environment: More variables.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
