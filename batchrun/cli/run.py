"""`batchrun submit` and `batchrun resume`: make a job, start its worker, watch it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from batchrun.cli import attach
from batchrun.cli.describe import job_parameters, print_fields
from batchrun.cli.inspect import job_argument
from batchrun.cli.options import (
    SectionCommand,
    model_options,
    output_options,
    prompt_options,
    runtime_options,
    sampling_options,
    submit_options,
)
from batchrun.cli.specs import make_spec
from batchrun.models import fingerprint
from jobs.errors import JobError
from jobs.folder import create, find, find_same, home, list_jobs

_RESUMABLE = {"new", "interrupted", "failed", "cancelled"}


def _watching(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--wait/--detach",
        default=True,
        help="Watch until the job ends, and exit as it did; or return at once with the job's id.",
    )(command)
    return click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")(
        command
    )


@click.command(cls=SectionCommand)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@model_options
@prompt_options
@sampling_options
@output_options
@runtime_options
@submit_options
def submit_command(
    inputs: tuple[str, ...],
    dry_run: bool,
    wait: bool,
    again: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Run a model over every row of a file.

    INPUT is a Parquet or JSON Lines file (also .gz, .zst), a folder of them or a glob; several make
    one job. Every row has a column `prompt` (text) or `messages` (a chat), or gets its prompt from
    --template. The output has all input columns, then completion, finish_reason, prompt_tokens,
    completion_tokens and error, in input order.

    The job runs in a process of its own. Ctrl-C leaves the view, not the job.
    """
    root = home()
    spec = make_spec(inputs, root, options, log=lambda line: click.echo(line, err=True))
    if dry_run:
        if as_json:
            click.echo(json.dumps(job_parameters(spec), indent=2))
        else:
            print_fields(job_parameters(spec))
            click.echo("\neverything checks out; nothing was started (--dry-run)")
        return 0
    same = None if again else find_same(root, spec)
    if same is not None:
        counts, total, state = same.counts(), same.total(), same.state()
        only_failed = " --retry-failed" if state == "done-with-errors" else ""
        raise JobError(
            f"the job {same.id} is the same work, {state} with {counts.rows:,} of "
            f"{'?' if total is None else format(total, ',')} rows done"
            + (f", {counts.failed:,} of them failed" if counts.failed else ""),
            hint=f"batchrun resume {same.id}{only_failed}, or submit with --again to begin anew",
        )
    return attach.run(create(root, spec), as_json=as_json, detach=not wait)


@click.command()
@job_argument
@click.option("--all", "every", is_flag=True, help="Continue every job that is not done.")
@click.option("--retry-failed", is_flag=True, help="Do the failed rows again, and only those.")
@click.option(
    "--moved",
    multiple=True,
    metavar="OLD=NEW",
    help="An input or the model that lies elsewhere now; its content must be the same.",
)
@_watching
def resume_command(
    job: str | None,
    *,
    every: bool,
    retry_failed: bool,
    moved: tuple[str, ...],
    wait: bool,
    as_json: bool,
) -> int:
    """Continue a job that was stopped: finished rows are kept, begun ones go on where they were.

    JOB is its id or the beginning of one; without it, the latest job continues.
    """
    root = home()
    if every:
        jobs = [found for found in list_jobs(root) if found.state() in _RESUMABLE]
    else:
        jobs = [find(root, job)]
    for found in jobs:
        for pair in moved:
            old, equals, new = pair.partition("=")
            if not equals:
                raise click.UsageError(f"--moved {pair}: write OLD=NEW")
            found.relocate(old, new, fingerprint)
        if retry_failed:
            count = found.retry_failed()
            click.echo(f"{count:,} failed results of {found.id} are to do again", err=True)
    return max((attach.run(found, as_json=as_json, detach=not wait) for found in jobs), default=0)
