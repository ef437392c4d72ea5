"""Every parameter of a job as it will be: what the user set, and the defaults in force."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from typing import Any

from batchrun.jobs.kinds import options_of
from batchrun.jobs.spec import JobSpec
from batchrun.options import OPTIONS
from batchrun.report.text import size

_LINE, _MODEL, _DEFAULT = "command line", "model", "default"
_MARKS = {_LINE: "  (set)", _MODEL: "  (the model's)", _DEFAULT: ""}
Parameters = dict[str, dict[str, dict[str, Any]]]


def in_force(
    spec: JobSpec, given: Mapping[str, str], found: Mapping[str, Any], of_model: Collection[str]
) -> Parameters:
    """The job's parameters by section and name: the `value` of each, and where it is `from`.

    Args:
        spec: The job.
        given: Where each option that the user gave comes from, by name.
        found: Values that the model and the machine determine, by name.
        of_model: The names of those that come from the model's files.

    Returns:
        JSON-able. What is off has the value None, False or an empty list.
    """
    values = {
        option.name: getattr(part, option.at)
        for part in (*vars(spec).values(), spec)
        if is_dataclass(part)
        for option in options_of(part)
    }
    if spec.keep is not None:
        values |= {"n": spec.keep, "best_of": spec.n}
    shown: Parameters = {}
    for name, option in OPTIONS.items():
        source = given.get(name) or (_MODEL if name in of_model else _DEFAULT)
        value = found.get(name, values[name])
        section = shown.setdefault(option.section.partition(" (")[0], {})
        value = list(value) if isinstance(value, tuple) else value
        section[name] = {"value": value, "from": source}
    return shown


def as_fields(parameters: Parameters) -> dict[str, dict[str, str]]:
    """The same for people, by section and flag, without what is off unless the user set it."""
    shown = {
        title.lower(): {
            OPTIONS[name].flag[2:]: f"{_written(name, said['value'])}{_mark(said['from'])}"
            for name, said in section.items()
            if said["from"] != _DEFAULT or not _is_off(said["value"])
        }
        for title, section in parameters.items()
    }
    return {title: fields for title, fields in shown.items() if fields}


def _mark(source: str) -> str:
    return _MARKS.get(source, f"  (from {source})")


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _written(name: str, value: Any) -> str:
    if name in {"kv_budget", "page_size"} and isinstance(value, int):
        return size(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(repr, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
