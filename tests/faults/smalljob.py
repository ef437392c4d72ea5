"""A job of a few rows over an engine that computes nothing: real in all but the model.

What it answers follows from row, sample and position alone, as with the real engine, so that any
run, however often it was broken off, has one right output. A ledger in shared memory, which
outlives the process, notes each answer acknowledged and each token generated.
"""

from __future__ import annotations

import gc
import mmap
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.cli.errors import describe
from batchrun.engine.core import Completion, Request, Sequence
from batchrun.engine.model.generation import Generation
from batchrun.jobs import folder
from batchrun.jobs.errors import LeaseHeld
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.verify import verify
from batchrun.prompts.messages import PromptError
from batchrun.runner import job_run, writer
from batchrun.runner.job_run import Outcome

MAX_TOKENS = 6
DONE, ENDED_WITH_ERROR, BUG, INTERRUPTED, REFUSED = 0, 3, 4, 5, 6  # exit codes of a worker


class Ledger:
    """One byte for each row's acknowledgement, and one for each token, counting how often."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._bytes = mmap.mmap(-1, 2 + rows + rows * MAX_TOKENS)  # shared with forked processes

    def clear(self) -> None:
        self._bytes[:] = bytes(len(self._bytes))

    def close(self) -> None:
        self._bytes.close()

    @property
    def submitted(self) -> bool:
        return bool(self._bytes[0])

    def submit(self) -> None:
        self._bytes[0] = 1

    @property
    def finished(self) -> bool:
        return bool(self._bytes[1])

    def finish(self) -> None:
        self._bytes[1] = 1

    def acknowledge(self, row: int) -> None:
        self._bytes[2 + row] = 1

    def acknowledged(self) -> set[int]:
        return {row for row in range(self._rows) if self._bytes[2 + row]}

    def generate(self, row: int, position: int) -> None:
        self._bytes[2 + self._rows + row * MAX_TOKENS + position] += 1

    def generated(self) -> bytes:
        """How often each row's each token was generated, `MAX_TOKENS` bytes a row."""
        return self._bytes[2 + self._rows :]


def token(row: int, sample: int, position: int) -> int:
    return (row * 7919 + sample * 104729 + position * 31) % 50021


def length(row: int) -> int:
    return 1 + row * 5 % MAX_TOKENS


@dataclass
class NullEngine:
    """One token a step for at most `slots` requests.

    `before_step` is called with the number of rows that ended so far: it may wait.
    """

    ledger: Ledger
    slots: int = 3
    before_step: Callable[[int], None] = lambda _: None

    def __post_init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._tokens = self._ended = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def load(self) -> tuple[int, int, int]:
        waiting = max(0, len(self._sequences) - self.slots)
        return len(self._sequences) - waiting, waiting, self._tokens

    def progress(self) -> list[tuple[int, int]]:
        return []

    def add(self, request: Request) -> None:
        assert request.row not in self.ledger.acknowledged(), "an answered row is computed again"
        self._sequences.append(Sequence(request, list(request.generated_ids)))

    def partials(self) -> list[Request]:
        begun = [s for s in self._sequences if s.output_ids]
        return [replace(s.request, generated_ids=tuple(s.output_ids)) for s in begun]

    def step(self) -> list[Completion]:
        self.before_step(self._ended)
        for sequence in self._sequences[: self.slots]:
            request, position = sequence.request, len(sequence.output_ids)
            if position < length(request.row):
                self.ledger.generate(request.row, position)
                sequence.output_ids.append(token(request.row, request.sample, position))
                self._tokens += 1
        ended = [s for s in self._sequences if len(s.output_ids) >= length(s.request.row)]
        for sequence in ended:
            self._sequences.remove(sequence)
        self._ended += len(ended)
        return [
            Completion(s.request, tuple(s.output_ids), " ".join(map(str, s.output_ids)))
            for s in ended
        ]


class NullWorkbench:
    """What surrounds the engine; a prompt is as many tokens as it has letters."""

    def __init__(self, engine: NullEngine) -> None:
        self.engine = engine
        self.generation = Generation()
        self.max_num_seqs, self.max_num_batched_tokens = 4, 64

    def encode(self, fields: Mapping[str, Any]) -> tuple[int, ...]:
        if fields["prompt"] is None:
            raise PromptError("no_prompt", "the row has no prompt")
        return tuple(map(ord, fields["prompt"]))

    def recall(self, answers: Any, constraint: Any) -> None:
        pass

    def measurements(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class SmallJob:
    """Where a case works: `root` holds the input, `home` the job's folder and the output.

    Everything under `home` is what faults strike.
    """

    root: Path
    rows: int
    format: str = "parquet"

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.parquet"

    @property
    def output(self) -> Path:
        return self.home / f"out.{self.format}"

    def write_input(self) -> None:
        """The last prompt is null: a row that ends as an error."""
        self.home.mkdir(parents=True)
        prompts = [f"prompt {i}" for i in range(self.rows - 1)]
        table = pa.table({"id": list(range(self.rows)), "prompt": [*prompts, None]})
        pq.write_table(table, self.prompts)

    def spec(self) -> JobSpec:
        return JobSpec(
            inputs=(InputFile.of(self.prompts),),
            input_format="parquet",
            prompt=PromptSpec(column="prompt"),
            model=ModelSpec(name="null", path=str(self.root), fingerprint="", dtype="float32"),
            sampling=SamplingSpec(max_tokens=MAX_TOKENS),
            output=OutputSpec(path=str(self.output), format=self.format, token_ids=True),
        )

    def jobs(self) -> list[JobFolder]:
        return folder.list_jobs(self.home)

    def submit_and_run(
        self,
        ledger: Ledger,
        *,
        on_submitted: Callable[[], None] = lambda: None,
        on_acknowledged: Callable[[list[int]], None] = lambda _: None,
        before_step: Callable[[int], None] = lambda _: None,
        slots: int = 3,
        stop: threading.Event | None = None,
    ) -> Outcome:
        """Submit the job, unless it is there, and run it: two results at most in a transaction.

        Raises:
            Exception: Whatever the run does.
        """
        jobs = self.jobs()
        if jobs:  # perhaps one whose submission failed at its last sync: nobody was told of it
            job = jobs[0]
        else:
            job = folder.create(self.home, self.spec())
            ledger.submit()
            on_submitted()
        write = Journal.write

        def noting(journal: Journal, results: list[Result], *rest: Any, **more: Any) -> None:
            write(journal, results, *rest, **more)
            for result in results:
                ledger.acknowledge(result.row)
            on_acknowledged([result.row for result in results])

        assert hasattr(writer, "COMMIT_RESULTS")
        writer.COMMIT_RESULTS = 2
        Journal.write = noting  # type: ignore[method-assign]
        try:
            engine = NullEngine(ledger, slots, before_step)
            outcome = job_run.run_job(
                job.path,
                stop=stop or threading.Event(),
                open_workbench=lambda spec, log: NullWorkbench(engine),
            )
        finally:
            Journal.write = write  # type: ignore[method-assign]
        if outcome in (Outcome.DONE, Outcome.DONE_WITH_ERRORS):
            ledger.finish()
        return outcome

    def check_output(self, path: Path | None = None) -> None:
        """Every row is there once, in order, with its own answer."""
        table = pq.read_table(path or self.output, use_threads=False)
        last = self.rows - 1
        assert table["id"].to_pylist() == list(range(self.rows))
        ids = [[token(r, 0, p) for p in range(length(r))] for r in range(last)] + [[]]
        assert table["completion_token_ids"].to_pylist() == ids
        texts = [" ".join(map(str, row)) for row in ids[:-1]]
        assert table["completion"].to_pylist() == [*texts, None]
        assert table["error"].to_pylist() == [None] * last + ["the row has no prompt"]

    def check_journal(self, job: JobFolder, acknowledged: set[int]) -> set[int]:
        """The journal opens, is whole, and has each acknowledged row with its own answer.

        The product's own `verify` agrees.

        Returns:
            The rows that have a result.
        """
        with job.journal(readonly=False) as journal:
            journal.check()
            results = list(journal.results())
        rows = [result.row for result in results]
        assert len(rows) == len(set(rows))
        lost = acknowledged - set(rows)
        assert not lost, f"rows {sorted(lost)} were acknowledged and are lost"
        for result in results:
            if result.row == self.rows - 1:
                assert result.status == "error"
            else:
                want = tuple(token(result.row, 0, p) for p in range(length(result.row)))
                assert result.token_ids == want, f"row {result.row} has another's answer"
        problems = verify(job)
        assert not problems, "; ".join(problems)
        return set(rows)


def forked(work: Callable[[], int], before: Callable[[int], None] = lambda pid: None) -> int:
    """Run `work` in a forked process; its exit code, or minus the signal that ended it.

    Args:
        work: Returns the exit code.
        before: Called in the parent with the process's id while it runs.
    """
    pid = os.fork()
    if pid == 0:
        status = BUG
        try:
            gc.freeze()  # what is there stays shared with the parent
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        before(pid)
    finally:
        _, code = os.waitpid(pid, 0)
    return -os.WTERMSIG(code) if os.WIFSIGNALED(code) else os.WEXITSTATUS(code)


def outcome_of(run: Callable[[], Outcome]) -> int:
    """The exit code that says how a run ended; what it raised goes to stderr where it is a bug."""
    try:
        outcome = run()
    except LeaseHeld:
        return REFUSED
    except Exception as error:
        if describe(error) is None:
            with suppress(OSError):
                traceback.print_exc()
            return BUG
        return ENDED_WITH_ERROR
    return INTERRUPTED if outcome is Outcome.INTERRUPTED else DONE
