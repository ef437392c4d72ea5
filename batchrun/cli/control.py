"""`batchrun logs`, `cancel`, `verify` and `export`: what can be done to a job."""

from __future__ import annotations

import functools
import math
import os
import secrets
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchrun.cli.errors import ExitStatus
from batchrun.cli.inspect import job_argument, json_option, when
from batchrun.cli.moved import moved_option, note_moved
from batchrun.cli.options import section_option
from batchrun.cli.progress import View, waited
from batchrun.jobs.cancel import cancel
from batchrun.jobs.folder import JobFolder, find, home
from batchrun.jobs.inflight import ReaderNote
from batchrun.jobs.lease import held_by
from batchrun.jobs.output.destination import exporting
from batchrun.jobs.snapshot import FINISHED
from batchrun.models.resolve import fingerprint
from batchrun.objectstore.paths import Location, location
from batchrun.platforms import need_linux
from batchrun.report.text import counted
from batchrun.runner.isolated import ReaderCrashed, isolated
from batchrun.runner.live import LogTail
from batchrun.runner.overdue import PromptLimit, prompt_seconds
from batchrun.terminal import MESSAGE, say, say_json, tell

if TYPE_CHECKING:  # they load Arrow
    from batchrun.jobs.output.rejoin import Exported
    from batchrun.runner.recompute import Recomputed

_POLL_S = 0.1


@click.command()
@job_argument
@click.option("--follow", "-f", is_flag=True, help="Follow the log until the job ends.")
@json_option
def logs_command(job: str | None, follow: bool, as_json: bool) -> None:
    """Print a job's log.

    With --json each line is an object: `time` in seconds since the epoch, null if unknown, `level`
    (`story` for the stages of a run, else `note`), and `message`.
    """
    folder = find(home(), job)
    tail, last = LogTail(folder.path), False
    while not last:
        last = not follow or held_by(folder.path) is None
        for line in tail.lines():
            if as_json:
                at = line["time"] if math.isfinite(line["time"]) else None
                say_json({**line, "time": at}, indent=None)
            else:
                say(f"{when(line['time'])}  {line['message']}", limit=MESSAGE)
        if not last:
            time.sleep(_POLL_S)


@click.command()
@job_argument
@json_option
def cancel_command(job: str | None, as_json: bool) -> int:
    """Stop a job.

    Its results are kept, and the tokens of unfinished rows: `batchrun resume` continues it. A job
    that hangs is killed after some seconds; then only finished rows are sure to be kept.
    """
    folder = find(home(), job)
    said = cancel(folder)
    if as_json:
        say_json({"job": folder.id, "state": folder.state(), "message": said})
        return ExitStatus.DONE
    say(said, limit=MESSAGE)
    follow = "stats" if folder.state() in FINISHED else "resume"
    say(f"next:   batchrun {follow} {folder.id}")
    return ExitStatus.DONE


@click.command()
@job_argument
@click.option(
    "--recompute",
    "rows",
    type=click.IntRange(1),
    metavar="ROWS",
    help="Also recompute ROWS random finished rows, each alone, and compare.",
)
@click.option("--seed", type=int, help="Choose the same rows as an earlier --recompute.")
@json_option
def verify_command(job: str | None, rows: int | None, seed: int | None, as_json: bool) -> int:
    """Check a job for damage and changes.

    Checks that its journal is sound, its inputs and model are unchanged, and its output matches.
    """
    from batchrun.jobs.verify import verify  # noqa: PLC0415 - Arrow, as in all of these

    if rows is not None:
        need_linux()
    if seed is not None and rows is None:
        raise click.UsageError("--seed chooses the rows to recompute: add --recompute ROWS")
    folder = find(home(), job)
    try:
        problems = waited("checking", lambda note, _: verify(folder, fingerprint, note.reading))
    except ReaderCrashed as error:
        problems = [str(error)]
    if not as_json:
        say(*problems, limit=MESSAGE)
        if not problems:
            say(f"{folder.id} is sound: {counted(folder.counts().rows, 'row')}")
    chosen = secrets.randbelow(1 << 32) if seed is None else seed
    found = None if rows is None else _recomputed(folder, rows, chosen)
    sound = not problems and not (found and found.differences)
    if as_json:
        again = None if found is None else {**asdict(found), "seed": chosen}
        total = None if problems else folder.counts().rows
        shown = {"job": folder.id, "sound": sound, "problems": problems, "rows": total}
        say_json({**shown, "recomputed": again})
    elif found is not None:
        _print_recomputed(found, chosen)
    return ExitStatus.DONE if sound else ExitStatus.FAILED


def _recomputed(folder: JobFolder, rows: int, seed: int) -> Recomputed:
    """Compute rows again."""
    from batchrun.runner.recompute import recompute  # noqa: PLC0415

    def compared(note: ReaderNote) -> Recomputed:
        with closing(View(sys.stderr)) as view, PromptLimit(note, prompt_seconds()) as limit:
            shown: dict[str, Any] = {"log": view.message, "on_progress": view.update}
            return recompute(folder, rows, seed, limit, **shown)

    return isolated(compared, "recomputing rows")


def _print_recomputed(found: Recomputed, seed: int) -> None:
    if not found.rows:
        say("no row is finished yet: there is nothing to recompute")
        return
    same = found.rows - len(found.differences)
    say(*chain(*found.differences.values()), limit=MESSAGE)
    say(f"{same:,} of {counted(found.rows, 'row')} are the same when recomputed (--seed {seed})")
    if found.varies is not None:
        say(f"rows may differ: {found.varies}", limit=MESSAGE)


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
    help="Write the finished rows, even if others are missing or the input has changed.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@moved_option
@json_option
def export_command(
    job: str | None,
    *,
    output: str | None,
    partial: bool,
    overwrite: bool,
    moved: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a job's results to a file.

    JOB is its id or a part of one; without it, the latest job is exported. `submit` and
    `resume` do this by themselves when the last row is done.
    """
    from batchrun.cli.piped import hand_out  # noqa: PLC0415
    from batchrun.jobs.output.rejoin import export_job  # noqa: PLC0415
    from batchrun.options import PIPE  # noqa: PLC0415
    from batchrun.specs import output_to, to_stdout  # noqa: PLC0415

    root = home()
    folder = find(root, job)
    note_moved(folder, moved)
    spec = folder.spec()
    if output is None and spec.output.stdout:
        output = PIPE
    if output == PIPE and as_json:
        raise click.UsageError("--output - excludes --json: the answers go to stdout")
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
        found = waited("writing the file", lambda note, _: write(note))
    except ReaderCrashed as crash:
        if not partial:
            raise
        lost = crash.path  # try again without this file and those after it
        found = waited("writing the file", lambda note, _: write(note, lost))
    if as_json:
        wrote = {"rows": found.rows, "changed_rows": found.unknown}
        say_json({"job": folder.id, "output": target.path, **wrote})
        return
    where = "stdout" if output == PIPE else target.path
    say(f"{counted(found.rows, 'row')} in {where}", err=output == PIPE)
    if found.unknown is not None:
        tell(
            f"the input has changed: {found.unknown:,} of these rows lack their input "
            "columns; the column `row` has their row numbers, counted from 0"
        )


def _room(job: JobFolder) -> tempfile.TemporaryDirectory[str]:
    """A folder for what goes to stdout; in the job's folder, so that it is removed with it."""
    place = job.path if os.access(job.path, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix=".export-", dir=place)
