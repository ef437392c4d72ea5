"""`batchrun export`: a job's results as a file, also of a job that is not finished."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click

from batchrun.cli.inspect import job_argument
from batchrun.cli.isolated import ReaderCrashed, isolated
from batchrun.cli.piped import hand_out
from batchrun.jobs.folder import JobFolder, find, home
from batchrun.jobs.inflight import ReaderNote
from batchrun.jobs.options import OutputSpec
from batchrun.jobs.output.destination import exporting
from batchrun.jobs.output.rejoin import Exported, export_job
from batchrun.jobs.spec import JobSpec
from batchrun.specs import PIPE, output_to, to_stdout
from batchrun.terminal import say, tell


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
    if output is None and spec.output.stdout:
        output = PIPE
    target = _target(spec, output)

    def write(note: ReaderNote, lost: Path | None = None) -> Exported:
        how: dict[str, Any] = {
            "format": target.format,
            "partial": partial,
            "noted": note.reading,
            "lost": lost,
        }
        with folder.journal() as journal:
            if output == PIPE:
                with _room(folder) as place:
                    path = Path(place, target.path)
                    found = export_job(spec, journal, path, **how)
                    hand_out(path)
                    return found
            path = Path(target.path)
            with exporting(root, folder, path, overwrite=overwrite) as may_replace:
                return export_job(spec, journal, path, may_replace=may_replace, **how)

    try:
        found = isolated(write)
    except ReaderCrashed as crash:
        if not partial:
            raise
        lost = crash.path  # the crash itself can't be caught: it and what follows is done without
        found = isolated(lambda note: write(note, lost))
    where = "stdout" if output == PIPE else target.path
    say(f"{found.rows:,} rows in {where}", err=output == PIPE)
    if found.unknown is not None:
        tell(
            f"the input is not what it was: {found.unknown:,} of these rows are without their "
            "input columns; the column `row` says which they are, from 0"
        )


def _target(spec: JobSpec, output: str | None) -> OutputSpec:
    if output == PIPE:
        return to_stdout(spec.input_format)
    return output_to(output) if output else spec.output


def _room(job: JobFolder) -> tempfile.TemporaryDirectory[str]:
    """A folder for what goes to stdout; in the job, so that it goes with it whoever is killed."""
    place = job.path if os.access(job.path, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix=".export-", dir=place)
