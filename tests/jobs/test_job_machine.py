"""Any history of a job leaves every row in exactly the state that a model of it says.

The model knows of each sample its result, or its tokens so far, or neither; of each run how it
ended; and what the state of the job must be. The job layer is the real one, on real files; only
the worker is played here, with its lease, its journal and the rows that it has in the engine.
"""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from batchrun.jobs.errors import Fenced, LeaseHeld
from batchrun.jobs.folder import JobFolder, create, list_jobs
from batchrun.jobs.inflight import InFlightRows
from batchrun.jobs.journal.journal import READ
from batchrun.jobs.journal.results import Partial, Result
from batchrun.jobs.lease import Lease
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.same import find_same
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.verify import verify

ROWS = 8
running = precondition(lambda self: self.worker is not None)
resting = precondition(lambda self: self.worker is None)


class Worker:
    """A run: what a worker holds while it lives."""

    def __init__(self, job):
        self.stack = ExitStack()
        self.lease = self.stack.enter_context(Lease(job.path))
        self.journal = self.stack.enter_context(job.journal(readonly=False))
        self.run = self.journal.begin_run()
        self.journal.set_meta("rows_total", ROWS)
        self.journal.set_meta(READ, ["prompt"])
        self.engine = InFlightRows(job.path)
        self.stack.callback(self.engine.close)
        self.engine.clear()
        job.set_state("running")


class JobMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="job-"))
        self.worker = None
        self.stalled = []
        self.job = None

    @initialize(n=st.sampled_from([1, 3]))
    def submit(self, n):
        path = self.root / "in.parquet"
        pq.write_table(pa.table({"prompt": [f"{row}" for row in range(ROWS)]}), path)
        output = OutputSpec(str(self.root / "out.jsonl"), "jsonl")
        spec = JobSpec(
            (InputFile.of(path),),
            "parquet",
            PromptSpec(),
            ModelSpec("m"),
            SamplingSpec(),
            n=n,
            output=output,
        )
        self.n, self.home = n, self.root / "0"
        self.job = create(self.home, spec)
        self.results, self.partials, self.crashes = {}, {}, {}
        self.rows = {row.index: row.digest for row in open_source([path], "parquet").rows()}
        self.read = set()  # rows whose digests are journalled
        self.states = []  # of the runs
        self.state = "new"

    def todo(self):
        every = ((row, sample) for row in range(ROWS) for sample in range(self.n))
        return [key for key in every if key not in self.results]

    # --- a worker's life -------------------------------------------------------------------------

    @resting
    @rule()
    def start(self):
        self.worker = Worker(self.job)
        self.states.append(None)
        assert self.worker.run == len(self.states)
        assert self.worker.journal.partials() == self.partials
        done = self.worker.journal.done()
        assert [key for key in self.todo() if key in done] == []

    @running
    @rule(data=st.data(), attempt=st.integers(0, 9))
    def work(self, data, attempt):
        """Some samples get a result, others some tokens, in one commit."""
        todo = self.todo()
        chosen = data.draw(st.lists(st.sampled_from(todo), unique=True)) if todo else []
        half = len(chosen) // 2
        new = [self.answer(key, attempt) for key in chosen[:half]]
        tokens = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple))
        none = Partial(0, 0, (), 0.0)
        before = [self.partials.get(key, none) for key in chosen[half:]]
        partials = [
            Partial(*key, (*b.token_ids, *tokens), b.logprob - 0.1 * len(tokens))
            for key, b in zip(chosen[half:], before, strict=True)
        ]
        if self.results:  # tokens that were under way when their sample ended come too late
            partials.append(Partial(*data.draw(st.sampled_from(sorted(self.results))), tokens))
        self.worker.journal.write(new, {"steps": attempt}, partials, self.digests(new))
        for result in new:
            self.results[result.row, result.sample] = result
            self.partials.pop((result.row, result.sample), None)
        late = set(self.results)
        self.partials |= {(p.row, p.sample): p for p in partials if (p.row, p.sample) not in late}

    def work_all_off(self, attempt):
        new = [self.answer(key, attempt) for key in self.todo()]
        self.worker.journal.write(new, digests=self.digests(new))
        self.results |= {(result.row, result.sample): result for result in new}
        self.partials = {}

    def digests(self, results, ahead=()):
        """Of rows as they come in with their results, and of others ahead of these."""
        rows = {result.row for result in results} | set(ahead)
        self.read |= rows
        return [(row, self.rows[row]) for row in sorted(rows)]

    @running
    @rule(ahead=st.sets(st.integers(0, ROWS - 1)))
    def read_ahead(self, ahead):
        self.worker.journal.write([], digests=self.digests([], ahead))

    def answer(self, key, attempt):
        row, sample = key
        if row == 0:
            return Result(row, sample, "skipped")
        if row % 3 == 0 and attempt < 5:
            return Result(row, sample, "error", error=f"{attempt}", error_kind="x")
        return Result(row, sample, "ok", f"{row}.{sample}.{attempt}", (attempt,), "stop", 1, 1)

    @running
    @rule(
        how=st.sampled_from(["done", "interrupted", "failed", "cancelled"]),
        attempt=st.integers(0, 9),
    )
    def end(self, how, attempt):
        """The run ends by itself: finished if nothing is left, else stopped, given up or failed."""
        cancel = how == "cancelled"
        if how == "done":
            self.work_all_off(attempt)
        if cancel:
            self.job.request_cancel()
        journal, reason = self.worker.journal, None
        if not self.todo():
            failed = any(result.status == "error" for result in self.results.values())
            how = "done-with-errors" if failed else "done"
            self.export(journal)
        elif self.job.cancel_requested():
            how = "cancelled"
        elif how == "failed":
            reason = "the device is gone"
        assert self.job.cancel_requested() == cancel
        journal.end_run(how, {}, reason)
        journal.close()
        self.job.set_state(how, reason)
        assert self.job.state() == "running"
        self.worker.stack.close()
        self.worker, self.state, self.states[-1] = None, how, how
        assert self.job.failure() == ((reason, None) if reason else None)

    def export(self, journal):
        spec = self.job.spec()
        export_job(spec, journal, Path(spec.output.path), format="jsonl")

    # --- what happens to it ----------------------------------------------------------------------

    @running
    @rule(data=st.data())
    def crash(self, data):
        """The process dies by a signal: the files as they are at this instant, no goodbye."""
        rows = data.draw(st.lists(st.integers(0, ROWS - 1), max_size=3))
        for row in rows:
            self.worker.engine.add(row)
        self.home = self.root / str(len(list(self.root.iterdir())))
        shutil.copytree(self.job.path.parent, self.home / "jobs")
        self.worker.stack.close()
        self.worker, self.stalled = None, []
        [self.job] = list_jobs(self.home)
        self.state = "interrupted"
        engine = InFlightRows(self.job.path)
        assert engine.rows() == sorted(set(rows))
        with self.job.journal(readonly=False) as journal:
            journal.count_crash(engine.rows())
        engine.close()
        for row in set(rows):
            self.crashes.setdefault(row, set()).add(len(self.states))

    @running
    @rule()
    def stall(self):
        """The worker stops for long, its lock gets lost, and it knows nothing of that."""
        self.stalled.append(self.worker)
        self.worker.lease.__exit__(None, None, None)
        self.worker, self.state = None, "interrupted"

    @precondition(lambda self: self.stalled and self.stalled[-1].run < len(self.states))
    @rule(data=st.data())
    def wake(self, data):
        """Then another has the job already."""
        worker = data.draw(st.sampled_from(self.stalled))
        if worker.run == len(self.states):
            return
        row = data.draw(st.integers(0, ROWS - 1))
        for write in (
            lambda: worker.journal.write([Result(row, 0, "ok", "stale")]),
            lambda: worker.journal.write([], None, [Partial(row, 0, (1,))]),
            lambda: worker.journal.write([], digests=[(row, 0)]),
            lambda: worker.journal.end_run("done", {}),
            worker.journal.retry_failed,
        ):
            with pytest.raises(Fenced):
                write()

    @resting
    @rule()
    def retry(self):
        failed = [key for key, result in self.results.items() if result.status == "error"]
        assert self.job.retry_failed() == len(failed)
        for key in failed:
            del self.results[key]
            self.crashes.pop(key[0], None)
        if failed and self.state.startswith("done"):
            self.states[-1] = "interrupted"
        if self.states:  # a failure before any run, and only that, is nothing the journal knows of
            self.state = self.states[-1] or "interrupted"

    @running
    @rule()
    def others_leave(self):
        for attempt in (self.job.retry_failed, self.job.remove, lambda: Worker(self.job)):
            with pytest.raises(LeaseHeld):
                attempt()

    # --- what must be true at any time -----------------------------------------------------------

    @invariant()
    def agrees(self):
        if self.job is None:
            return
        with self.job.journal() as journal:
            assert list(journal.results()) == [self.results[key] for key in sorted(self.results)]
            assert journal.partials() == self.partials
            assert journal.digests(0, ROWS) == {row: self.rows[row] for row in self.read}
            assert {row for row, _ in self.results} <= self.read
            counted = {row: len(runs) for row, runs in self.crashes.items()}
            assert journal.crash_counts() == counted
            assert [run["state"] for run in journal.runs()] == self.states
            counts = journal.counts()
        statuses = {key[0]: result.status for key, result in self.results.items()}
        whole = [r for r in range(ROWS) if all((r, s) in self.results for s in range(self.n))]
        failed = {key[0] for key, result in self.results.items() if result.status == "error"}
        assert (counts.rows, counts.failed) == (len(whole), len(failed))
        assert counts.skipped == (0 in statuses)
        state = "running" if self.worker is not None else self.state
        assert self.job.state() == state
        snapshot = self.job.snapshot()
        assert (snapshot.state, snapshot.done, snapshot.failed) == (state, len(whole), len(failed))
        same = find_same(self.home, self.job.spec())
        assert (same is None) == (state in ("done", "cancelled"))

    @resting
    @rule()
    def verifies(self):
        assert verify(self.job) == []

    @precondition(lambda self: self.worker is None and self.state == "done")
    @rule()
    def remove(self):
        """Then the work may be submitted again, and nothing is left of the first time."""
        spec = self.job.spec()
        for worker in self.stalled:
            worker.stack.close()
        self.stalled = []
        self.job.remove()
        assert list_jobs(self.home) == []
        self.job = create(self.home, spec)
        self.results, self.partials, self.crashes, self.states = {}, {}, {}, []
        self.read = set()
        self.state = "new"

    def teardown(self):
        for worker in [*self.stalled, *([self.worker] if self.worker else [])]:
            worker.stack.close()
        if self.job is not None:
            with JobFolder(self.job.path).journal() as journal:
                journal.check()
        shutil.rmtree(self.root)


def test_every_row_is_where_the_model_says_after_any_history():
    run_state_machine_as_test(
        JobMachine, settings=settings(max_examples=20, stateful_step_count=30, deadline=None)
    )
