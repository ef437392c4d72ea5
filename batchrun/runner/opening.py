"""From a job's specification to the engine that computes it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

from batchrun import machine
from batchrun.estimate.measured import Measured
from batchrun.jobs import folder as folders
from batchrun.jobs.spec import JobSpec
from batchrun.runner.reader import prompt_options

Phase = Callable[[str, int, int], None]

if TYPE_CHECKING:
    from batchrun.engine.build import Assembly
    from batchrun.engine.settings import Settings


def import_engine() -> None:
    """Import what computes: torch, transformers and our own code over them."""
    with machine.importing():
        import batchrun.engine.build  # noqa: F401, PLC0415


def open_runtime(
    spec: JobSpec, log: Callable[[str], None], phase: Phase = lambda name, done, of: None
) -> Assembly:
    """The real engine for a job.

    Args:
        spec: The job.
        log: Told what a user should know.
        phase: See `batchrun.engine.build.build`.
    """
    with machine.importing():
        from batchrun.engine.build import build  # noqa: PLC0415 - imports torch
        from batchrun.engine.shortage import device_errors  # noqa: PLC0415

    with device_errors("the model", "--max-num-seqs N"):
        opened = build(engine_settings(spec), prompt_options(spec), log, phase)
    gc.freeze()  # or each collection would go through all of torch and the model again
    return opened


def engine_settings(spec: JobSpec) -> Settings:
    """The engine's settings for a job."""
    from batchrun.engine.settings import Settings  # noqa: PLC0415 - imports torch

    measured = Measured.load(folders.home(), spec)
    asked, known = vars(spec.model) | vars(spec.runtime), {field.name for field in fields(Settings)}
    return Settings(
        model_path=spec.model.path,
        model_name=spec.model.name,
        cache=folders.home() / "verdicts",
        step_cost=measured.step_cost if measured else None,
        **{name: value for name, value in asked.items() if name in known},
    )
