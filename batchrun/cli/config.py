"""`batchrun config`: which options are in force here, and where each comes from."""

from __future__ import annotations

import json
from typing import Any

import click

from batchrun.cli.inspect import json_option
from batchrun.cli.options import SectionCommand, job_options, sources
from batchrun.jobs.kinds import OF_SUBMIT
from batchrun.options import OPTIONS
from batchrun.terminal import MESSAGE, printable, say, say_json

_VALUE = 80  # characters of a value


@click.command(cls=SectionCommand, configured=None)
@click.argument("inputs", nargs=-1, metavar="[JOB.toml]")
@job_options(*OF_SUBMIT)
@json_option
@click.pass_context
def config_command(
    ctx: click.Context, /, inputs: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Show the options in force, and where each comes from.

    These are what `submit` would use here, with the same job file and options. In order, the first
    wins: the command line; variables (BATCHRUN_MAX_TOKENS=64 is --max-tokens 64); the job file; the
    file batchrun.toml of this folder, or the nearest above it up to a repository's root; the file
    ~/.config/batchrun/batchrun.toml; the default.
    """
    found = sources(ctx)
    if as_json:
        shown = {n: {"value": OPTIONS[n].read(v), "source": found[n]} for n, v in options.items()}
        say_json({"inputs": list(inputs), "options": shown})
        return
    lines = [("inputs", printable(name, MESSAGE), "") for name in inputs]
    for name, given in options.items():
        value = OPTIONS[name].read(given)
        if found[name] != "default" or value not in (None, (), {}, ""):
            said = printable(json.dumps(value, ensure_ascii=False), _VALUE)
            lines.append((OPTIONS[name].flag, said, printable(found[name], MESSAGE)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        say("  ".join(cells).rstrip())
