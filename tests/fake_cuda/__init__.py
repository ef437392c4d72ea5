"""A CUDA driver over the host's memory, with the real one's rules, and tests run over it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_suite(
    file: Path, twin: str, library: Path | None = None, *options: str, **environment: str
) -> None:
    """Run a test file in a process whose memory is `twin`'s: see tests/allocator/memory_twins.py.

    Args:
        file: The tests.
        twin: `host`, `unguarded-host`, `fake-cuda` or `cuda`.
        library: Folder of the fake driver.
        options: More of pytest's.
        environment: More variables.
    """
    path = os.environ.get("LD_LIBRARY_PATH", "")
    path = f"{library}:{path}".rstrip(":") if library else path
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "BATCHRUN_TEST_MEMORY": twin, "LD_LIBRARY_PATH": path, **environment},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
