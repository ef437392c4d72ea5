"""`batchrun bench`: what the engine's parts do on this machine, as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from batchrun.cli.inspect import json_option
from batchrun.terminal import say, say_json


@click.group()
def bench_command() -> None:
    """Measure the engine itself."""


@bench_command.command("memory")
@json_option
@click.option("--table8", is_flag=True, help="Print the vAttention paper's Table 8 instead.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Draw the first comparison into this SVG file.",
)
def memory_command(as_json: bool, table8: bool, plot: Path | None) -> None:
    """Compare the KV cache with static reservation and with 16-token paging.

    Requests of recorded lengths go through the real scheduler over real memory, with an executor
    that computes nothing. Nothing is loaded and no GPU is used; it takes some seconds.
    """
    from batchrun.allocator import compare  # noqa: PLC0415  (not needed for --help)
    from batchrun.report import chart, memory  # noqa: PLC0415

    cells = compare.table8()
    if table8:
        shown = [asdict(cell) for cell in cells]
        if as_json:
            say_json(shown)
        else:
            say(*memory.render_table8(cells).split("\n"))
        return
    found = [(case, memory.compare(case)) for case in memory.CASES]
    if plot:
        plot.write_text(chart.draw(*found[0]), encoding="utf-8")
    if as_json:
        cases = [memory.as_dict(case, runs) for case, runs in found]
        table = [asdict(cell) for cell in cells]
        say_json({"benchmark": "memory", "cases": cases, "table8": table})
    else:
        drawn = "\n\n".join(memory.render_case(case, runs) for case, runs in found)
        say(*drawn.split("\n"))
