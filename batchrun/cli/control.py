"""`batchrun watch`, `logs`, `cancel`, `rm` and `verify`: what can be done to a job."""

from __future__ import annotations

import time

import click

from batchrun.cli import attach
from batchrun.cli.errors import ExitStatus
from batchrun.cli.inspect import job_argument, when
from batchrun.cli.isolated import ReaderCrashed, isolated
from batchrun.jobs.cancel import cancel
from batchrun.jobs.folder import find, home, sweep
from batchrun.jobs.lease import held_by
from batchrun.jobs.output.destination import one_at_a_time
from batchrun.jobs.verify import verify
from batchrun.models.resolve import fingerprint
from batchrun.runner.live import LogTail
from batchrun.terminal import MESSAGE, say

_POLL_S = 0.1


@click.command()
@job_argument
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def watch_command(job: str | None, as_json: bool) -> int:
    """Watch a job until it ends.

    Exits as the job did. Ctrl-C leaves the view, not the job.
    """
    return attach.watch(find(home(), job), as_json=as_json)


@click.command()
@job_argument
@click.option("--follow", "-f", is_flag=True, help="Go on until the job ends.")
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

    What it has done is kept, the tokens of begun rows too: `batchrun resume` would go on. A job
    that hangs is killed after some seconds: then finished rows are kept.
    """
    folder = find(home(), job)
    say(cancel(folder), limit=MESSAGE)
    follow = "stats" if folder.state() in ("done", "done-with-errors") else "resume"
    say(f"next:   batchrun {follow} {folder.id}")
    return ExitStatus.DONE


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
def rm_command(jobs: tuple[str, ...]) -> None:
    """Remove jobs.

    Their folders go, with all results in them, and what killed processes left unfinished beside
    their outputs. Outputs that were written stay.
    """
    root = home()
    with one_at_a_time(root):
        sweep(root)
        for folder in [find(root, name) for name in jobs]:
            folder.remove()
            say(f"removed {folder.id}")


@click.command()
@job_argument
def verify_command(job: str | None) -> int:
    """Check a job.

    Is its journal sound, are its inputs and its model unchanged, does the output agree?
    """
    folder = find(home(), job)
    try:
        problems = isolated(lambda note: verify(folder, fingerprint, note.reading))
    except ReaderCrashed as error:
        problems = [str(error)]
    say(*problems, limit=MESSAGE)
    if not problems:
        say(f"{folder.id} is sound: {folder.counts().rows:,} rows")
    return ExitStatus.FAILED if problems else ExitStatus.DONE
