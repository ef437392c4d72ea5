"""A job's parameters, as `submit --dry-run` and `show` print them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchrun.jobs.spec import JobSpec
from batchrun.terminal import say

_NOT_SAID: tuple[object, ...] = (None, False, (), {}, "")


def job_parameters(spec: JobSpec) -> dict[str, Any]:
    """What a job was asked for, JSON-able; what was left to its default is left out."""
    samples = {"n": spec.n} if spec.keep is None else {"n": spec.keep, "best_of": spec.n}
    runtime = _given(spec.runtime)
    columns = runtime.pop("param_columns", None)
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
        "runtime": runtime,
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


def _given(part: object) -> dict[str, Any]:
    said = {name: value for name, value in vars(part).items() if value not in _NOT_SAID}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in said.items()}
