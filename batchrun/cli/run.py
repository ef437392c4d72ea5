"""`batchrun submit` and `batchrun resume`: make a job, start its worker, watch it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from batchrun.cli import attach
from batchrun.cli.describe import job_parameters, print_fields
from batchrun.cli.errors import ExitStatus, print_error
from batchrun.cli.inspect import job_argument
from batchrun.cli.isolated import isolated
from batchrun.cli.options import SectionCommand, job_options, section_option
from batchrun.cli.piped import taken_in
from batchrun.jobs.errors import JobError, LeaseHeld
from batchrun.jobs.folder import JobFolder, find, home, list_jobs
from batchrun.jobs.identity import move
from batchrun.jobs.inflight import ReaderNote
from batchrun.jobs.kinds import MODEL, OUTPUT, PROMPT, RUNNING, SAMPLING
from batchrun.jobs.output.destination import resuming
from batchrun.jobs.spec import JobSpec
from batchrun.machine import importing
from batchrun.models.resolve import fingerprint
from batchrun.runner.overdue import PromptLimit, prompt_seconds
from batchrun.specs import PIPE, make_spec, output_to
from batchrun.submission import check_free, submitting
from batchrun.terminal import say, say_json, tell
from batchrun.trust import others_write

_RESUMABLE = {"new", "interrupted", "failed", "cancelled"}


_running = partial(section_option, section=RUNNING)
_wait = partial(
    _running,
    "--wait/--detach",
    default=True,
    help="Watch until the job ends, and exit as it did; or return at once with the job's id.",
)
_json = _running("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")


@click.command(cls=SectionCommand)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@job_options(MODEL, PROMPT, SAMPLING, OUTPUT, RUNNING)
@_wait(show_default=True)
@_running("--again", is_flag=True, help="Begin anew though the same work can be resumed.")
@_running(
    "--dry-run",
    is_flag=True,
    help="Check everything but the weights, try the first 20 rows, show the job, start "
    "nothing. It fails where the run would, or where none of these rows makes a prompt.",
)
@_json
def submit_command(
    inputs: tuple[str, ...],
    dry_run: bool,
    wait: bool,
    again: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Run a model over every row of a file.

    INPUT is a Parquet, JSON or CSV file, a folder of them, a glob, or - for stdin; several make
    one job. Every row has a column `prompt` (text), or `messages` or `conversations` (a chat), or
    gets its prompt from --template. The output has all input columns, then completion,
    finish_reason, prompt_tokens, completion_tokens and error, in input order.

    The job runs in a process of its own. Ctrl-C leaves the view, not the job.
    """
    root = home()
    if options["output"] == PIPE and (as_json or not wait):
        raise click.UsageError("--output - with --json or --detach: stdout has the answers")
    if others_write(root):
        tell(f"others can write {root}, and so make and change your jobs: chmod go-w '{root}'")
    with taken_in(inputs, root) as (paths, own):
        spec = isolated(lambda note: make_spec(paths, root, options, log=tell, noted=note.reading))
        if dry_run:
            _dry_run(root, spec, again=again, as_json=as_json)
            return 0
        taking = submitting(root, spec, own, again=again)
        return attach.run(taking, as_json=as_json, detach=not wait)


def _dry_run(root: Path, spec: JobSpec, *, again: bool, as_json: bool) -> None:
    check_free(root, spec, again=again)

    def try_rows(note: ReaderNote) -> None:
        with importing():
            from batchrun.estimate.dry_run import dry_run  # noqa: PLC0415 - imports torch

        with PromptLimit(note, prompt_seconds()) as limit:
            dry_run(spec, tell, limit)

    isolated(try_rows)
    if as_json:
        say_json(job_parameters(spec))
    else:
        print_fields(job_parameters(spec))
        say("", "everything checks out; nothing was started (--dry-run)")


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
@click.option("--output", "-o", metavar="FILE", help="Another file for the output, from now on.")
@click.option("--overwrite", is_flag=True, help="Replace what is there now, whoever wrote it.")
@job_options(RUNNING, anew=True)
@_json
@_wait()
def resume_command(
    job: str | None,
    *,
    every: bool,
    retry_failed: bool,
    moved: tuple[str, ...],
    output: str | None,
    overwrite: bool,
    wait: bool,
    as_json: bool,
    **limits: int | None,
) -> int:
    """Continue a job that was stopped: finished rows are kept, begun ones go on where they were.

    JOB is its id or the beginning of one; without it, the latest job continues.
    """
    root = home()
    if every and (output or overwrite):
        raise click.UsageError("--all with --output or --overwrite: these are of one job")
    if every:
        jobs = [found for found in list_jobs(root) if _is_resumable(found)]
    else:
        jobs = [find(root, job)]
    path = Path(output_to(output).path) if output else None
    for found in jobs:
        for pair in moved:
            old, equals, new = pair.partition("=")
            if not equals:
                raise click.UsageError(f"--moved {pair}: write OLD=NEW")
            move(found, old, new, fingerprint)
    told = {name: value for name, value in limits.items() if value is not None}
    status = 0
    for found in jobs:
        more = {"output": path, "overwrite": overwrite, "limits": told}
        taking = _resuming(root, found, retry_failed=retry_failed, **more)
        try:
            ended = attach.run(taking, as_json=as_json, detach=not wait)
        except JobError as error:
            if not every:
                raise
            if isinstance(error, LeaseHeld) or not _is_resumable(found):
                tell(f"{error}: left to it")  # it goes on, as was wanted
                continue
            print_error(str(error), error.hint)  # and the others go on
            ended = ExitStatus.FAILED
        status = max(status, ended)
    return status


def _is_resumable(job: JobFolder) -> bool:
    try:
        return job.state() in _RESUMABLE
    except JobError:  # resuming it says what is wrong, or puts it right; unless it is gone
        return job.path.exists()


@contextmanager
def _resuming(
    root: Path, job: JobFolder, *, retry_failed: bool, **options: Any
) -> Iterator[JobFolder]:
    with resuming(root, job, tell=lambda line: tell(f"{job.id}: {line}"), **options):
        if retry_failed:
            count = job.retry_failed()
            tell(f"{count:,} failed results of {job.id} are to do again")
        yield job
