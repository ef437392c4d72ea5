"""Finds what a run would refuse, without one: reads the model's files, tries the first rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

from batchrun.engine.core import Request
from batchrun.engine.waiting import why_row_refused
from batchrun.estimate.forecast import ModelInfo, read_model_info
from batchrun.jobs.errors import InputError
from batchrun.jobs.journal.results import CopiedResult, DoneSet, Result, RowDigests
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.spec import JobSpec
from batchrun.runner.channel import Channel
from batchrun.runner.overdue import PromptLimit
from batchrun.runner.reader import Read, Reader

_ROWS = 20
_BARREN = 2  # rows whose prompts take too long before it gives up


def dry_run(spec: JobSpec, log: Callable[[str], None], limit: PromptLimit) -> None:
    """Check what can be checked without loading weights, and make prompts of the first 20 rows.

    Args:
        spec: A job that was checked as `make_spec` does.
        log: Called with each line that the user should know.
        limit: How long a prompt may take; its note records what is being read.

    Raises:
        JobError: An input can't be read, or none of the first rows can be computed.
        ModelError: The model would be refused.
        EngineError: An attention backend asked for by name can't be used.
    """
    info = read_model_info(spec, log)
    if info.budget <= 0:
        log("the memory that is free now can't hold the model's weights and a KV cache")
    source = open_source(spec.parts, spec.input_format, noted=limit.note.reading)
    source.count()  # read to the end: an array may be cut short, a quote never closed
    unplanned = replace(spec.runtime, reorder=False)
    few = replace(spec, limit=min(_ROWS, spec.limit or _ROWS), runtime=unplanned)
    reader = Reader(few, source, DoneSet(spec.n), info, log, limit=limit, barren=_BARREN)
    made: Channel[Request | Read] = Channel(sys.maxsize)  # unbounded: the rows are few
    reader.read(made, made)
    tried, failed = set(), {}
    for item in made.take(sys.maxsize):
        if isinstance(item, RowDigests):
            continue
        tried.add(item.row)
        if (reason := _refused(item, info)) is not None:
            failed[item.row] = reason
    if not failed:
        return
    row, reason = next(iter(failed.items()))
    if len(failed) == len(tried):
        raise InputError(
            f"none of the first {len(tried):,} rows can be computed; row {row}: {reason}",
            hint="fix them, or look at the options that say what makes the prompt: "
            "batchrun submit --help",
        )
    log(f"{len(failed):,} of the first {len(tried):,} rows will fail; row {row}: {reason}")


def _refused(item: Request | Result | CopiedResult, info: ModelInfo) -> str | None:
    """Why a row can't be computed."""
    if isinstance(item, Request):
        refused = why_row_refused(
            item,
            max_model_len=info.max_model_len,
            max_num_seqs=info.max_num_seqs,
            can_fit=info.can_fit,
        )
        return refused[1] if refused is not None else None
    return item.error if isinstance(item, Result) and item.status == "error" else None
