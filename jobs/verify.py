"""Checks that a job is intact: its journal, its inputs and model, and its output."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pyarrow as pa

from batchrun.jobs.errors import JobError
from batchrun.jobs.files import read_json
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.identity import ModelFingerprint, check_unchanged
from batchrun.jobs.journal.journal import STATE, Journal
from batchrun.jobs.output.rejoin import rejoin
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.rows.formats import FORMATS
from batchrun.jobs.rows.row import Source
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.rows.store import Noted, unnoted
from batchrun.jobs.snapshot import FINISHED
from batchrun.jobs.spec import JobSpec
from batchrun.jobs.stats import STATS
from batchrun.objectstore.paths import location

_SHOWN = 5  # differences shown per output at most


def verify(
    job: JobFolder, model_fingerprint: ModelFingerprint | None = None, noted: Noted = unnoted
) -> list[str]:
    """Look for anything wrong with a job. Reads all of its files, changes none.

    Args:
        job: The job; if it is running, the answer holds only for the moment.
        model_fingerprint: Digests a model; without it the model is not checked.
        noted: Told what is being read of inputs and output.

    Returns:
        Problems, a line each. None if the journal is sound, inputs and model are those that were
        submitted, every row so far has its results exactly once, and the output of a finished job
        holds exactly the input's columns and the journal's results.
    """
    try:
        spec = job.spec()
        with job.journal() as journal:
            journal.check()
            problems = [*_notes(job, journal)]
            try:
                check_unchanged(job, model_fingerprint)
                source = open_source(spec.parts, spec.input_format, noted=noted)
            except JobError as error:
                problems.append(str(error))
                source = None
            problems += _rows(spec, journal, source, finished=job.state() in FINISHED)
            if source is not None and not problems and job.state() in FINISHED:
                problems += _output(spec, journal, source, noted)
            return problems
    except JobError as error:
        return [f"{error}; {error.hint}" if error.hint else str(error)]


def _notes(job: JobFolder, journal: Journal) -> Iterator[str]:
    """Damage to files that repeat what the journal says."""
    runs = journal.runs()
    # A run's notes while it is alive need not survive a power loss.
    broken_off = bool(runs) and runs[-1]["ended_at"] is None
    for name in (STATE, STATS):
        try:
            read_json(job.path / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            if not (broken_off and name == STATE):
                yield (
                    f"{job.path / name} is damaged: {error}; the journal has its content, "
                    f"and batchrun resume {job.id} rewrites it"
                )


def _rows(
    spec: JobSpec, journal: Journal, source: Source | None, *, finished: bool
) -> Iterator[str]:
    total = journal.meta("rows_total")
    if total is None:
        if finished or journal.counts().samples:
            yield f"{journal.path} does not say how many rows there are"
        return
    if source is not None:
        there = source.count()
        there = there if spec.limit is None else min(there, spec.limit)
        if there != total:
            yield f"the input has {there:,} rows, but the journal says {total:,}"
    samples, beyond = journal.counts().samples, journal.beyond(total)
    if beyond:
        yield f"the journal has {beyond:,} results for rows that the input does not have"
    if finished and samples - beyond != total * spec.n:
        missing = total * spec.n - (samples - beyond)
        yield f"the job is finished, but the journal lacks {missing:,} of its results"


def _output(spec: JobSpec, journal: Journal, source: Source, noted: Noted) -> Iterator[str]:
    """Where the output differs from what an export would write now."""
    path = location(spec.output.path)
    if OUTPUTS.identity(path) is None:
        yield f"the output {path} is gone; the journal has its rows: batchrun export"
        return
    joined = rejoin(spec, journal, source)
    try:
        differences = FORMATS[spec.output.format].differences(path, joined, noted)
        found = list(islice(differences, _SHOWN))
        if not found:
            joined.finish()
        yield from found
    except (OSError, pa.ArrowException, ValueError, LookupError) as error:
        yield f"the output {path} can't be read: {error}"
