"""`batchrun submit`, `resume` and `watch`: make a job, start it, and show it until it ends.

Progress goes to stderr, the outcome to stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from batchrun import machine
from batchrun.cli.errors import STATUS, ExitStatus, print_error
from batchrun.cli.in_force import as_fields, in_force
from batchrun.cli.inspect import job_argument, job_parameters, print_fields
from batchrun.cli.jobnames import files
from batchrun.cli.moved import moved_option, note_moved
from batchrun.cli.options import (
    ARGUMENTS,
    SectionCommand,
    job_options,
    section_option,
    sources,
)
from batchrun.cli.outcome import as_lines, of_answers, of_rows
from batchrun.cli.progress import Tell, View, waited
from batchrun.jobs.errors import JobError, LeaseHeld
from batchrun.jobs.folder import JobFolder, find, home, list_jobs
from batchrun.jobs.inflight import ReaderNote
from batchrun.jobs.kinds import FLEET, OF_SUBMIT, OUTPUT, RUNNING
from batchrun.jobs.lease import held_by
from batchrun.jobs.spec import JobSpec
from batchrun.jobs.stats import summarise
from batchrun.machine import importing
from batchrun.options import PIPE
from batchrun.platforms import need_linux
from batchrun.provenance import command_line
from batchrun.report.text import counted
from batchrun.runner.ahead import Ahead
from batchrun.runner.live import STORY, LogTail, read_progress
from batchrun.runner.overdue import PromptLimit, prompt_seconds
from batchrun.runner.supervisor import Started
from batchrun.terminal import MESSAGE, say, say_json, tell
from batchrun.trust import others_write

_RESUMABLE = {"new", "interrupted", "failed", "cancelled"}
_POLL_S = 0.1
_LINES = 40  # of a prompt
_BEGIN_S = 30.0  # how long `--detach` waits for a worker to begin, to report one that can't

_running = partial(section_option, section=RUNNING)
_wait = partial(
    _running,
    "--wait/--detach",
    default=True,
    show_default=True,
    help="Watch the job until it ends and exit with its exit code, or return at once.",
)
_json = _running("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")


@click.command(cls=SectionCommand, configured=None)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", shell_complete=files)
@job_options(*OF_SUBMIT)
@_wait()
@_running("--again", is_flag=True, help="Start a new job even if one for the same work exists.")
@_running(
    "--dry-run",
    is_flag=True,
    help="Check everything but the weights, build the prompts of the first 20 rows, show the job "
    "with all defaults in force, and start nothing.",
)
@_json
def submit_command(
    inputs: tuple[str, ...], dry_run: bool, wait: bool, again: bool, as_json: bool, **options: Any
) -> int:
    """Run a model over every row of a file.

    INPUT is a Parquet, JSON or CSV file, a folder of such files, a glob, or - for stdin. Several
    inputs make one job. Prompts come from a column `prompt` (text), `messages` or `conversations`
    (chats), from --prompt-column, or from --template.

    The output has all input columns, then completion, finish_reason, prompt_tokens,
    completion_tokens and error, in input order. Structured output adds parsed and parse_error. A
    bad row becomes an error in that row; the rest of the job carries on.

    The job runs in a process of its own: Ctrl-C closes the view, and the job continues.
    """
    if not dry_run:
        need_linux()
    if options["output"] == PIPE and (as_json or not wait):
        raise click.UsageError("--output - excludes --json and --detach: the answers go to stdout")
    alone = not (dry_run or options["devices"] or options["ray"] or PIPE in inputs)
    early = "work" if alone and machine.has_idle_core() else None
    with Ahead(early, session=True) as ahead:
        from batchrun.cli.piped import taken_in  # noqa: PLC0415 - Arrow, as in all of these
        from batchrun.specs import make_spec  # noqa: PLC0415
        from batchrun.submission import submit  # noqa: PLC0415

        root = home()
        if others_write(root):
            tell(f"others can write to {root}, and so change your jobs: chmod go-w '{root}'")
        with taken_in(inputs, root) as (paths, own):
            spec = waited(
                "checking the job",
                lambda note, tell: make_spec(paths, root, options, log=tell, noted=note.reading),
            )
            if dry_run:
                _dry_run(root, spec, again=again, as_json=as_json)
                return 0
            told = command_line(click.get_current_context().meta[ARGUMENTS])
            started = submit(root, spec, own, again=again, command=told, ahead=ahead)
    return _attached(started, LogTail(started.job.path), as_json=as_json, wait=wait)


def _dry_run(root: Path, spec: JobSpec, *, again: bool, as_json: bool) -> None:
    """Check a job, and show it: its rows, its first prompt, and all parameters in force."""
    from batchrun.submission import check_free  # noqa: PLC0415

    check_free(root, spec, again=again)

    def try_rows(note: ReaderNote, tell: Tell) -> Any:
        with importing():
            from batchrun.estimate.dry_run import dry_run  # noqa: PLC0415 - imports torch

        with PromptLimit(note, prompt_seconds()) as limit:
            return dry_run(spec, tell, limit)

    tried = waited("trying the first rows", try_rows)
    found, of_model = ({}, ()) if tried is None else (tried.found, tried.of_model)
    said = sources(click.get_current_context())
    given = {name: source for name, source in said.items() if source != "default"}
    parameters = in_force(spec, given, found, of_model)
    prompt = tried and {"row": tried.row, "tokens": tried.tokens, "text": tried.prompt}
    rows = 0 if tried is None else tried.rows
    if as_json:
        job = {**job_parameters(spec), "rows": rows, "first_prompt": prompt}
        say_json({**job, "parameters": parameters})
        return
    print_fields({"inputs": [file.path for file in spec.inputs], "rows": f"{rows:,}"})
    if prompt is not None:
        tokens = counted(prompt["tokens"], "token")
        say("", f"the first prompt, of row {prompt['row']:,}, has {tokens}:")
        say(*(f"    {line}" for line in prompt["text"].split("\n")[:_LINES]), limit=MESSAGE)
    say("")
    print_fields(as_fields(parameters))
    say("", "all checks passed; nothing was started (--dry-run)")


@click.command(cls=SectionCommand, configured=("wait", "as_json"))
@job_argument
@click.option("--all", "every", is_flag=True, help="Continue all jobs that are not done.")
@click.option("--retry-failed", is_flag=True, help="Compute the failed rows again.")
@moved_option
@section_option(
    "--output",
    "-o",
    metavar="FILE",
    show_default="as before",
    help="Write the output to this file.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace the output file even if this job did not write it."
)
@job_options(OUTPUT, FLEET, RUNNING, anew=True)
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
    **limits: Any,
) -> int:
    """Continue a job that was stopped: finished rows are kept, others continue mid-generation.

    JOB is its id or a part of one; without it, the latest job continues.
    """
    from batchrun.submission import resume  # noqa: PLC0415

    need_linux()
    root = home()
    if every and (output or overwrite):
        raise click.UsageError("--output and --overwrite apply to a single job: leave out --all")
    if every:
        jobs = [found for found in list_jobs(root) if _is_resumable(found)]
    else:
        jobs = [find(root, job)]
    for found in jobs:
        note_moved(found, moved)
    status = 0
    for found in jobs:
        tail = LogTail.at_end(found.path)
        try:
            started = resume(
                *(root, found),
                retry_failed=retry_failed,
                output=output,
                overwrite=overwrite,
                limits=limits,
                tell=tell,
            )
            ended = _attached(started, tail, as_json=as_json, wait=wait)
        except JobError as error:
            if not every:
                raise
            if isinstance(error, LeaseHeld) or not _is_resumable(found):
                tell(f"{error}; skipped")  # it is running, as wanted
                continue
            print_error(str(error), error.hint)  # and the others go on
            ended = ExitStatus.FAILED
        status = max(status, ended)
    return status


def _is_resumable(job: JobFolder) -> bool:
    try:
        return job.state() in _RESUMABLE
    except JobError:  # `resume` reports what is wrong, or repairs it; unless the job is gone
        return job.path.exists()


@click.command()
@job_argument
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def watch_command(job: str | None, as_json: bool) -> int:
    """Watch a job until it ends.

    Exits with the job's exit code. Ctrl-C closes the view, and the job continues.
    """
    found = find(home(), job)
    tail = LogTail.at_end(found.path)
    return _watch(found, tail, lambda: held_by(found.path) is not None, as_json=as_json)


def _attached(worker: Started, tail: LogTail, *, as_json: bool, wait: bool) -> ExitStatus:
    """Watch a job that was started; or print its id, once its worker has begun to work."""
    job = worker.job
    if wait:
        status = _watch(job, tail, worker.alive, as_json=as_json)
        output = job.spec().output
        if output.stdout and status in (ExitStatus.DONE, ExitStatus.FAILED_ROWS):
            from batchrun.cli.piped import hand_out  # noqa: PLC0415

            hand_out(Path(output.path))
        return status
    if worker.began(_BEGIN_S) is False:
        worker.note_failure()
        return _report(job, 0, as_json)
    if as_json:
        say_json({"job": job.id, "state": job.state()}, indent=None)
    else:
        say(job.id, f"next:   batchrun watch {job.id}")
    return ExitStatus.DONE


def _watch(
    job: JobFolder, tail: LogTail, alive: Callable[[], bool], *, as_json: bool
) -> ExitStatus:
    """Show the job, and its log from `tail` on, while it is alive; print how it went."""
    view, started = View(sys.stderr), time.monotonic()
    view.message(f"job {job.id}")
    try:
        last = False
        while not last:
            last = not alive()  # show what was written until then
            for line in tail.lines():
                if line["level"] != STORY:  # the view shows these stages itself
                    view.message(str(line["message"]))
            if (progress := read_progress(job.path)) is not None:
                view.update(progress)
            if not last:
                time.sleep(_POLL_S)
    except KeyboardInterrupt:
        view.close()
        tell(
            "",
            f"the job {job.id} continues in the background",
            f"next:   batchrun watch {job.id}, or: batchrun cancel {job.id}",
        )
        return ExitStatus.INTERRUPTED
    view.close()
    return _report(job, time.monotonic() - started, as_json)


def _report(job: JobFolder, wall_s: float, as_json: bool) -> ExitStatus:
    """Print the job's state, and return the exit code."""
    state, failure = job.state(), job.failure()
    status = STATUS.get(state, ExitStatus.FAILED)
    try:
        summary = summarise(job)
    except JobError as error:
        print_error(str(error), error.hint)
        return ExitStatus.FAILED
    rows, output = summary["rows"], summary["output"]
    progress = read_progress(job.path)
    if progress is not None:
        wall_s = progress.elapsed_s  # the run's time, which may exceed the view's
    if failure is not None and status is not ExitStatus.DONE:
        print_error(*failure)
    spec, shown = job.spec(), of_answers(job, rows)
    if as_json:
        outcome = {"job": job.id, "state": state, "exit_code": int(status), "output": output}
        say_json({**outcome, "wall_s": wall_s, "rows": rows, **shown})
        return status
    ended = status in (ExitStatus.DONE, ExitStatus.FAILED_ROWS)
    line, lines = of_rows(spec, rows, wall_s, written=ended), as_lines(shown)
    aside = spec.output.stdout  # stdout has the answers
    again = f"batchrun resume {job.id}"
    if ended:
        lines = [line, *lines, f"output: {output}", f"next:   batchrun stats {job.id}"]
    else:
        lines = [f"{state} after {line}", *lines]
        if failure is None or f"{again} " not in (failure[1] or ""):  # the hint says it better
            lines.append(f"next:   {again}")
    say(*lines, err=aside, limit=MESSAGE)
    return status
