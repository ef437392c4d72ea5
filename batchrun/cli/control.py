"""`batchrun logs`, `cancel`, `rm`, `verify` and `export`: what can be done to a job."""

from __future__ import annotations

import functools
import os
import secrets
import sys
import tempfile
import time
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import click

from batchrun.cli.errors import ExitStatus
from batchrun.cli.inspect import job_argument, when
from batchrun.cli.options import section_option
from batchrun.cli.piped import hand_out
from batchrun.cli.progress import View
from batchrun.jobs.cancel import cancel
from batchrun.jobs.folder import JobFolder, find, home, sweep
from batchrun.jobs.inflight import ReaderNote
from batchrun.jobs.lease import held_by
from batchrun.jobs.output.destination import exporting, one_at_a_time
from batchrun.jobs.output.rejoin import Exported, export_job
from batchrun.jobs.snapshot import FINISHED
from batchrun.jobs.verify import verify
from batchrun.models.resolve import fingerprint
from batchrun.objectstore.paths import Location, location
from batchrun.runner.isolated import ReaderCrashed, isolated
from batchrun.runner.live import LogTail
from batchrun.runner.overdue import PromptLimit, prompt_seconds
from batchrun.runner.recompute import Recomputed, recompute
from batchrun.specs import PIPE, output_to, to_stdout
from batchrun.terminal import MESSAGE, say, tell

_POLL_S = 0.1


@click.command()
@job_argument
@click.option("--follow", "-f", is_flag=True, help="Follow the log until the job ends.")
def logs_command(job: str | None, follow: bool) -> None:
    """Print a job's log."""
    folder = find(home(), job)
    tail, last = LogTail(folder.path), False
    while not last:
        last = not follow or held_by(folder.path) is None
        for line in tail.lines():
            say(f"{when(line['time'])}  {line['message']}", limit=MESSAGE)
        if not last:
            time.sleep(_POLL_S)


@click.command()
@job_argument
def cancel_command(job: str | None) -> int:
    """Stop a job.

    Its results are kept, and the tokens of unfinished rows: `batchrun resume` continues it. A job
    that hangs is killed after some seconds; then only finished rows are sure to be kept.
    """
    folder = find(home(), job)
    say(cancel(folder), limit=MESSAGE)
    follow = "stats" if folder.state() in FINISHED else "resume"
    say(f"next:   batchrun {follow} {folder.id}")
    return ExitStatus.DONE


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
def rm_command(jobs: tuple[str, ...]) -> None:
    """Remove jobs.

    Removes their folders with all results in them, and what killed processes left unfinished beside
    their outputs. Finished outputs stay.
    """
    root = home()
    with one_at_a_time(root):
        sweep(root)
        for folder in [find(root, name) for name in jobs]:
            folder.remove()
            say(f"removed {folder.id}")


@click.command()
@job_argument
@click.option(
    "--recompute",
    "rows",
    type=click.IntRange(1),
    metavar="ROWS",
    help="Also compute ROWS random finished rows again, each alone, and compare.",
)
@click.option("--seed", type=int, help="Choose the same rows as an earlier --recompute.")
def verify_command(job: str | None, rows: int | None, seed: int | None) -> int:
    """Check a job.

    Is its journal sound, are its inputs and model unchanged, does the output match?
    """
    if seed is not None and rows is None:
        raise click.UsageError("--seed chooses rows to compute again: add --recompute ROWS")
    folder = find(home(), job)
    try:
        problems = isolated(lambda note: verify(folder, fingerprint, note.reading))
    except ReaderCrashed as error:
        problems = [str(error)]
    say(*problems, limit=MESSAGE)
    if not problems:
        say(f"{folder.id} is sound: {folder.counts().rows:,} rows")
    same = rows is None or _recomputes(folder, rows, seed)
    return ExitStatus.FAILED if problems or not same else ExitStatus.DONE


def _recomputes(folder: JobFolder, rows: int, seed: int | None) -> bool:
    """Compute rows again and say how they compare; returns whether all are the same."""
    chosen = secrets.randbelow(1 << 32) if seed is None else seed

    def compared(note: ReaderNote) -> Recomputed:
        with closing(View(sys.stderr)) as view, PromptLimit(note, prompt_seconds()) as limit:
            shown: dict[str, Any] = {"log": view.message, "on_progress": view.update}
            return recompute(folder, rows, chosen, limit, **shown)

    found = isolated(compared, "computing rows again")
    if not found.rows:
        say("no row is finished: there is nothing to compute again")
        return True
    same = found.rows - len(found.differences)
    say(*chain(*found.differences.values()), limit=MESSAGE)
    say(f"{same:,} of {found.rows:,} rows are the same, computed alone (--seed {chosen})")
    if found.varies is not None:
        say(f"rows may differ: {found.varies}", limit=MESSAGE)
    return not found.differences


@click.command()
@job_argument
@section_option(
    "--output",
    "-o",
    metavar="FILE",
    show_default="the job's output",
    help="Output file (.parquet, .jsonl, .csv or .tsv), or - for stdout.",
)
@click.option(
    "--partial",
    is_flag=True,
    help="Write what there is, even if rows are missing or the input has changed.",
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
    if output == PIPE:
        target = to_stdout(spec.input_format)
    else:
        target = output_to(output) if output else spec.output

    def write(note: ReaderNote, lost: Location | None = None) -> Exported:
        with folder.journal() as journal:
            export = functools.partial(
                export_job,
                *(spec, journal),
                format=target.format,
                partial=partial,
                noted=note.reading,
                lost=lost,
            )
            if output == PIPE:
                with _room(folder) as place:
                    path = Path(place, target.path)
                    found = export(path)
                    hand_out(path)
                    return found
            where = location(target.path)
            with exporting(root, folder, where, overwrite=overwrite) as may_replace:
                return export(where, may_replace=may_replace)

    try:
        found = isolated(write)
    except ReaderCrashed as crash:
        if not partial:
            raise
        lost = crash.path  # try again without this file and those after it
        found = isolated(lambda note: write(note, lost))
    where = "stdout" if output == PIPE else target.path
    say(f"{found.rows:,} rows in {where}", err=output == PIPE)
    if found.unknown is not None:
        tell(
            f"the input has changed: {found.unknown:,} of these rows are without their "
            "input columns; the column `row` has their row numbers, from 0"
        )


def _room(job: JobFolder) -> tempfile.TemporaryDirectory[str]:
    """A folder for what goes to stdout; in the job's folder, so that it is removed with it."""
    place = job.path if os.access(job.path, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix=".export-", dir=place)
