"""`batchrun submit` and `batchrun resume`: make a job, run it, say how it went."""

from __future__ import annotations

import json
from typing import Any

import click

from batchrun.cli.describe import job_parameters, print_fields
from batchrun.cli.foreground import run_in_foreground
from batchrun.cli.options import (
    SectionCommand,
    model_options,
    output_options,
    prompt_options,
    runtime_options,
    sampling_options,
)
from batchrun.cli.plan import make_spec
from jobs.folder import create, find, home


@click.command(cls=SectionCommand)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@model_options
@prompt_options
@sampling_options
@output_options
@runtime_options
def submit_command(inputs: tuple[str, ...], dry_run: bool, as_json: bool, **options: Any) -> int:
    """Run a model over every row of a file.

    INPUT is a Parquet or JSON Lines file (also .gz, .zst), a folder of them or a glob; several make
    one job. Every row has a column `prompt` (text) or `messages` (a chat), or gets its prompt from
    --template. The output has all input columns, then completion, finish_reason, prompt_tokens,
    completion_tokens and error, in input order.
    """
    root = home()
    spec = make_spec(inputs, root, options, log=lambda line: click.echo(line, err=True))
    if not dry_run:
        return run_in_foreground(create(root, spec), as_json=as_json)
    if as_json:
        click.echo(json.dumps(job_parameters(spec), indent=2))
    else:
        print_fields(job_parameters(spec))
        click.echo("\neverything checks out; nothing was started (--dry-run)")
    return 0


@click.command()
@click.argument("job", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def resume_command(job: str | None, as_json: bool) -> int:
    """Continue a job that was stopped, from the last row in its journal.

    JOB is its id or the beginning of one; without it, the latest job continues.
    """
    return run_in_foreground(find(home(), job), as_json=as_json)
