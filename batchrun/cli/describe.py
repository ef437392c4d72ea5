"""A job's parameters, as `submit --dry-run` and `show` print them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchrun.jobs.spec import JobSpec
from batchrun.terminal import say


def job_parameters(spec: JobSpec) -> dict[str, Any]:
    """What a job was asked for, JSON-able; what was left to its default is left out."""
    samples = {"n": spec.n} if spec.keep is None else {"n": spec.keep, "best_of": spec.n}
    runtime = dict(spec.runtime)
    columns = runtime.pop("param_columns", [])
    parameters: dict[str, Any] = {
        "inputs": [file.path for file in spec.inputs],
        "prompt": _given(spec.prompt),
        "model": _given(spec.model),
        "sampling": {
            **_given(spec.sampling),
            "seed": spec.seed,
            **samples,
            **({"from_columns": columns} if columns else {}),
        },
        "output": _given(spec.output),
        "runtime": _given(runtime),
    }
    if spec.limit is not None:
        parameters["limit"] = spec.limit
    return parameters


def print_fields(fields: Mapping[str, Any]) -> None:
    """Prints a field a line, a list's items and a mapping's pairs below each other."""
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        lines = [str(value)]
        if isinstance(value, Mapping):
            lines = [f"{key}: {item}" for key, item in value.items()]
        elif isinstance(value, list):
            lines = [str(item) for item in value]
        for label, line in zip([name, *[""] * len(lines)], lines or ["-"], strict=False):
            say(f"{label:<{width}}  {line}")


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value not in (None, False, [], ())}
