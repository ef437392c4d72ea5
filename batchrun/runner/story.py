"""What a run did, for `batchrun logs`: a line for each stage. Views show the stages themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from batchrun.jobs.journal.results import Counts
from batchrun.jobs.spec import JobSpec
from batchrun.report.text import counted, seconds, size


class Story:
    """Tells the stages of one run.

    Args:
        tell: Called with each line.
    """

    def __init__(self, tell: Callable[[str], None] = lambda _: None) -> None:
        self._tell = tell

    def begins(self, run: int, earlier: Counts, total: int) -> None:
        """Tell that a run begins, and what earlier ones did.

        Args:
            run: Its number, from 1.
            earlier: The results of earlier runs.
            total: Number of rows.
        """
        self._tell(f"run {run} begins: {earlier.rows:,} of {total:,} rows are done")

    def loaded(self, spec: JobSpec, measured: Mapping[str, Any], load_s: float) -> None:
        """Tell what was loaded, and where.

        Args:
            spec: The job.
            measured: What the engine measured, by the names of `batchrun.jobs.metrics`.
            load_s: Seconds that it took.
        """
        line = f"model {measured.get('model') or spec.model.name}"
        if dtype := str(measured.get("arithmetic") or "").partition(" ")[0]:
            line += f" in {dtype}"
        if device := measured.get("device"):
            line += f" on {device}"
        if attention := measured.get("attention"):
            line += f" ({attention} attention)"
        line += f", loaded in {seconds(load_s)}"
        if weights := measured.get("weights_bytes"):
            line += f", weights {size(weights)}"
        self._tell(line)
        budget = spec.runtime.kv_budget
        room = "what the device has free" if budget is None else f"at most {size(budget)}"
        rows = measured.get("max_num_seqs")
        self._tell(f"KV memory: {room}" + (f"; at most {rows:,} rows at a time" if rows else ""))

    def computes(self, rows: int) -> None:
        """Tell how many rows are left to compute."""
        self._tell(f"running: {counted(rows, 'row')}")

    def writes(self, output: str) -> None:
        """Tell where the output goes."""
        self._tell(f"writing the output: {output}")

    def ends(
        self,
        state: str,
        rows: int,
        total: int,
        *,
        failed: int,
        wall_s: float,
        reason: str | None,
    ) -> None:
        """Tell how the run ended.

        Args:
            state: The job's state from now on.
            rows: Rows that are done, by all runs.
            total: Number of rows.
            failed: Rows of the done ones that failed.
            wall_s: How long the run lasted, in seconds.
            reason: Why it failed.
        """
        done = counted(rows, "row") if rows == total else f"{rows:,} of {total:,} rows"
        bad = f" ({failed:,} failed)" if failed else ""
        word = state.partition("-")[0]  # done-with-errors
        self._tell(f"{word}: {done}{bad} in {seconds(wall_s)}" + (f": {reason}" if reason else ""))
