"""`batchrun list`: all jobs, a line for each. Opens the journals of unfinished jobs alone."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import click

from batchrun.cli.inspect import json_option
from batchrun.jobs.errors import JobError
from batchrun.jobs.folder import JobFolder, home, list_jobs
from batchrun.jobs.snapshot import FINISHED, STATES, WAITING, JobSnapshot
from batchrun.runner.live import read_progress
from batchrun.terminal import printable, redraws, say, say_json

_DAMAGED = "damaged"  # what `list` says of a job whose files can't be read
_COUNTED = ("state", "done", "total", "failed", "skipped", "model", "output")
_NAMED = ("name", "tags", "started", "ended", "seconds")
_ROWS_TO_TELL = 5  # with fewer rows in a run, its pace says little
_LEAST = 16  # columns in which a path is still worth showing
_YEAR_S = 300 * 86400
_COLOURS = {
    "done": "green",
    "done-with-errors": "yellow",
    "running": "cyan",
    "failed": "red",
    _DAMAGED: "red",
    "interrupted": "yellow",
    "cancelled": "yellow",
}


def _states(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> set[str]:
    """The states in repeated options, each of which may name several."""
    names = {name.strip() for one in given for name in one.split(",") if name.strip()}
    if unknown := sorted(names - {*STATES, _DAMAGED}):
        known = ", ".join((*STATES, _DAMAGED))
        raise click.BadParameter(
            f"{unknown[0]!r} is not a state; the states are {known}", ctx, param
        )
    return names


state_option = click.option(
    "--state",
    "states",
    multiple=True,
    callback=_states,
    metavar="STATE,...",
    help=f"Only jobs in these states: {', '.join(STATES)}, {_DAMAGED}.",
)


@click.command()
@json_option
@state_option
@click.option("--name", metavar="TEXT", help="Only jobs whose id or name contains TEXT.")
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="TEXT",
    help="Only jobs with this tag, as KEY=VALUE, or KEY for any value; may be repeated.",
)
@click.option("--limit", "-n", type=click.IntRange(1), metavar="N", help="Only the N newest.")
def list_command(
    as_json: bool, states: set[str], name: str | None, tags: tuple[str, ...], limit: int | None
) -> None:
    """List all jobs, the newest first.

    The jobs are the folders in BATCHRUN_HOME/jobs, by default ~/.batchrun/jobs. TIME is how long
    a job's runs lasted, RATE its rows per second in that time, LEFT the estimated time left.
    """

    def wanted(row: dict[str, Any]) -> bool:
        return (
            (not states or row["state"] in states)
            and (not name or name in row["job"] or name in (row["name"] or ""))
            and all(_has(row["tags"], tag) for tag in tags)
        )

    every = map(listed, reversed(list_jobs(home())))
    rows = list(islice(filter(wanted, every), limit))
    if as_json:
        say_json(rows)
    elif rows:
        _print(rows, shutil.get_terminal_size().columns, sys.stdout)
    elif states or name or tags:
        say(f"no job in {home()} matches; for all jobs: batchrun list")
    else:
        say(f"no jobs in {home()}; start one with: batchrun submit prompts.parquet")


def _has(tags: Sequence[str], wanted: str) -> bool:
    return any(tag == wanted or tag.startswith(f"{wanted}=") for tag in tags)


def listed(job: JobFolder) -> dict[str, Any]:
    """One job of the list, as `--json` prints it. A damaged job has its error as its output.

    Returns:
        `job`, `state`, rows `done`, `total`, `failed` and `skipped`, `model`, `output`, `name`,
        `tags`; `created`, `started` and `ended` in seconds since the epoch; `seconds` that its
        runs lasted, `rows_per_s` over these, `seconds_left`. None where something is unknown.
    """
    base = {"job": job.id, "created": job.created}
    try:
        snapshot = job.snapshot()
    except JobError as error:
        unknown = dict.fromkeys((*_COUNTED, *_NAMED, "rows_per_s", "seconds_left"))
        said = {"state": _DAMAGED, "model": "", "output": str(error), "tags": []}
        return {**base, **unknown, **said}
    counted = {name: getattr(snapshot, name) for name in _COUNTED}
    named = {name: getattr(snapshot, name) for name in _NAMED}
    named["tags"] = list(snapshot.tags)
    return {**base, **counted, **named, **_pace(job, snapshot)}


def _pace(job: JobFolder, now: JobSnapshot) -> dict[str, float | None]:
    """How long a job's runs lasted, its rows per second, and its time left while it runs."""
    if now.state not in WAITING:
        return {
            "seconds": now.seconds,
            "rows_per_s": now.done / now.seconds if now.done and now.seconds else None,
            "seconds_left": None,
        }
    rate, progress = None, read_progress(job.path)
    if progress is not None and progress.elapsed_s > 0:
        rows = progress.rows_done - progress.rows_resumed
        rate = rows / progress.elapsed_s if rows >= _ROWS_TO_TELL else None
    passed = [now.seconds, progress.elapsed_s or None if progress is not None else None]
    return {
        # The journal has no figures before the first rows end, which loading comes before.
        "seconds": max((each for each in passed if each is not None), default=None),
        "rows_per_s": rate,
        "seconds_left": progress.seconds_left if progress is not None else None,
    }


def _print(rows: Sequence[dict[str, Any]], width: int, stream: TextIO) -> None:
    """Print a table; columns that the width has no room for are left out, from the last on."""
    columns = {title: [title, *cells] for title, cells in _columns(rows) if any(cells)}
    shown: list[list[str]] = []
    left = width
    for title, column in columns.items():
        most = left - 2 * bool(shown)
        may_cut = title in ("MODEL", "OUTPUT") and most >= _LEAST
        cells = [_cut(cell, most) for cell in column] if may_cut else column
        room = max(map(len, cells))
        if room > most and len(shown) > 1:  # never without the state
            break
        shown.append([cell.ljust(room) for cell in cells])
        left = most - room
    coloured = redraws(stream) and not os.environ.get("NO_COLOR")
    begin = len(shown[0][0]) + 2  # of the state
    for number, line in enumerate(zip(*shown, strict=True)):
        colour = _COLOURS.get(rows[number - 1]["state"]) if number and coloured else None

        def paint(text: str, colour: str | None = colour) -> str:
            end = begin + len(shown[1][0])
            return f"{text[:begin]}{click.style(text[begin:end], fg=colour)}{text[end:]}"

        say("  ".join(line).rstrip(), stream=stream, paint=paint if colour else str)


def _columns(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """The titles and cells of a table, the most important first."""
    yield "JOB", [printable(row["job"]) for row in rows]
    yield "STATE", [printable(_state(row), 40) for row in rows]
    yield "ROWS", [_rows(row) for row in rows]
    yield "LEFT", [_duration(row["seconds_left"]) for row in rows]
    yield "CREATED", [_when(row["created"], time.time()) for row in rows]
    yield "TIME", [_duration(row["seconds"]) for row in rows]
    yield "RATE", [_rate(row["rows_per_s"]) for row in rows]
    yield "MODEL", [printable(_cut(row["model"].rpartition("/")[2], 24)) for row in rows]
    yield "OUTPUT", [printable(_short(row["output"])) for row in rows]


def _state(row: dict[str, Any]) -> str:
    failed = row["failed"]
    return f"done, {failed:,} failed" if row["state"] in FINISHED and failed else row["state"]


def _rows(row: dict[str, Any]) -> str:
    total = "?" if row["total"] is None else f"{row['total']:,}"
    return "" if row["done"] is None else f"{row['done']:,}/{total}"


def _when(seconds: float | None, now: float) -> str:
    """A time: of today the hour, of the last months the day, else the month."""
    if seconds is None:
        return ""
    try:
        then, today = (datetime.fromtimestamp(at).astimezone() for at in (seconds, now))
    except (ValueError, OverflowError, OSError):  # a clock that was wrong
        return "?"
    if then.date() == today.date():
        return f"{then:%H:%M}"
    return f"{then:%b %d}" if abs(now - seconds) < _YEAR_S else f"{then:%Y-%m}"


def _duration(seconds: float | None) -> str:
    """A duration in few characters: `3.4s`, `2m05s`, `3h12m`, `2d05h`."""
    if seconds is None:
        return ""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60}m{total % 60:02}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02}m"
    return f"{total // 86400}d{total % 86400 // 3600:02}h"


def _rate(rows_per_s: float | None) -> str:
    if rows_per_s is None:
        return ""
    if rows_per_s >= 9.95:
        return f"{rows_per_s:,.0f}/s"
    return f"{rows_per_s:.1f}/s" if rows_per_s >= 0.95 else f"{rows_per_s * 60:.1f}/min"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _short(path: str) -> str:
    """A path as a user would type it here."""
    places = [(os.path.expanduser("~"), "~/")]
    with suppress(FileNotFoundError):  # the working folder was removed
        places.insert(0, (os.getcwd(), ""))
    for folder, name in places:
        if Path(path).is_relative_to(folder):
            return name + str(Path(path).relative_to(folder))
    return path
