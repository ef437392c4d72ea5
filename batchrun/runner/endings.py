"""How a run ends: the output is written, and what became of it is noted."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from batchrun.errors import StepFailed
from batchrun.jobs.errors import Fenced, JournalError, OutputTaken
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.identity import grown
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.metrics import Figures
from batchrun.jobs.output.destination import Claim
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.rows.store import Noted
from batchrun.jobs.spec import JobSpec


class Outcome(StrEnum):
    """How a run ended; also the job's state from then on."""

    DONE = "done"
    DONE_WITH_ERRORS = "done-with-errors"
    INTERRUPTED = "interrupted"
    CANCELLED = "cancelled"
    FAILED = "failed"


def write_output(
    job: JobFolder, spec: JobSpec, run: int, noted: Noted, log: Callable[[str], None]
) -> None:
    """Write the job's output, all of whose results are in the journal.

    Raises:
        OutputTaken: Somebody else's file is there, and stays.
    """
    path = Path(spec.output.path)
    with Journal(job.path, spec.n) as journal:
        journal.resume_run(run)
        claim = Claim(journal, path, overwrite=spec.output.overwrite)
        try:
            export_job(
                spec, journal, path, format=spec.output.format, may_replace=claim, noted=noted
            )
        except OutputTaken as error:
            error.hint = (
                f"batchrun export {job.id} --output OTHER, "
                f"or batchrun resume {job.id} --overwrite to replace it"
            )
            raise
    for line in grown(spec):
        log(line)


def note_end(
    job: JobFolder,
    spec: JobSpec,
    run: int,
    outcome: Outcome,
    figures: Figures,
    *,
    failure: Exception | None,
) -> None:
    """Note in journal and snapshot how a run ended, and why where it failed."""
    if isinstance(failure, Fenced):
        return  # the job is another worker's
    reason = None if failure is None else str(failure)
    if not isinstance(failure, JournalError):  # a journal that failed is not written again
        with Journal(job.path, spec.n) as journal:
            journal.resume_run(run)
            journal.end_run(str(outcome), figures, reason)
    if not isinstance(failure, StepFailed):  # its supervisor tries again
        job.set_state(str(outcome), reason)
