"""`batchrun peek`: some rows of a job beside their answers, also while it runs."""

from __future__ import annotations

import secrets
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import click

from batchrun.cli.inspect import job_argument, json_option
from batchrun.cli.progress import waited
from batchrun.jobs.folder import find as find_job
from batchrun.jobs.folder import home
from batchrun.runner.isolated import ReaderCrashed
from batchrun.terminal import MESSAGE, printable, say, say_json, tell

if TYPE_CHECKING:  # it loads Arrow
    from batchrun.peek import Example

_ROWS = 5
_LINES = 6  # of a text, unless --full is given
_INDENT = "  "


def _ranges(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> list[range]:
    """Row numbers and ranges: `7`, `10-19`, with commas too."""
    found = []
    for part in (part.strip() for one in given for part in one.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            wrong = f"{part!r} is neither a row number from 0 nor a range like 10-19"
            raise click.BadParameter(wrong, ctx, param)
        found.append(range(int(first), int(last if dash else first) + 1))
        if not found[-1] or found[-1].stop > 1 << 40:
            raise click.BadParameter(f"{part!r} is not a valid range of rows", ctx, param)
    return found


@click.command()
@job_argument
@click.option(
    "-n",
    "count",
    type=click.IntRange(1),
    metavar="ROWS",
    help=f"Number of rows to show: {_ROWS} by default, or all that --row names.",
)
@click.option(
    "--row",
    "rows",
    multiple=True,
    callback=_ranges,
    metavar="N|N-N,...",
    help="Only these rows, numbered from 0; may be repeated.",
)
@click.option("--failed", is_flag=True, help="Only rows that failed.")
@click.option(
    "--random", "shuffled", is_flag=True, help="Rows chosen at random instead of the first ones."
)
@click.option("--seed", type=int, help="Choose the same rows as an earlier --random.")
@click.option("--full", is_flag=True, help="Don't shorten long texts.")
@json_option
def peek_command(
    job: str | None,
    *,
    count: int | None,
    rows: list[range],
    failed: bool,
    shuffled: bool,
    seed: int | None,
    full: bool,
    as_json: bool,
) -> None:
    """Show some rows of a job beside their answers.

    Shows finished rows only, also while the job runs: the prompt (of a chat, the last user
    message), the answer, its finish reason and its tokens. A failed row has its error instead. A
    prompt is shown only if the input still has exactly the row that was computed.
    """
    from batchrun.peek import examples  # noqa: PLC0415 - Arrow

    folder = find_job(home(), job)
    if shuffled and seed is None:
        seed = secrets.randbelow(1 << 32)
    if count is None and not rows:
        count = _ROWS

    look = partial(examples, folder, count, failed=failed, seed=seed, rows=rows)
    try:
        found = waited("reading the input", lambda note, _: look(noted=note.reading))
    except ReaderCrashed as crash:
        found = look(unread=str(crash))
    if as_json:
        counts = folder.snapshot()
        shown = {"job": folder.id, "state": counts.state, "done": counts.done}
        say_json({**shown, "total": counts.total, "seed": seed, "rows": list(map(asdict, found))})
        return
    if not found:
        say(_nothing(failed=failed, chosen=bool(rows)))
        return
    width = max(20, shutil.get_terminal_size().columns)
    for example in found:
        say(*_lines(example, width, full=full))
    if reasons := list(dict.fromkeys(e.unread for e in found if e.unread is not None)):
        tell(f"some prompts are not shown: {reasons[0]}")
    if shuffled:
        tell(f"chosen at random: --seed {seed}")


def _nothing(*, failed: bool, chosen: bool) -> str:
    if failed:
        return "no failed row" + (" among these" if chosen else "")
    return "none of these rows is finished" if chosen else "no row is finished yet"


def _lines(example: Example, width: int, *, full: bool) -> Iterator[str]:
    """An example as lines for a terminal."""
    parts = [f"row {example.row:,}"]
    if example.sample:
        parts[0] += f", sample {example.sample}"
    if example.status == "ok":
        parts.append(example.finish_reason or "")
        parts.append(f"{example.prompt_tokens:,} + {example.completion_tokens:,} tokens")
    else:
        parts.append({"error": "failed", "skipped": "skipped"}[example.status])
    yield "  ".join(filter(None, parts))
    if example.prompt is not None:
        yield from _text("prompt", example.prompt, width, full=full)
    elif example.unread is None:
        yield f"{_INDENT}prompt: none"
    if example.answer is not None:
        yield from _text("answer", example.answer, width, full=full)
    if example.error is not None:
        yield f"{_INDENT}error:  {printable(example.error, MESSAGE)}"
    yield ""


def _text(title: str, text: str, width: int, *, full: bool) -> Iterator[str]:
    """A text below its title, wrapped, and cut after some lines unless `full`."""
    head = f"{_INDENT}{title}: "
    room = max(20, width - len(head))
    # Wrapping millions of characters to show six lines would take minutes.
    kept = text if full else text[: room * _LINES * 2]
    lines = [
        piece
        for line in kept.split("\n")
        for piece in (textwrap.wrap(printable(line), room, break_on_hyphens=False) or [""])
    ]
    cut = lines if full else lines[:_LINES]
    shown = sum(map(len, cut))
    for number, line in enumerate(cut):
        yield ((head if number == 0 else " " * len(head)) + line).rstrip()
    if len(cut) < len(lines) or len(kept) < len(text):
        yield f"{' ' * len(head)}... {max(1, len(text) - shown):,} more characters: --full"
