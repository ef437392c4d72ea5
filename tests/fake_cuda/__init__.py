"""A CUDA driver over the host's memory, with the real one's rules, and tests run over it."""

import os
from pathlib import Path

from tests.suites import run_tests


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
    own = {"BATCHRUN_TEST_MEMORY": twin, "LD_LIBRARY_PATH": path}
    run_tests(file, *options, **{**own, **environment})
