"""A job's output, made from its journal and its input, whatever has happened to the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from batchrun.jobs.errors import InputError, JobError, SpecChanged
from batchrun.jobs.files import MayReplace
from batchrun.jobs.identity import changes
from batchrun.jobs.journal.journal import READ, Journal
from batchrun.jobs.output.columns import output_columns
from batchrun.jobs.output.export import export
from batchrun.jobs.output.joined import Joined
from batchrun.jobs.output.result_reader import ResultMissing, ResultReader
from batchrun.jobs.rows.formats import FORMATS
from batchrun.jobs.rows.row import Source, reading
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.rows.store import INPUTS, Noted, each, unnoted
from batchrun.jobs.spec import JobSpec
from batchrun.objectstore.paths import Location

_LEFT = (
    "batchrun export --partial -o FILE writes results by row number, with the input that is left"
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        rows: Number of rows.
        unknown: Of these, rows whose input was changed or is gone; None if all of it is intact.
    """

    rows: int
    unknown: int | None = None


def export_job(
    spec: JobSpec,
    journal: Journal,
    destination: Location,
    *,
    format: str,  # noqa: A002 - the field's word
    partial: bool = False,
    may_replace: MayReplace = lambda _: True,
    noted: Noted = unnoted,
    lost: Location | None = None,
    told: Callable[[int], None] = lambda count: None,
) -> Exported:
    """Write a job's results beside the input rows that they were computed from.

    With `partial`, missing results are left out. If the input has changed, the output has what is
    left: a column `row` comes first, and the input's columns are null in changed rows. From a
    changed Parquet file it takes only columns that the job read, as no others can be proven
    unchanged.

    Args:
        spec: The job.
        journal: Its results.
        destination: The file.
        format: Of the file.
        partial: Whether results may be missing, and the input may have changed.
        may_replace: See `export`.
        noted: Told what is read of the input.
        lost: A file of the input that is known to be unreadable.
        told: Called now and then with the number of rows written so far.

    Raises:
        SpecChanged: The input has changed, and `partial` is not set.
        InputError: It can't be read, and `partial` is not set.
        OutputError: The file can't be written.
        JobError: A result is missing and `partial` is not set, or it belongs to no row.
    """

    def write(joined: Joined) -> Exported:
        joined.told = told
        private = spec.output.stdout  # then it is kept in the job's folder
        rows = export(joined, destination, format=format, may_replace=may_replace, private=private)
        return Exported(rows, joined.unknown if joined.numbered else None)

    try:
        if lost is not None:
            raise InputError(f"{lost} can't be read")
        return write(rejoin(spec, journal, partial=partial, noted=noted))
    except ResultMissing as error:
        if (unfinished := _unfinished(spec, journal)) is None:
            raise
        raise unfinished from error
    except (SpecChanged, InputError) as error:
        if not partial:
            error.hint = f"{error.hint}; {_LEFT}" if error.hint else _LEFT
            raise
    try:
        return write(_what_is_left(spec, journal, noted, lost))
    except InputError:
        nothing = open_source([], spec.input_format, lenient=True)
        return write(_joined(spec, journal, nothing, partial=True, numbered=True))


def _unfinished(spec: JobSpec, journal: Journal) -> JobError | None:
    """The error for a job with rows to do, which says how far it is; None if it has none."""
    counts, total = journal.counts(), journal.meta("rows_total")
    if total is not None and counts.samples >= total * spec.n:
        return None
    done = "no rows are done" if total is None else f"{counts.rows:,} of {total:,} rows are done"
    return JobError(
        f"the job is not finished: {done}",
        hint="batchrun resume, or batchrun export --partial for the finished rows",
    )


def rejoin(
    spec: JobSpec,
    journal: Journal,
    source: Source | None = None,
    *,
    partial: bool = False,
    noted: Noted = unnoted,
) -> Joined:
    """A job's results beside its input, which must be unchanged.

    Args:
        spec: The job.
        journal: Its results.
        source: Its input, if open already.
        partial: Whether results may be missing.
        noted: Told what is read of the input.

    Raises:
        SpecChanged: The input has changed.
        InputError: It can't be read.
    """
    if source is None:
        source = open_source(spec.parts, spec.input_format, noted=noted)
    files = _Files(spec)
    if FORMATS[spec.input_format].columnar:  # digests cover only the columns that were read
        files.compare()
    return _joined(spec, journal, source, partial=partial, whole=files.compare, check=files.check)


class _Files:
    """A job's input files, for when digests of rows can't prove them unchanged."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._before = self._identities()
        self._compared = False

    def compare(self) -> None:
        """Compare them with what was submitted, once.

        Raises:
            SpecChanged: They differ.
            InputError: One can't be read.
        """
        if self._compared:
            return
        found = changes(self._spec)
        if found:
            raise SpecChanged(
                f"the input changed since the job was submitted: {'; '.join(found)}; the results "
                "are safe in the job",
                hint="restore it, then: batchrun export",
            )
        self._compared = True

    def check(self) -> None:
        """Prove that the files that were read are those that were compared.

        Raises:
            SpecChanged: A file was changed in the meantime.
            InputError: One can't be read.
        """
        if not self._compared:
            return
        for file, was, now in zip(self._spec.inputs, self._before, self._identities(), strict=True):
            if was != now:
                raise SpecChanged(f"{file.path} was changed while it was read", "batchrun export")

    def _identities(self) -> list[tuple[int, ...]]:
        paths = self._spec.input_paths

        def identity(number: int) -> tuple[int, ...]:
            with reading(paths[number]):
                return INPUTS.stat(paths[number]).identity

        return each(paths, identity)


def _what_is_left(spec: JobSpec, journal: Journal, noted: Noted, lost: Location | None) -> Joined:
    parts = list(takewhile(lambda part: part.path != lost, spec.parts))
    source = open_source(parts, spec.input_format, lenient=True, noted=noted)
    columns = None
    if FORMATS[spec.input_format].columnar:
        columns = journal.meta(READ) or []
        if not set(columns) <= set(source.column_names):
            source, columns = open_source([], spec.input_format, lenient=True), []
    return _joined(spec, journal, source, partial=True, numbered=True, columns=columns)


def _joined(
    spec: JobSpec, journal: Journal, source: Source, *, partial: bool, **more: Any
) -> Joined:
    """A job's results beside a source; `more` goes to `Joined`."""
    total = journal.meta("rows_total")
    return Joined(
        source,
        ResultReader(journal.results(skip_damaged=partial), spec.n, partial, spec.keep, total),
        output_columns(spec),
        limit=spec.limit if total is None else int(total),
        digests=journal.digests,
        read=journal.meta(READ) or [],
        **more,
    )
