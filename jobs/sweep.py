"""What killed processes left in the folder of jobs."""

from __future__ import annotations

import glob
import shutil
from pathlib import Path

from batchrun.jobs import files, queue


def sweep(root: Path) -> None:
    """Remove what killed processes left: half-made or half-removed jobs, and queue places.

    Call it while nobody submits: under `batchrun.jobs.output.destination.one_at_a_time`.
    """
    queue.sweep(root)
    folder = root / "jobs"
    for name in glob.glob(".????????.tmp", root_dir=folder):
        shutil.rmtree(folder / name, ignore_errors=True)
    files.remove_unlocked(folder, ".stdin-????????.*")
