"""batchrun from Python: jobs that outlive their submitter, and a model for loops in a notebook.

Options have the names of the command line's, with underscores; `batchrun submit --help` says what
each does.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun import notebook, submission
from batchrun.jobs import cancel, folder
from batchrun.jobs.errors import InputError, JobError
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.inflight import ReaderNote
from batchrun.jobs.lease import held_by
from batchrun.jobs.output.rejoin import rejoin
from batchrun.jobs.rows.formats import FORMATS
from batchrun.jobs.rows.jsonl import JsonFormat
from batchrun.jobs.snapshot import FINISHED
from batchrun.jobs.spec import JobSpec
from batchrun.jobs.stats import summarise
from batchrun.objectstore.paths import Location, location
from batchrun.options import PIPE
from batchrun.peek import Example, examples
from batchrun.platforms import need_linux
from batchrun.provenance import call
from batchrun.runner.isolated import isolated
from batchrun.runner.live import Progress, read_progress
from batchrun.specs import modelless_spec, read_options, with_model

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

    from batchrun.jobs.output.joined import Joined
    from batchrun.runner.supervisor import Started

Inputs = (
    str
    | os.PathLike[str]
    | Iterable[str | os.PathLike[str]]
    | pa.Table
    | Iterable[Mapping[str, Any]]
)

_POLL_S = 0.1
_log = logging.getLogger("batchrun").info


class Job:
    """A job, which runs in a process of its own, whatever becomes of this one."""

    def __init__(self, job: JobFolder, started: Started | None = None) -> None:
        self._job, self._started = job, started

    @classmethod
    def find(cls, name: str | None = None) -> Job:
        """The job with that id, or the only one with that part in its id; by default the latest.

        Raises:
            JobNotFound: No job matches, or more than one.
        """
        return cls(folder.find(folder.home(), name))

    def __repr__(self) -> str:
        return notebook.line(self._job)

    def _repr_html_(self) -> str:
        return notebook.html(self._job)

    @property
    def id(self) -> str:
        """Its name, as `batchrun list` shows it."""
        return self._job.id

    @property
    def state(self) -> str:
        """One of new, queued, running, interrupted, done, done-with-errors, failed, cancelled."""
        return self._job.state()

    @property
    def output(self) -> Location:
        """The file, or object, of its answers; there once the job is done."""
        return location(self._job.spec().output.path)

    def wait(self, timeout: float | None = None, *, progress: bool | None = None) -> Job:
        """Return this job when it has ended: done, with failed rows or without, or stopped.

        Ctrl-C, or interrupting the notebook's kernel, ends only the waiting: the job continues.

        Args:
            timeout: Maximum seconds to wait.
            progress: Whether to show a progress bar; by default in a notebook, and where stderr is
                a terminal.

        Raises:
            TimeoutError: It has not ended after that.
            JobError: It failed; the message says why.
        """
        try:
            self._watch(timeout, progress)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(
                f"the job {self.id} continues in a process of its own: "
                "wait() waits for it again, cancel() stops it"
            )
            raise
        if self.state == "failed":
            reason, hint = self._job.failure() or ("it failed", None)
            raise JobError(f"the job {self.id} failed: {reason}", hint)
        return self

    def _watch(self, timeout: float | None, progress: bool | None) -> None:
        until = None if timeout is None else time.monotonic() + timeout
        if not self._alive():
            return
        with notebook.Bar(progress, "waiting for the job to begin") as bar:
            while self._alive():
                if until is not None and time.monotonic() >= until:
                    raise TimeoutError(f"the job {self.id} has not ended after {timeout} s")
                if (now := self.progress()) is not None:
                    bar.follow(now)
                time.sleep(_POLL_S)
            with suppress(JobError, OSError):  # what was published last may be older
                ended = self._job.snapshot()
                bar.end(ended.state, ended.total, ended.done or 0, ended.failed)

    def _alive(self) -> bool:
        if self._started is not None:
            return self._started.alive()
        return held_by(self._job.path) is not None

    def progress(self) -> Progress | None:
        """How far its run is, updated a few times a second; None before the first update."""
        return read_progress(self._job.path)

    def stats(self) -> dict[str, Any]:
        """What `batchrun stats --json` prints."""
        return summarise(self._job)

    def peek(self, count: int = 5, *, failed: bool = False) -> list[Example]:
        """The first finished rows, with their prompts and answers, also while the job runs.

        Args:
            count: How many at most.
            failed: Only rows that failed.

        Raises:
            JobError: The journal can't be read.
        """
        return examples(self._job, count, failed=failed)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The output's rows, in input order; until the job is done, the finished ones.

        Raises:
            JobError: The input has changed, or can't be read.
        """
        with self._joined() as joined:
            if FORMATS[self._job.spec().input_format].columnar:
                for batch in joined.batches():
                    yield from batch.to_pylist()
            else:
                yield from map(json.loads, JsonFormat().records(joined, self.output))

    def to_arrow(self) -> pa.Table:
        """The output's rows as a table; until the job is done, the finished ones.

        Raises:
            JobError: The input has changed, or can't be read.
        """
        with self._joined() as joined:
            return pa.Table.from_batches(list(joined.batches()), joined.schema())

    def to_pandas(self) -> pd.DataFrame:
        """The output's rows as a DataFrame of pandas; until the job is done, the finished ones.

        The index is that of the input if pandas wrote it, else the row's number. Whole numbers and
        booleans with missing values have pandas' nullable types: they never become floats.

        Raises:
            MachineError: pandas is not installed.
            JobError: The input has changed, or can't be read.
        """
        return notebook.pandas_of(self.to_arrow())

    def to_polars(self) -> pl.DataFrame:
        """The output's rows as a DataFrame of polars; until the job is done, the finished ones.

        Raises:
            MachineError: polars is not installed.
            JobError: The input has changed, or can't be read.
        """
        return notebook.polars_of(self.to_arrow())

    @contextmanager
    def _joined(self) -> Iterator[Joined]:
        """The output's rows; checks the input once all are read."""
        partial = self.state not in FINISHED
        with self._job.journal() as journal:
            joined = rejoin(self._job.spec(), journal, partial=partial)
            yield joined
            joined.finish()

    def resume(
        self,
        *,
        retry_failed: bool = False,
        output: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        **limits: Any,
    ) -> Job:
        """Continue: finished rows are kept, unfinished ones go on where they were.

        Args:
            retry_failed: Do the failed rows again.
            output: Another file for the output, from now on.
            overwrite: Replace what is there now, whoever wrote it.
            limits: `max_num_seqs`, `max_num_batched_tokens`, `kv_budget`, `keep_going`, and
                `devices`, or `ray` with its options, from now on.

        Raises:
            JobError: It is running, its input changed, or its output is another job's.
        """
        started = submission.resume(
            folder.home(),
            self._job,
            retry_failed=retry_failed,
            output=output,
            overwrite=overwrite,
            limits=limits,
            tell=_log,
        )
        self._reap()
        self._started = started
        return self

    def cancel(self) -> Job:
        """Stop it; its results are kept.

        Raises:
            JobError: It isn't running.
        """
        cancel.cancel(self._job)
        self._reap()
        return self

    def _reap(self) -> None:
        """Reap the supervisor, if this process started it; it has ended."""
        if self._started is not None:
            self._started.process.wait()


def submit(
    inputs: Inputs,
    *,
    model: str | None = None,
    output: str | os.PathLike[str] | None = None,
    again: bool = False,
    log: Callable[[str], None] = _log,
    **options: Any,
) -> Job:
    """Check a job and start it in a process of its own.

    Args:
        inputs: Files, folders, globs or URLs, one or several; or rows, as dicts, a table, or a
            DataFrame of any library that speaks Arrow.
        model: Alias, folder, `.gguf` file, the URL of either in an object store, or hub id.
        output: A file or URL; default: `INPUT-completions` in this folder; for rows, one in the
            job's.
        again: Start a new job even if one with the same work can be resumed.
        log: Called with each line that a user should see.
        options: As `batchrun submit --help` names them, with underscores.

    Raises:
        OptionError: An option is unknown or has an invalid value.
        JobError: An input can't be read, the output can't be written, or a job has the same work.
        ModelError: The model can't be used.
        MachineError: This is not Linux.
    """
    need_linux()
    root = folder.home()
    with ExitStack() as stack:
        own = None
        rows, paths = _rows_or_paths(inputs)
        given = {"model": model, "output": output, "again": again or None, **options}
        command = call(paths if rows is None else len(rows), given)
        if rows is not None:
            own = stack.enter_context(_kept(root, rows))
            paths, output = [os.fspath(own)], PIPE if output is None else output
        asked = read_options({"model": model, "output": output, **options})
        told: list[str] = []

        def look(note: ReaderNote) -> tuple[JobSpec, bool, list[str]]:
            noted = note.reading
            return *modelless_spec(paths, root, asked, log=told.append, noted=noted), told

        spec, chats, said = isolated(look)  # a damaged file may crash whoever reads it
        for line in said:
            log(line)
        spec = with_model(spec, root, log, chats=chats)
        started = submission.submit(root, spec, own, again=again, command=command)
    return Job(started.job, started)


def run(inputs: Inputs, *, progress: bool | None = None, **options: Any) -> Job:
    """Submit a job, and wait until it has ended.

    Args:
        inputs: As for `submit`.
        progress: Whether to show a progress bar, as for `Job.wait`.
        options: As for `submit`.

    Raises:
        JobError: It can't be submitted, or it failed; see `submit` and `Job.wait`.
        ModelError: The model can't be used.
    """
    return submit(inputs, **options).wait(progress=progress)


def list_jobs() -> list[Job]:
    """All jobs, oldest first."""
    return [Job(job) for job in folder.list_jobs(folder.home())]


def _rows_or_paths(inputs: Any) -> tuple[pa.Table | list[Any] | None, list[str]]:
    """Rows in memory, or else file names.

    Raises:
        InputError: The inputs are neither.
    """
    table = submission.table_of(inputs)
    if table is not None:
        return table, []
    single = isinstance(inputs, str | os.PathLike)
    if isinstance(inputs, bytes | Mapping) or not (single or isinstance(inputs, Iterable)):
        kind = type(inputs).__name__
        raise InputError(
            f"the input is of type {kind}, neither files nor rows",
            "rows are a table or a list of dicts: batchrun.submit([{'prompt': 'Hello'}])",
        )
    items = [inputs] if single else list(inputs)  # once: it may be an iterator
    if any(isinstance(item, Mapping) for item in items):
        return items, []
    for item in items:
        if not isinstance(item, str | os.PathLike):
            kind = type(item).__name__
            raise InputError(f"an input is of type {kind}, neither a file nor a row (a dict)")
    return None, [os.fspath(item) for item in items]


def _kept(root: Path, rows: Any) -> Any:
    """A file for rows in memory, until the block ends or a job takes it over."""

    def write(file: BinaryIO) -> None:
        if isinstance(rows, pa.Table):
            pq.write_table(rows, file)
        else:
            file.write(submission.as_lines(rows))

    suffix = ".parquet" if isinstance(rows, pa.Table) else ".jsonl"
    return submission.kept_input(root, "the rows", write, lambda _: suffix)
