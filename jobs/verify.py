"""Whether a job is what it should be: its journal, what it was made of, and what it wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.jobs.errors import JobError
from batchrun.jobs.files import read_json
from batchrun.jobs.folder import JobFolder, check_unchanged
from batchrun.jobs.identity import ModelFingerprint
from batchrun.jobs.journal.journal import STATE, Journal
from batchrun.jobs.output.joined import Joined
from batchrun.jobs.output.rejoin import rejoin
from batchrun.jobs.rows.cells import delimiter_of
from batchrun.jobs.rows.jsonable import json_values
from batchrun.jobs.rows.parquetfile import batches, opened
from batchrun.jobs.rows.row import BATCH_ROWS, Noted, Source, unnoted
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.rows.stream import text_of
from batchrun.jobs.spec import JobSpec, output_format
from batchrun.jobs.stats import STATS

_FINISHED = ("done", "done-with-errors")
_SHOWN = 5  # differences of one output at most


def verify(
    job: JobFolder,
    model_fingerprint: ModelFingerprint | None = None,
    noted: Noted = unnoted,
) -> list[str]:
    """Look for anything wrong with a job. Reads all of its files, changes none.

    Args:
        job: The job; where it runs, the answer is of a moment.
        model_fingerprint: Digests a model; without it the model is not looked at.
        noted: Told what is read of inputs and output.

    Returns:
        Problems, a line each; none when the journal is sound, inputs and model are those of the
        submission, every row has its results exactly once as far as the job has come, and the
        output of a finished job holds exactly the input's columns and the journal's results.
    """
    try:
        spec = job.spec()
        with job.journal() as journal:
            journal.check()
            problems = [*_notes(job, journal)]
            try:
                check_unchanged(job, model_fingerprint)
                parts = [file.part for file in spec.inputs]
                source = open_source(parts, spec.input_format, noted=noted)
            except JobError as error:
                problems.append(str(error))
                source = None
            problems += _rows(spec, journal, source, finished=job.state() in _FINISHED)
            if source is not None and not problems and job.state() in _FINISHED:
                problems += _output(spec, journal, source, noted)
            return problems
    except JobError as error:
        return [f"{error}; {error.hint}" if error.hint else str(error)]


def _notes(job: JobFolder, journal: Journal) -> Iterator[str]:
    """What is damaged of files that repeat what the journal says."""
    runs = journal.runs()
    # What a run noted while it lived is nothing that a loss of power must leave whole.
    broken_off = bool(runs) and runs[-1]["ended_at"] is None
    for name in (STATE, STATS):
        try:
            read_json(job.path / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            if not (broken_off and name == STATE):
                yield (
                    f"{job.path / name} is damaged: {error}; the journal has what it said, "
                    f"and batchrun resume {job.id} writes it anew"
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
        there = source.num_rows if source.num_rows is not None else source.count()
        there = there if spec.limit is None else min(there, spec.limit)
        if there != total:
            yield f"the input has {there:,} rows, the journal says {total:,}"
    samples, beyond = journal.counts().samples, journal.beyond(total)
    if beyond:
        yield f"the journal has {beyond:,} results of rows that the input does not have"
    if finished and samples - beyond != total * spec.n:
        missing = total * spec.n - (samples - beyond)
        yield f"the job is finished, but the journal lacks {missing:,} of its results"


def _output(spec: JobSpec, journal: Journal, source: Source, noted: Noted) -> Iterator[str]:
    """Where the output is not what an export would write now."""
    path = Path(spec.output["path"])
    if not path.exists():
        yield f"the output {path} is gone; the journal has its rows: batchrun export"
        return
    joined = rejoin(spec, journal, source)
    parquet = spec.output["format"] == "parquet"
    try:
        compared = _parquet(path, joined, noted) if parquet else _text(path, joined)
        found = list(islice(compared, _SHOWN))
        if not found:
            joined.finish()
        yield from found
    except (OSError, pa.ArrowException, ValueError, LookupError) as error:
        yield f"the output {path} can't be read: {error}"


def _parquet(path: Path, joined: Joined, noted: Noted) -> Iterator[str]:
    schema = joined.schema()
    with opened(path, noted) as file:
        if file.schema_arrow.names != schema.names:
            yield (
                f"the output {path} has the columns {', '.join(file.schema_arrow.names)}, "
                f"not {', '.join(schema.names)}"
            )
            return
        written = _batches(path, file, noted)
        ahead = pa.Table.from_batches([], file.schema_arrow)
        row = 0
        for batch in joined.batches():
            while ahead.num_rows < batch.num_rows and (more := next(written, None)) is not None:
                ahead = pa.concat_tables([ahead, pa.Table.from_batches([more])])
            for name in schema.names:
                found = _first_difference(batch[name], ahead[name].slice(0, batch.num_rows))
                if found is not None:
                    yield f"the output {path} differs from the job in '{name}' of row {row + found}"
            row += batch.num_rows
            ahead = ahead.slice(batch.num_rows)
        left = ahead.num_rows + sum(more.num_rows for more in written)
        if left:
            yield f"the output {path} has {left:,} rows more than the job"


def _batches(path: Path, file: pq.ParquetFile, noted: Noted) -> Iterator[pa.RecordBatch]:
    for group in range(file.num_row_groups):
        found = batches(path, file, group, file.schema_arrow.names, BATCH_ROWS)
        while True:
            with noted(path):
                batch = next(found, None)
            if batch is None:
                break
            yield batch


def _first_difference(want: pa.Array[Any], got: pa.ChunkedArray[Any]) -> int | None:
    if pa.chunked_array([want]).equals(got):
        return None
    pairs = enumerate(zip_longest(_values([want]), _values(got.chunks)))
    # Not a number is no difference, nor is another dictionary for the same values.
    differing = (i for i, (a, b) in pairs if a != b and repr(a) != repr(b))
    first = next(differing, None)
    return len(got) if first is None and len(got) < len(want) else first


def _values(arrays: Iterable[pa.Array[Any]]) -> list[Any]:
    try:
        return [value for array in arrays for value in array.to_pylist()]
    except ValueError:  # text that is not UTF-8
        return [value for array in arrays for value in json_values(array, "replace")]


def _text(path: Path, joined: Joined) -> Iterator[str]:
    records = joined.lines()
    if output_format(path) == "csv":
        records = joined.delimited(delimiter_of(path))
    with text_of(path) as file:
        for number, want in enumerate(records):
            if file.read(len(want)) != want:
                yield f"the output {path} differs from the job in row {number}"
                return
        if file.read(1):
            yield f"the output {path} has more rows than the job"
