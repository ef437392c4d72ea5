"""`batchrun export`: a job's results as a file, also of a job that is not finished."""

from __future__ import annotations

from pathlib import Path

import click

from batchrun.cli.inspect import job_argument
from batchrun.cli.specs import output_settings
from jobs.destination import exporting
from jobs.export import export
from jobs.folder import check_unchanged, find, home
from jobs.source import open_source


@click.command()
@job_argument
@click.option(
    "--output", "-o", metavar="FILE", help="A .parquet or .jsonl file; default: the job's own."
)
@click.option("--partial", is_flag=True, help="Also if rows are missing; only finished ones.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def export_command(job: str | None, output: str | None, partial: bool, overwrite: bool) -> None:
    """Write a job's results to a file.

    JOB is its id or the beginning of one; without it, the latest job is exported. `submit` and
    `resume` do this by themselves when the last row is done.
    """
    root = home()
    folder = find(root, job)
    spec = folder.spec()
    target = output_settings(output) if output else spec.output
    destination = Path(target["path"])
    with exporting(root, folder, destination, overwrite=overwrite) as may_replace:
        source = open_source([Path(file.path) for file in spec.inputs], spec.input_format)
        check_unchanged(folder)
        with folder.journal() as journal:
            rows = export(
                source,
                journal.results(),
                destination,
                format=target["format"],
                token_ids=bool(spec.output.get("token_ids")),
                n=spec.n,
                limit=spec.limit,
                keep=spec.keep,
                partial=partial,
                may_replace=may_replace,
            )
    click.echo(f"{rows:,} rows in {destination}")
