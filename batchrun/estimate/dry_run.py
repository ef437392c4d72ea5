"""What a run would refuse, found without one: the model's files read, the first rows tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from batchrun.engine.core import Request
from batchrun.engine.waiting import why_refused
from batchrun.estimate.forecast import ModelInfo, read_model_info
from batchrun.jobs.errors import InputError
from batchrun.jobs.journal.results import CopiedResult, DoneSet, Result, RowDigests
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.spec import JobSpec
from batchrun.runner.overdue import PromptLimit
from batchrun.runner.reader import Reader

_ROWS = 20
_BARREN = 2  # rows whose prompts take too long, before it gives up


@dataclass
class _Tried:
    """Takes the place of the engine and the journal, and notes how each row fares."""

    info: ModelInfo
    rows: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)

    full = False

    def put(self, item: Request | Result | CopiedResult | RowDigests) -> None:
        """A request to compute, or a result in its place."""
        if isinstance(item, RowDigests):
            return
        self.rows.add(item.row)
        if isinstance(item, Result) and item.status == "error":
            self.failed[item.row] = item.error or item.status
        elif isinstance(item, Request):
            refused = why_refused(
                len(item.prompt_ids),
                item.params.num_beams,
                max_model_len=self.info.max_model_len,
                max_num_seqs=self.info.max_num_seqs,
                can_fit=self.info.can_fit,
            )
            if refused is not None:
                self.failed[item.row] = refused[1]

    def close(self) -> None:
        """There is no more."""


def dry_run(spec: JobSpec, log: Callable[[str], None], limit: PromptLimit) -> None:
    """Check what can be checked without loading weights, and make prompts of the first 20 rows.

    Args:
        spec: A job that was checked as `make_spec` does.
        log: Told, a line each, what the user should know.
        limit: How long a prompt may take; its note is told what is read.

    Raises:
        JobError: An input can't be read, or not one of the first rows can be computed.
        ModelError: The model would be refused.
        EngineError: An attention backend asked for by name can't be used.
    """
    info = read_model_info(spec, log)
    if info.budget <= 0:
        log("the memory that is free now does not hold the model's weights and keys and values")
    source = open_source(spec.parts, spec.input_format, noted=limit.note.reading)
    source.count()  # through to the end: an array may be cut short, a quote never closed
    unplanned = replace(spec.runtime, plan=False)
    few = replace(spec, limit=min(_ROWS, spec.limit or _ROWS), runtime=unplanned)
    tried = _Tried(info)
    reader = Reader(few, source, DoneSet(spec.n), info, log, limit=limit, barren=_BARREN)
    reader.read(tried, tried)
    if not tried.failed:
        return
    row, reason = next(iter(tried.failed.items()))
    if len(tried.failed) == len(tried.rows):
        raise InputError(
            f"not one of the first {len(tried.rows):,} rows can be computed; row {row}: {reason}",
            hint="mend them, or look at the options that say what makes the prompt: "
            "batchrun submit --help",
        )
    log(
        f"{len(tried.failed):,} of the first {len(tried.rows):,} rows will fail; "
        f"row {row}: {reason}"
    )
