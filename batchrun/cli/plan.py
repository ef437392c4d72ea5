"""`batchrun plan`: what a job would take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from batchrun.cli.inspect import print_fields
from batchrun.cli.jobnames import files
from batchrun.cli.options import SectionCommand, job_options, section_option
from batchrun.cli.progress import Tell, waited
from batchrun.jobs.folder import home
from batchrun.jobs.inflight import ReaderNote
from batchrun.jobs.kinds import FLEET, MODEL, NAMES, PROMPT, RUNNING, SAMPLING, SCORES, SHAPE
from batchrun.report.text import counted, seconds, size
from batchrun.runner.overdue import PromptLimit, prompt_seconds
from batchrun.terminal import say_json


@click.command(cls=SectionCommand, configured=None)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", shell_complete=files)
@job_options(MODEL, PROMPT, SAMPLING, SHAPE, SCORES, NAMES, FLEET, RUNNING)
@section_option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_command(inputs: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Estimate a job's tokens, memory and time before it runs.

    Reads, tokenises and plans the whole input, as `submit` with the same options would, but does
    not load the model. The time is estimated from earlier jobs with this model on this machine.
    """
    from batchrun.cli.piped import taken_in  # noqa: PLC0415 - Arrow, as below
    from batchrun.options import PIPE  # noqa: PLC0415

    # An input may have columns that an output would add.
    unused = {"output": PIPE, "output_prefix": "\0", "overwrite": True}
    with taken_in(inputs, home()) as (paths, _):
        found = waited(
            "planning", lambda note, tell: _found(paths, {**options, **unused}, note, tell)
        )
    if as_json:
        say_json(found)
    else:
        print_fields(_shown(found))


def _found(
    paths: list[str], options: Mapping[str, Any], note: ReaderNote, tell: Tell
) -> dict[str, Any]:
    from batchrun.estimate.forecast import forecast  # noqa: PLC0415 - imports numpy
    from batchrun.specs import make_spec  # noqa: PLC0415

    spec = make_spec(paths, home(), options, log=tell, noted=note.reading)
    with PromptLimit(note, prompt_seconds()) as limit:
        return forecast(spec, tell, limit)


def _shown(found: Mapping[str, Any]) -> dict[str, Any]:
    kv, same, time = found["kv"], found["duplicates"], found["seconds"]
    rows = [f"{found['rows']:,}"]
    rows += [f"{found['skipped']:,} skipped"] * bool(found["skipped"])
    rows += [f"{count:,} will fail: {kind}" for kind, count in found["errors"].items()]
    if same["rows"]:
        rows.append(f"{same['rows']:,} duplicates, not computed")
    saved, planning = found["saved"], "saves nothing compared with the file's order"
    if any(saved.values()):
        planning = f"saves about {saved['prompt_tokens']:,} prompt tokens, {saved['steps']:,} steps"
    engines = found["engines"]
    for_each = f"; each of {engines:,} devices" if engines > 1 else ""
    each = "of these lengths fit into" if kv["sequences"] else "of these lengths do not fit into"
    took = "unknown until a job with this model has run on this machine"
    if time is not None:
        took = (
            f"about {seconds(time['engine'])}, and {seconds(time['load'])} to load the model "
            f"(estimated from {counted(found['measured_runs'], 'run')}{for_each})"
        )
    return {
        "rows": rows,
        "prompts": [
            f"{found['prompt_tokens']:,} tokens",
            f"{found['shared_tokens']:,} of them shared and not computed again",
        ],
        "completions": [
            f"at most {found['completion_tokens']:,} tokens",
            f"about {found['expected_tokens']:,} to compute",
        ],
        "KV memory": [
            f"{size(kv['token_bytes'])} per token",
            f"{kv['sequences'] or 0:,} sequences {each} {size(kv['budget_bytes'])}{for_each}",
        ],
        "steps": f"about {found['steps']:,}, of at most {found['max_num_seqs']:,} sequences"
        + for_each,
        "planning": planning,
        "time": took,
    }
