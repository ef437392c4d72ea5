"""`batchrun stats` and `show`: what job folders say. Read-only, even while jobs run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any

import click

from batchrun.cli.jobnames import JOB
from batchrun.jobs.folder import find, home
from batchrun.jobs.spec import JobSpec
from batchrun.jobs.stats import summarise
from batchrun.report.text import render
from batchrun.terminal import say, say_json

_NOTHING: tuple[object, ...] = (None, (), {}, "")

job_argument = click.argument("job", required=False, type=JOB)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@job_argument
@json_option
@click.option(
    "--samples", is_flag=True, help="Print JSON that includes the figures of each run over time."
)
def stats_command(job: str | None, as_json: bool, samples: bool) -> None:
    """Show where a job's rows, time and memory went.

    JOB is its id or a part of one; without it, the latest job is shown. While a job runs,
    the figures are those of its last commit to the journal.
    """
    folder = find(home(), job)
    summary = summarise(folder)
    if samples:
        with folder.journal() as journal:
            summary["samples"] = [journal.samples(run["id"]) for run in journal.runs()]
    if as_json or samples:
        say_json(summary)
    else:
        say(*render(summary).split("\n"))


@click.command()
@job_argument
@json_option
def show_command(job: str | None, as_json: bool) -> None:
    """Show one job: its inputs, parameters and runs.

    JOB is its id or a part of one; without it, the latest job is shown.
    """
    folder = find(home(), job)
    spec = folder.spec()
    with folder.journal() as journal:
        runs = journal.runs()
    now, failure = folder.snapshot(), folder.failure()
    shown: dict[str, Any] = {
        "job": folder.id,
        "folder": str(folder.path),
        "state": now.state,
        **({"reason": failure[0]} if failure is not None else {}),
        "rows": {"total": now.total, "done": now.done, "failed": now.failed},
        **job_parameters(spec),
        "fingerprint": spec.fingerprint(),
    }
    if as_json:
        listed = [{key: run[key] for key in ("started_at", "ended_at", "state")} for run in runs]
        say_json({**shown, "runs": listed})
        return
    print_fields({**shown, "runs": [_run_line(run) for run in runs]})


def when(seconds: float) -> str:
    """A time on this machine's clock; question marks if it is invalid."""
    try:
        return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):  # the line is damaged
        return "?" * len("2000-01-01 00:00:00")


def _run_line(run: dict[str, Any]) -> str:
    wall = run["stats"].get("wall_s") or (run["ended_at"] or time.time()) - run["started_at"]
    return f"{when(run['started_at'])}, {run['state'] or 'running or killed'}, {wall:.1f} s"


def job_parameters(spec: JobSpec) -> dict[str, Any]:
    """What a job was asked for, JSON-able, without defaults."""
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
    if spec.about.name is not None:
        parameters["name"] = spec.about.name
    if spec.about.tags:
        parameters["tags"] = list(spec.about.tags)
    return parameters


def print_fields(fields: Mapping[str, Any]) -> None:
    """Prints one field per line, the items of a list or mapping below each other."""
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        lines = [str(value)]
        if isinstance(value, Mapping):
            lines = [f"{key}: {item}" for key, item in value.items()]
        elif isinstance(value, list):
            lines = [str(item) for item in value]
        for label, line in zip([name, *[""] * len(lines)], lines or ["-"], strict=False):
            say(f"{label:<{width}}  {line}")


def _given(part: Any) -> dict[str, Any]:
    usual = {field.name: field.default for field in fields(part)}
    said = {
        name: value
        for name, value in vars(part).items()
        # A switch is told if it isn't as usual, a number also if it is 0.
        if value not in _NOTHING and not (isinstance(value, bool) and value == usual[name])
    }
    return {name: list(v) if isinstance(v, tuple) else v for name, v in said.items()}
