"""A sample of the faults that `make crash-test` injects at every step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import shim

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.skipif(
    shim.unsupported_reason() is not None, reason=str(shim.unsupported_reason())
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim.build(tmp_path_factory.mktemp("shim"))


def run(library: Path, module: str, *arguments: str, status: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library)},
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_a_fault_at_every_thirty_first_step(library: Path) -> None:
    report = run(library, "tests.faults.steps", "--stride", "31")
    assert {"short write", "torn write", "failed sync"} <= set(report["cases"])
    assert report["outcomes"]["killed"] > 5
    if shutil.which("strace"):
        assert {"SIGKILL", "EIO", "ENOSPC"} <= set(report["cases"])


def test_a_fault_at_every_twenty_ninth_step_of_what_is_done_between_runs(library: Path) -> None:
    report = run(library, "tests.faults.operations", "--stride", "29")
    assert set(report["cases"]) == {"create", "relocate", "retry", "remove"}
    assert all(sum(faults.values()) >= 4 for faults in report["cases"].values())


def test_power_loss_after_every_fortieth_operation(library: Path) -> None:
    report = run(library, "tests.faults.powerloss", "--stride", "40", "--draws", "3")
    assert report["total"] > 15


def test_a_disk_that_lies_about_syncs_is_found_out(library: Path) -> None:
    options = ("--lying-disk", "--stride", "90", "--draws", "1")
    assert run(library, "tests.faults.powerloss", *options, status=1)["problems"]


@pytest.mark.long
def test_some_of_what_a_run_asks_the_system_for_is_refused(library: Path) -> None:
    calls = ("mmap", "pthread_create")
    report = run(library, "tests.faults.allocations", "--stride", "9", "--only", *calls)
    assert set(report["cases"]) == set(calls)
    assert report["outcomes"]["ended with a message"] >= 2
