"""`batchrun report`: one HTML page about a job, or several side by side."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import click

from batchrun.cli.inspect import job_parameters, json_option
from batchrun.cli.jobnames import JOB
from batchrun.cli.piped import pour
from batchrun.cli.progress import waited
from batchrun.jobs.errors import OutputTaken
from batchrun.jobs.folder import JobFolder, find, home
from batchrun.jobs.output.destination import exporting
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.rows.store import Noted, unnoted
from batchrun.objectstore.paths import location
from batchrun.options import PIPE
from batchrun.peek import examples
from batchrun.report.collect import EXAMPLES, collect
from batchrun.report.page import render_page
from batchrun.runner.isolated import ReaderCrashed
from batchrun.terminal import say, say_json

_MOST = 6  # jobs that one page can tell apart


@click.command()
@click.argument("jobs", nargs=-1, metavar="[JOB...]", type=JOB)
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    help="HTML file, or - for stdout; by default JOB-report.html in this folder.",
)
@click.option("--no-examples", is_flag=True, help="Leave out prompts, answers and errors.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@json_option
def report_command(
    jobs: tuple[str, ...], output: str | None, no_examples: bool, overwrite: bool, as_json: bool
) -> None:
    """Write an HTML report of a job.

    JOB is its id or a part of one; without it, the report is about the latest job. Several jobs are
    shown side by side. The page needs no network and no scripts. It has prompts and answers, so
    only you can read its file. --json prints its data instead.
    """
    root = home()
    names: Sequence[str | None] = jobs or (None,)
    if len(names) > _MOST:
        raise click.UsageError(f"{len(names)} jobs: a report compares at most {_MOST}")
    folders = [find(root, name) for name in names]
    rows = _in_common(folders)
    found = [_collected(folder, rows, with_examples=not no_examples) for folder in folders]
    if as_json:
        say_json(found[0] if len(found) == 1 else found)
        return
    # A file name may hold lone surrogates, which no encoding has.
    page = render_page(found).encode(errors="backslashreplace")
    if output == PIPE:
        pour(io.BytesIO(page))
        return
    where = location(output or f"{'-'.join(folder.id for folder in folders[:2])}-report.html")
    with exporting(root, folders[0], where, overwrite=overwrite) as may_replace:
        try:
            with OUTPUTS.write(where, may_replace=may_replace, private=True) as file:
                file.write(page)
        except FileExistsError as error:
            raise OutputTaken(
                f"{where} was written by another program in the meantime",
                hint="add --overwrite to replace it, or choose another --output",
            ) from error
    say(f"report: {where}")


def _in_common(folders: Sequence[JobFolder]) -> list[int] | None:
    """Rows whose answers several jobs may all have: some of the job that has done the fewest."""
    begun = [folder for folder in folders if folder.snapshot().done]
    if len(folders) == 1 or not begun:
        return None
    with min(begun, key=lambda folder: folder.snapshot().done or 0).journal() as journal:
        return journal.answered(EXAMPLES) or None


def _collected(folder: JobFolder, rows: list[int] | None, *, with_examples: bool) -> dict[str, Any]:
    """What the page says of a job; reads its input in a process that may crash."""
    parameters = job_parameters(folder.spec())
    if parameters["runtime"].get("on_done"):  # a page is passed on, and a webhook's address not
        parameters["runtime"]["on_done"] = "..."
    if not with_examples:
        return collect(folder, parameters)
    try:
        return waited(
            "reading the job",
            lambda note, _: collect(folder, parameters, _examples(folder, note.reading), rows),
        )
    except ReaderCrashed as crash:
        return collect(folder, parameters, _examples(folder, unread=str(crash)), rows)


def _examples(
    folder: JobFolder, noted: Noted = unnoted, unread: str | None = None
) -> Callable[[Sequence[int], bool], list[dict[str, Any]]]:
    def found(rows: Sequence[int], failed: bool) -> list[dict[str, Any]]:
        if not rows:
            return []
        spans = [range(row, row + 1) for row in rows]
        told = examples(folder, None, failed=failed, rows=spans, noted=noted, unread=unread)
        return [asdict(example) for example in told]

    return found
