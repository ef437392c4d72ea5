"""`batchrun rm` and `prune`: remove jobs, and ask first where results would be lost."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import click

from batchrun.cli.errors import ExitStatus, describe
from batchrun.cli.inspect import json_option
from batchrun.cli.jobnames import JOB
from batchrun.cli.listing import state_option
from batchrun.jobs.errors import JobError
from batchrun.jobs.folder import JobFolder, find, home, list_jobs
from batchrun.jobs.lease import held_by
from batchrun.jobs.output.destination import one_at_a_time
from batchrun.jobs.snapshot import FINISHED, WAITING, JobSnapshot
from batchrun.jobs.sweep import sweep
from batchrun.report.text import counted, size
from batchrun.terminal import MESSAGE, printable, say, say_json, tell

_AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SHOWN = 20  # jobs that a question names


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...", type=JOB)
@click.option("--yes", "-y", is_flag=True, help="Don't ask.")
@json_option
def rm_command(jobs: tuple[str, ...], yes: bool, as_json: bool) -> int:
    """Remove jobs.

    Removes their folders with all results in them, and unfinished files of killed processes beside
    their outputs. Finished outputs stay. Asks first if a job has results that no finished output
    has.
    """
    root = home()
    found = list(dict.fromkeys(find(root, name) for name in jobs))
    unwritten = [line for job in found if (line := _unwritten(job)) is not None]
    names = " ".join(job.id for job in found)
    if unwritten and not (yes or _agreed(unwritten, "remove these results?", f"rm {names}")):
        return ExitStatus.FAILED
    with one_at_a_time(root):
        sweep(root)
        for job in found:
            job.check_removable()  # all of them or none
        for job in found:
            job.remove()
            if not as_json:
                say(f"removed {job.id}")
    if as_json:
        say_json({"removed": [job.id for job in found]})
    return ExitStatus.DONE


def _unwritten(job: JobFolder) -> str | None:
    """What would be lost with the job: results that no finished output has; None if nothing."""
    with suppress(JobError):  # of a damaged job there is nothing to count
        now = job.snapshot()
        if now.done and not _is_exported(job, now) and held_by(job.path) is None:
            if now.state in FINISHED:
                return f"{job.id} is {now.state}, and its only output is in its folder"
            total = "?" if now.total is None else f"{now.total:,}"
            return f"{job.id} is {now.state} with {now.done:,} of {total} rows done, not exported"
    return None


def _is_exported(job: JobFolder, now: JobSnapshot) -> bool:
    """Whether the job wrote an output that outlives its folder.

    That of `--output -`, and of rows from Python, is in the folder.
    """
    return now.state in FINISHED and not job.spec().output.stdout


def _agreed(lines: Sequence[str], question: str, command: str) -> bool:
    """Ask in a terminal, and return the answer; elsewhere refuse.

    Raises:
        JobError: There is nobody to ask.
    """
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        raise JobError(
            "; ".join(printable(line, MESSAGE) for line in lines[:_SHOWN]),
            hint=f"to remove them anyway: batchrun {command} --yes",
        )
    tell(*lines[:_SHOWN], *[f"and {len(lines) - _SHOWN:,} more"] * (len(lines) > _SHOWN))
    tell(f"{question} [y/N]")
    agreed = sys.stdin.readline().strip().lower() in ("y", "yes")
    if not agreed:
        tell("nothing was removed")
    return agreed


def _age(ctx: click.Context, param: click.Parameter, given: str | None) -> float | None:
    """Seconds of an age like `30d`."""
    if given is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", given.strip().lower())
    if found is None:
        raise click.BadParameter(
            f"{given!r} is not an age; write, for example, 30d, 12h or 2w", ctx, param
        )
    return float(found[1]) * _AGES[found[2]]


@click.command()
@click.option(
    "--older-than",
    "age",
    metavar="AGE",
    callback=_age,
    help="Only jobs that ended longer ago than AGE, such as 30d, 12h or 2w.",
)
@click.option(
    "--keep", type=click.IntRange(0), metavar="N", help="Keep the N newest of these jobs."
)
@state_option
@click.option(
    "--unexported",
    is_flag=True,
    help="Also jobs whose results are in no output, or only in one in the job's folder, as with "
    "--output - or rows from Python.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
@click.option("--yes", "-y", is_flag=True, help="Don't ask.")
@json_option
def prune_command(
    age: float | None,
    keep: int | None,
    *,
    states: set[str],
    unexported: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Remove old jobs that have ended.

    Removes those whose output is finished, and those that ended without any results; --unexported
    adds others. Finished outputs stay. New, queued and running jobs are never removed.
    """
    if age is None and keep is None:
        raise click.UsageError("say which jobs are old: --older-than 30d, or --keep N")
    root = home()
    chosen = _old(root, age, keep or 0, states=states, unexported=unexported)
    if chosen and not (dry_run or yes):
        question = f"remove {counted(len(chosen), 'job')}, {size(_sum(chosen))}?"
        if not _agreed(_lines(chosen), question, "prune OPTIONS"):
            return ExitStatus.FAILED
    if not dry_run:
        with one_at_a_time(root):
            sweep(root)
            chosen = [row for row in chosen if _removed(row["folder"], row["seen"])]
    if as_json:
        shown = [
            {name: row[name] for name in row if name not in ("folder", "seen")} for row in chosen
        ]
        say_json({"dry_run": dry_run, "jobs": shown, "bytes": _sum(chosen)})
        return ExitStatus.DONE
    if dry_run and chosen:
        say(*_lines(chosen))
    would = "would remove" if dry_run else "removed"
    say(f"{would} {counted(len(chosen), 'job')}, {size(_sum(chosen))}")
    return ExitStatus.DONE


def _sum(rows: Sequence[dict[str, Any]]) -> int:
    return sum(row["bytes"] for row in rows)


def _lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = [(row["job"], row["state"], size(row["bytes"])) for row in rows]
    name, state, room = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [f"{a:<{name}}  {b:<{state}}  {c:>{room}}" for a, b, c in cells]


def _old(
    root: Any, age: float | None, keep: int, *, states: set[str], unexported: bool
) -> list[dict[str, Any]]:
    """The jobs to remove, newest first."""
    found = []
    for job in reversed(list_jobs(root)):
        try:
            now = job.snapshot()
            lost = bool(now.done) and not _is_exported(job, now)
        except JobError:
            continue  # somebody should look at it
        if now.state in WAITING or held_by(job.path) is not None or now.state == "new":
            continue
        if (lost and not unexported) or (states and now.state not in states):
            continue
        found.append((job, now, now.ended or _last_change(job)))
    old = [row for row in found[keep:] if age is None or time.time() - row[2] > age]
    return [
        {
            **{"folder": job, "seen": now, "job": job.id, "state": now.state, "ended": ended},
            "bytes": _bytes(job),
        }
        for job, now, ended in old
    ]


def _last_change(job: JobFolder) -> float:
    """When a job that could not note its end last wrote, in seconds since the epoch."""
    with suppress(OSError, ValueError), os.scandir(job.path) as entries:
        # SQLite makes -shm, and an empty -wal, for those who only read.
        found = [e.stat() for e in entries if not e.name.endswith("-shm")]
        return max(stat.st_mtime for stat in found if stat.st_size)
    return time.time()


def _bytes(job: JobFolder) -> int:
    """What a job's folder holds on disk."""
    total = 0
    with suppress(OSError):  # another process removes it too
        folders: Iterable[Any] = os.walk(job.path)
        for folder, _, names in folders:
            for name in names:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def _removed(job: JobFolder, seen: JobSnapshot) -> bool:
    """Remove a job, unless something ran since it was `seen`."""
    try:
        if job.snapshot() != seen:
            raise JobError("it was resumed in the meantime")
        job.remove()
    except (JobError, OSError) as error:  # also if it is somebody else's
        tell(f"{job.id} is not removed: {(describe(error) or (error,))[0]}")
        return False
    return True
