"""The command line's whole job: 4,000 rows as long as chats, through Qwen3-0.6B's shape.

python -m benchmarks.gpu.part chats --out chats.json     under a minute on an H100
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.submit import Trial


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """What `batchrun stats` says of the job, each of its rows checked."""
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(bench, Path(name), whole=True)
        try:
            done = trial.submit("answers.parquet", "--device", "cpu" if bench.toy else "cuda")
            yield trial.figures(done["job"]) | {"wall_s": done["wall_s"]}
            yield trial.answers("answers.parquet")
        finally:
            trial.print_logs()
