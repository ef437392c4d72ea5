"""From a job's specification to the engine that computes it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

from batchrun import machine
from batchrun.estimate.measured import Measured
from batchrun.jobs import folder as folders
from batchrun.jobs.spec import JobSpec
from batchrun.runner.reader import prompt_options

if TYPE_CHECKING:
    from batchrun.engine.build import Assembly
    from batchrun.engine.settings import Settings


def open_runtime(spec: JobSpec, log: Callable[[str], None]) -> Assembly:
    """The real engine for a job."""
    with machine.importing():
        from batchrun.engine.build import build  # noqa: PLC0415 - imports torch
        from batchrun.engine.shortage import device_errors  # noqa: PLC0415

    with device_errors("the model", "--max-num-seqs N"):
        opened = build(engine_settings(spec), prompt_options(spec), log)
    gc.freeze()  # or each collection would go through all of torch and the model again
    return opened


def engine_settings(spec: JobSpec) -> Settings:
    """How a job's model is to run."""
    from batchrun.engine.settings import Settings  # noqa: PLC0415 - imports torch

    measured = Measured.load(folders.home(), spec)
    model, not_engine = spec.model, {"plan", "param_columns"}
    runtime = {k: v for k, v in vars(spec.runtime).items() if k not in not_engine}
    return Settings(
        model_path=model.path,
        model_name=model.name,
        fingerprint=model.fingerprint,
        cache=folders.home() / "verdicts",
        dtype=model.dtype,
        quantize=model.quantize,
        trust_remote_code=model.trust_remote_code,
        max_model_len=model.max_model_len,
        step_cost=measured.step_cost if measured else None,
        **runtime,
    )
