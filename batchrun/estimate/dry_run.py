"""Finds what a run would refuse, without one: reads the model's files, tries the first rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from batchrun.engine.core import Request
from batchrun.engine.waiting import why_row_refused
from batchrun.estimate.forecast import ModelInfo, read_model_info
from batchrun.grammars.constraint import with_constraint
from batchrun.jobs.errors import InputError
from batchrun.jobs.journal.results import CopiedResult, DoneSet, Result, RowDigests
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.spec import OPTIONS, JobSpec
from batchrun.runner.channel import Channel
from batchrun.runner.overdue import PromptLimit
from batchrun.runner.reader import Read, Reader

_OWN = ("seed", "json_schema", "regex", "choices", "grammar", "logprobs")  # not the engine's
_ROWS = 20
_BARREN = 2  # rows whose prompts take too long before it gives up


@dataclass(frozen=True)
class Tried:
    """What a dry run found.

    Args:
        rows: How many rows the job has.
        row: The number of the first row with a prompt.
        prompt: Its prompt as the model gets it.
        tokens: Tokens of that.
        found: Values of options that the model and the machine determine, by name.
        of_model: The names of those that come from the model's files.
    """

    rows: int
    row: int
    prompt: str
    tokens: int
    found: Mapping[str, Any]
    of_model: tuple[str, ...]


def dry_run(spec: JobSpec, log: Callable[[str], None], limit: PromptLimit) -> Tried | None:
    """Check what can be checked without loading weights, and make prompts of the first 20 rows.

    Returns:
        What was found; None if the input has no row.

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
    rows = source.count()  # read to the end: an array may be cut short, a quote never closed
    rows = rows if spec.limit is None else min(rows, spec.limit)
    unplanned = replace(spec.runtime, reorder=False)
    few = replace(spec, limit=min(_ROWS, spec.limit or _ROWS), runtime=unplanned)
    reader = Reader(few, source, DoneSet(spec.n), info, log, limit=limit, barren=_BARREN)
    made: Channel[Request | Read] = Channel(sys.maxsize)  # unbounded: the rows are few
    reader.read(made, made)
    tried, failed, first = set(), {}, None
    for item in made.take(sys.maxsize):
        if isinstance(item, RowDigests):
            continue
        tried.add(item.row)
        if first is None and isinstance(item, Request):
            first = item
        if (reason := _refused(item, info)) is not None:
            failed[item.row] = reason
    if failed:
        _tell(failed, len(tried), log)
    if first is None:
        return None
    prompt = info.decode(first.prompt_ids)
    found, of_model = _determined(spec, info)
    return Tried(rows, first.row, prompt, len(first.prompt_ids), found, of_model)


def _tell(failed: Mapping[int, str], tried: int, log: Callable[[str], None]) -> None:
    """Say why the first rows fail.

    Raises:
        InputError: All of them do.
    """
    row, reason = next(iter(failed.items()))
    if len(failed) == tried:
        raise InputError(
            f"none of the first {tried:,} rows can be computed; row {row}: {reason}",
            hint="correct them, or see the options that build the prompt: batchrun submit --help",
        )
    log(f"{len(failed):,} of the first {tried:,} rows will fail; row {row}: {reason}")


def _determined(spec: JobSpec, info: ModelInfo) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The values of options that model and machine determine; and which are from its files."""
    given, model = spec.sampling.given, info.generation
    params = asdict(model.params(with_constraint(given)))
    found = {name: params[name] for name in OPTIONS if name in params and name not in _OWN}
    own = {name for name in {*model.sampling, *(["stop"] if model.stop else [])} if name in found}
    if model.max_length is not None and "max_tokens" not in given:
        found["max_tokens"] = f"up to {model.max_length:,} with the prompt"
        own.add("max_tokens")
    found |= {"device": info.device, "dtype": info.dtype, "max_model_len": info.max_model_len}
    found |= {"max_num_seqs": info.max_num_seqs, "kv_budget": info.budget}
    found["max_num_batched_tokens"] = info.max_num_batched_tokens
    if spec.model.max_model_len is None:
        own.add("max_model_len")
    return found, tuple(sorted(own - given.keys()))


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
