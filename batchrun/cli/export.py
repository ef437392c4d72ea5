"""`batchrun export`: a job's results as a file, also of a job that is not finished."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from batchrun.cli.inspect import job_argument
from batchrun.cli.piped import PIPE, hand_out
from batchrun.cli.specs import output_settings, to_stdout
from jobs.destination import exporting
from jobs.folder import find, home
from jobs.rejoin import export_job


@click.command()
@job_argument
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    help="A .parquet, .jsonl, .csv or .tsv file, or - for stdout; default: the job's own.",
)
@click.option(
    "--partial",
    is_flag=True,
    help="Also if rows are missing, or the input is no more what it was: what there is.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def export_command(job: str | None, output: str | None, partial: bool, overwrite: bool) -> None:
    """Write a job's results to a file.

    JOB is its id or the beginning of one; without it, the latest job is exported. `submit` and
    `resume` do this by themselves when the last row is done.
    """
    root = home()
    folder = find(root, job)
    spec = folder.spec()
    if output is None and spec.output.get("stdout"):
        output = PIPE
    if output == PIPE:
        target = to_stdout(spec.input_format)
        with tempfile.TemporaryDirectory() as place, folder.journal() as journal:
            path = Path(place, target["path"])
            found = export_job(spec, journal, path, format=target["format"], partial=partial)
            hand_out(path)
    else:
        target = output_settings(output) if output else dict(spec.output)
        path = Path(target["path"])
        with (
            exporting(root, folder, path, overwrite=overwrite) as may_replace,
            folder.journal() as journal,
        ):
            found = export_job(
                spec,
                journal,
                path,
                format=target["format"],
                partial=partial,
                may_replace=may_replace,
            )
    where = "stdout" if output == PIPE else path
    click.echo(f"{found.rows:,} rows in {where}", err=output == PIPE)
    if found.unknown is not None:
        click.echo(
            f"the input is not what it was: {found.unknown:,} of these rows are without their "
            "input columns; the column `row` says which they are, from 0",
            err=True,
        )
