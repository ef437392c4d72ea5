"""Runs the suites of this folder where there is Triton."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.suites import run_tests

SUITES = sorted(Path(__file__).parent.glob("*_suite.py"))


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_kernels_are_right_when_interpreted(suite: Path) -> None:
    # Longer tracebacks would show, and read, slots that are mostly no memory.
    run_tests(suite, "-p", "tests.interpreted.plugin", "--tb=short", TRITON_INTERPRET="1")
