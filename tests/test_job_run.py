"""One job through the worker with a tiny real model: rows, parameters, resume, failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.engine.build import Assembly
from batchrun.engine.core import Completion, EngineError
from batchrun.engine.model.generation import Generation
from batchrun.errors import StepFailed
from batchrun.jobs import files, folder
from batchrun.jobs.errors import Fenced, JobError, JournalError, LeaseHeld, OutputError, SpecChanged
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.inflight import InFlightRows
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import DoneSet, Result
from batchrun.jobs.lease import Lease
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.stats import summarise
from batchrun.jobs.verify import verify
from batchrun.models.resolve import ModelRef, resolve
from batchrun.runner import writer
from batchrun.runner.engine_loop import EngineLoop
from batchrun.runner.job_run import Outcome, run_job
from batchrun.runner.live import Progress
from batchrun.runner.reader import QUEUED_REQUESTS, Reader
from batchrun.runner.writer import JournalWriter
from tests.tiny import write_tiny_model

ROWS = 30
SAMPLED = SamplingSpec(max_tokens=10, temperature=1.0)
Submit = Callable[..., JobFolder]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    root = tmp_path_factory.mktemp("model")
    return resolve(str(write_tiny_model(root / "tiny")), root)


@pytest.fixture
def submit(
    tmp_path: Path, tiny: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., JobFolder]:
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path))
    prompts = [f"row {i}: " + "word " * (i % 9) for i in range(ROWS)]

    def make(columns: dict[str, Any] | None = None, **changes: Any) -> JobFolder:
        number = len(list(tmp_path.glob("in-*")))
        path = tmp_path / f"in-{number}.parquet"
        pq.write_table(pa.table({"prompt": prompts, **(columns or {})}), path)
        spec = JobSpec(
            inputs=(InputFile.of(path),),
            input_format="parquet",
            prompt=PromptSpec(column="prompt"),
            model=ModelSpec(
                name="tiny", path=str(tiny.path), fingerprint=tiny.fingerprint, dtype="float32"
            ),
            sampling=SAMPLED,
            seed=4,
            output=OutputSpec(
                path=str(tmp_path / f"out-{number}.parquet"), format="parquet", token_ids=True
            ),
            runtime=RuntimeSpec(max_num_seqs=8, max_num_batched_tokens=64, page_size=4096),
        )
        return folder.create(tmp_path, replace(spec, **changes))

    return make


def run(job: JobFolder, **kwargs: Any) -> Outcome:
    return run_job(job.path, stop=kwargs.pop("stop", threading.Event()), **kwargs)


def output(job: JobFolder) -> pa.Table:
    return pq.read_table(job.spec().output.path)


def test_every_row_gets_its_answer_whatever_the_batching(submit: Submit) -> None:
    plain = submit()
    assert run(plain) is Outcome.DONE
    want = output(plain)
    assert want["prompt"].to_pylist()[3].startswith("row 3:")
    assert len(set(want["completion"].to_pylist())) > ROWS // 2
    for runtime in (
        RuntimeSpec(max_num_seqs=1),
        RuntimeSpec(max_num_seqs=7, max_num_batched_tokens=5, page_size=4096),
        RuntimeSpec(max_num_seqs=64, kv_budget=20 * 4096, page_size=4096, layers_per_slab=1),
    ):
        job = submit(runtime=runtime)
        assert run(job) is Outcome.DONE
        assert output(job).equals(want)
        assert job.spec().fingerprint() == plain.spec().fingerprint()


@pytest.mark.parametrize("sampling", [SAMPLED, SamplingSpec(max_tokens=10)])
def test_a_plan_changes_no_token(submit: Submit, sampling: SamplingSpec) -> None:
    """Of rows that repeat, share prefixes far apart and are of all lengths."""
    prompts = [f"{'a common beginning ' * (i % 4)}row {i % 20}" for i in range(ROWS)]
    columns = {"prompt": prompts, "max_tokens": [3 + i % 20 % 7 for i in range(ROWS)]}
    planned = submit(columns, sampling=sampling)
    runtime = replace(planned.spec().runtime, reorder=False)
    plain = submit(columns, sampling=sampling, runtime=runtime)
    assert plain.spec().fingerprint() == planned.spec().fingerprint()
    assert [run(planned), run(plain)] == [Outcome.DONE] * 2
    assert output(planned).equals(output(plain))
    same = [summarise(job)["duplicates"]["rows"] for job in (planned, plain)]
    assert same == [0 if sampling is SAMPLED else ROWS - 20, 0]


def test_a_plan_changes_no_token_of_a_real_model(submit: Submit, smollm2: ModelRef) -> None:
    prompts = [f"{'The sea is calm today. ' * (i % 3 * 2)}My name is" for i in range(9)]
    model = ModelSpec(smollm2.name, str(smollm2.path), smollm2.fingerprint, "float32")
    jobs = [
        submit(
            {"prompt": prompts},
            limit=None,
            model=model,
            sampling=SamplingSpec(max_tokens=6),
            **more,
        )
        for more in ({}, {"runtime": RuntimeSpec(reorder=False)})
    ]
    assert [run(job) for job in jobs] == [Outcome.DONE] * 2
    assert output(jobs[0]).equals(output(jobs[1]))
    assert summarise(jobs[0])["duplicates"]["rows"] == 6


@pytest.fixture
def journal_keeps_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result is on disk before the engine goes on, however slow the disk is."""
    monkeypatch.setattr(writer, "_COMMIT_SECONDS", 0.0)
    run, end_row = JournalWriter.run, EngineLoop._end_row
    writers: list[tuple[JournalWriter, int]] = []

    def noted(self: JournalWriter, *rest: Any) -> None:
        writers.append((self, self.samples))
        run(self, *rest)

    def ended(self: EngineLoop, *rest: Any) -> None:
        end_row(self, *rest)
        while not self.stopped():
            journal, before = writers[-1] if writers else (None, 0)
            if journal and journal.samples - before >= self.figures.counted["completions"]:
                return
            time.sleep(0.001)

    monkeypatch.setattr(JournalWriter, "run", noted)
    monkeypatch.setattr(EngineLoop, "_end_row", ended)


def stop_after(results: int, stop: threading.Event) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.rows_done >= results:
            stop.set()

    return watch


@pytest.mark.usefixtures("journal_keeps_up")
def test_resume_gives_the_same_output(submit: Submit) -> None:
    whole = submit()
    run(whole)
    job = submit()
    outcome, runs = Outcome.INTERRUPTED, 0
    while outcome is Outcome.INTERRUPTED:
        stop = threading.Event()
        rows = job.counts().rows
        outcome = run(job, stop=stop, on_progress=stop_after(rows + 7, stop))
        runs += 1
        assert job.state() == str(outcome)
        assert job.counts().rows > rows
    assert runs > 2
    assert output(job).equals(output(whole))
    summary = summarise(job)
    assert summary["runs"] == runs
    assert summary["rows"]["resumed"] >= 7
    assert summary["tokens"]["completion"] == summarise(whole)["tokens"]["completion"]


@pytest.mark.usefixtures("journal_keeps_up")
def test_a_resumed_run_knows_the_answers_of_earlier_ones(
    submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, stop, known = submit(), threading.Event(), list[tuple[int, ...]]()
    recall = Assembly.recall

    def noting(self: Assembly, answers: Iterable[tuple[int, ...]], constraint: None) -> None:
        assert constraint is None
        assert constraint is None
        known.extend(answers)
        recall(self, known, constraint)

    monkeypatch.setattr(Assembly, "recall", noting)
    run(job, stop=stop, on_progress=stop_after(9, stop))
    assert not known
    with job.journal() as journal:
        earlier = [result.token_ids for result in journal.results()]
    assert len(earlier) >= 9
    assert run(job) is Outcome.DONE
    assert known == earlier[::-1]


def test_columns_set_a_rows_own_parameters(submit: Submit) -> None:
    lengths = [None, *range(1, ROWS)]
    seeds = [9] * ROWS
    job = submit({"max_tokens": lengths, "seed": seeds, "temperature": [0.0] * ROWS})
    assert run(job) is Outcome.DONE
    counts = output(job)["completion_tokens"].to_pylist()
    assert counts[0] <= (SAMPLED.max_tokens or 0)
    assert all(count <= i for i, count in enumerate(counts) if i)
    assert counts[3] == 3


def test_a_bad_parameter_is_that_rows_error(submit: Submit) -> None:
    temperatures = [1.0] * ROWS
    temperatures[5] = -1.0
    job = submit({"temperature": temperatures, "top_k": [5.5] + [None] * (ROWS - 1)})
    assert run(job) is Outcome.DONE_WITH_ERRORS
    errors = output(job)["error"].to_pylist()
    assert [i for i, error in enumerate(errors) if error] == [0, 5]
    assert "top_k holds 5.5" in errors[0]
    assert "temperature must be between 0 and 5" in errors[5]


def test_samples_of_a_row_differ_and_stand_together(submit: Submit) -> None:
    job = submit(n=3)
    assert run(job) is Outcome.DONE
    table = output(job)
    assert table["sample"].to_pylist() == [0, 1, 2] * ROWS
    texts = table["completion"].to_pylist()
    assert sum(len(set(texts[i : i + 3])) == 3 for i in range(0, 3 * ROWS, 3)) > ROWS // 2
    alone = submit()
    run(alone)
    assert texts[::3] == output(alone)["completion"].to_pylist()


def test_samples_that_can_not_differ_are_told(submit: Submit) -> None:
    for sampling, told in ((SamplingSpec(max_tokens=1), True), (SAMPLED, False)):
        lines: list[str] = []
        run(submit(n=2, sampling=sampling), log=lines.append)
        assert any("will be the same" in line for line in lines) is told


@pytest.mark.usefixtures("journal_keeps_up")
def test_the_best_are_the_same_after_any_number_of_runs(submit: Submit) -> None:
    """Also of samples that were stopped in the middle: their sums go on."""
    whole = submit(n=4, keep=2)
    assert run(whole) is Outcome.DONE
    job = submit(n=4, keep=2)
    outcome, begun = Outcome.INTERRUPTED, 0
    while outcome is Outcome.INTERRUPTED:
        stop = threading.Event()
        rows = job.counts().rows
        outcome = run(job, stop=stop, on_progress=stop_after(rows + 5, stop))
        with job.journal() as journal:
            partials = journal.partials().values()
            assert all(p.logprob is not None and p.logprob < 0 for p in partials)
            begun += len(partials)
    assert begun > 0
    got, want = output(job), output(whole)
    assert got["sample"].to_pylist() == [0, 1] * ROWS
    assert got.drop(["mean_logprob"]).equals(want.drop(["mean_logprob"]))
    assert got["mean_logprob"].to_pylist() == pytest.approx(want["mean_logprob"].to_pylist())
    assert verify(job) == []


def test_figures_add_up(submit: Submit) -> None:
    job = submit()
    run(job)
    summary = json.loads((job.path / "stats.json").read_text())
    tokens, kv = summary["tokens"], summary["kv"]
    assert summary["rows"] == {
        "total": ROWS,
        "done": ROWS,
        "failed": 0,
        "remaining": 0,
        "resumed": 0,
        "failed_by_reason": {},
    }
    assert tokens["prefilled"] == tokens["prompt"]
    # The first token of a completion comes out of its prefill, the last is never computed.
    assert tokens["decoded"] == tokens["completion"] - ROWS
    assert sum(summary["finish_reasons"].values()) == ROWS
    assert 0 < kv["peak"]["live"] <= kv["peak"]["mapped"] <= kv["peak"]["reserved"]
    assert kv["time_averaged"]["live"] <= kv["time_averaged"]["mapped"]
    assert 0 < summary["batch"]["mean_occupancy"] <= summary["batch"]["max_num_seqs"] == 8
    assert summary["weights_bytes"] < summary["peak_rss"]
    assert summary["row_seconds"]["decode"]["p50"] <= summary["row_seconds"]["decode"]["max"]
    with job.journal() as journal:
        samples = journal.samples(1)
    assert samples
    for sample in samples:
        assert 0 <= sample["wall_s"] <= summary["time"]["wall_s"]
        assert 0 <= sample["running"] <= 8
        assert sample["kv_live"] <= sample["kv_mapped"] <= kv["peak"]["mapped"]
        assert sample["rss"] > 0
        assert sample["generated_tokens"] <= tokens["completion"]


def test_one_worker_at_a_time(submit: Submit) -> None:
    job = submit()
    with Lease(job.path), pytest.raises(LeaseHeld):
        run(job)
    assert job.state() == "new"


def test_changed_input_and_changed_model_are_refused(submit: Submit, tmp_path: Path) -> None:
    job = submit()
    path = Path(job.spec().inputs[0].path)
    pq.write_table(pa.table({"prompt": ["other"]}), path)
    with pytest.raises(SpecChanged, match=path.name):
        run(job)
    spec = submit().spec()
    changed = folder.create(tmp_path, replace(spec, model=replace(spec.model, fingerprint="0")))
    with pytest.raises(SpecChanged, match="model"):
        run(changed)
    gone = folder.create(tmp_path, replace(spec, model=replace(spec.model, path="/nowhere")))
    with pytest.raises(JobError, match="/nowhere"):
        run(gone)


@pytest.mark.usefixtures("journal_keeps_up")
@pytest.mark.parametrize("thread", ["reader", "journal", "engine"])
def test_a_failure_in_any_thread_ends_the_run(
    submit: Submit, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    job = submit()
    calls = 0

    def fail_at(count: int, error: Exception, real: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= count:
                raise error
            return real(*args, **kwargs)

        return failing

    with monkeypatch.context() as patch:
        if thread == "reader":
            error: Exception = JobError("the disk with the input went away")
            patch.setattr(Reader, "_requests_of", fail_at(9, error, Reader._requests_of))
        elif thread == "journal":
            error = JournalError("the disk is full")
            patch.setattr(Journal, "write", fail_at(3, error, Journal.write))
        else:
            error = EngineError("the device is gone")
            from batchrun.engine.executor import TorchExecutor  # noqa: PLC0415

            patch.setattr(TorchExecutor, "launch", fail_at(12, error, TorchExecutor.launch))
        with pytest.raises(type(error), match=str(error)):
            run(job)
    assert job.state() == "failed"
    assert not {"journal", "reader"} & {t.name for t in threading.enumerate()}
    before = job.counts().rows
    assert before < ROWS
    assert run(job) is Outcome.DONE
    assert output(job).num_rows == ROWS


class _SlowEngine:
    """Ends one row a step, and remembers the most that ever waited in it."""

    def __init__(self) -> None:
        self.queue: list[Any] = []
        self.most = 0

    @property
    def has_work(self) -> bool:
        return bool(self.queue)

    def load(self) -> tuple[int, int, int]:
        return 0, len(self.queue), 0

    def progress(self) -> list[tuple[int, int]]:
        return []

    def add(self, request: Any) -> None:
        self.queue.append(request)
        self.most = max(self.most, len(self.queue))

    def step(self) -> list[Completion]:
        return [Completion(self.queue.pop(0), text="text")]

    def partials(self) -> list[Any]:  # asked for where the run ends first, or takes long
        return []


class _SlowWorkbench:
    def __init__(self) -> None:
        self.engine = _SlowEngine()
        self.generation = Generation()
        self.max_num_seqs, self.max_num_batched_tokens = 4, 64

    def encode(self, fields: Any) -> tuple[int, ...]:
        return (1,)

    def recall(self, answers: Any, constraint: Any) -> None:
        pass

    def measurements(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def test_a_slow_engine_does_not_come_to_hold_the_whole_file(submit: Submit, tmp_path: Path) -> None:
    path = tmp_path / "long.parquet"
    pq.write_table(pa.table({"prompt": ["x"] * 5000}), path)
    job = submit(inputs=(InputFile.of(path),))
    workbench = _SlowWorkbench()
    assert run(job, open_workbench=lambda *_: workbench) is Outcome.DONE
    assert 1 < workbench.engine.most <= QUEUED_REQUESTS
    assert output(job)["completion"].to_pylist() == ["text"] * 5000


class _Panic(BaseException):
    """What a tokenizer in Rust raises at its worst is no `Exception`."""


def test_whatever_a_tokenizer_raises_is_an_error_of_its_row(submit: Submit) -> None:
    raised = [
        _Panic("inside"),
        RecursionError(),
        OverflowError("too big\nmore"),
        KeyError("\ud800"),
    ]
    left = iter(raised)
    prompts = [f"bad {i}" if i in {3, 7, 11, 15} else f"row {i}" for i in range(ROWS)]

    class Bench(_SlowWorkbench):
        def encode(self, fields: Any) -> tuple[int, ...]:
            if fields["prompt"].startswith("bad"):
                raise next(left)
            return (1,)

    job, lines = submit({"prompt": prompts}, runtime=RuntimeSpec(reorder=False)), list[str]()
    outcome = run(job, open_workbench=lambda *_: Bench(), log=lines.append)
    assert outcome is Outcome.DONE_WITH_ERRORS
    errors = {i: e for i, e in enumerate(output(job)["error"].to_pylist()) if e}
    made = "no prompt can be built from the row: "
    assert errors == {
        3: f"{made}_Panic: inside",
        7: f"{made}RecursionError",
        11: f"{made}OverflowError: too big",
        15: f"{made}KeyError: '\\ud800'",
    }
    assert len([line for line in lines if "no prompt can be built" in line]) == 1
    assert summarise(job)["rows"]["failed_by_reason"] == {"internal": 4}


def test_an_engine_that_fails_makes_suspects_of_its_rows(submit: Submit) -> None:
    class Engine(_SlowEngine):
        def step(self) -> list[Completion]:
            self.on_admit(self.queue[0])
            raise ZeroDivisionError("by row")

    bench = _SlowWorkbench()
    bench.engine = Engine()
    job = submit(runtime=RuntimeSpec(reorder=False))
    with pytest.raises(StepFailed, match="a step of the engine failed: ZeroDivisionError"):
        run(job, open_workbench=lambda *_: bench)
    suspects = InFlightRows(job.path)
    assert suspects.rows() == [0]
    suspects.close()


@pytest.mark.parametrize("rows", [4, 5, 6, 9])
@pytest.mark.parametrize("reorder", [True, False])
def test_an_input_that_has_other_rows_than_were_counted(
    submit: Submit, tmp_path: Path, rows: int, reorder: bool
) -> None:
    """It was rewritten, in as many bytes, while the model was loaded."""

    def written(count: int) -> list[str]:
        lines = [json.dumps({"prompt": f"{count} {i}"}) for i in range(count)]
        text = "".join(f"{line}\n" for line in lines)
        path.write_text(text + "\n" * (1000 - len(text)))
        return [f"{count} {i}" for i in range(count)]

    path = tmp_path / "in.jsonl"
    written(6)
    out = OutputSpec(str(tmp_path / "out.jsonl"), "jsonl")
    job = submit(
        inputs=(InputFile.of(path),),
        input_format="jsonl",
        output=out,
        runtime=RuntimeSpec(reorder=reorder),
    )
    prompts: list[str] = []

    def opened(*_: Any) -> _SlowWorkbench:
        prompts.extend(written(rows))
        return _SlowWorkbench()

    if rows < 6:
        with pytest.raises(SpecChanged, match="the input ended before its 6 rows were read"):
            run(job, open_workbench=opened)
        assert (job.state(), job.counts().rows) == ("failed", rows)
        assert not (tmp_path / "out.jsonl").exists()
    else:
        assert run(job, open_workbench=opened) is Outcome.DONE
        found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in found] == prompts[:6]
    with job.journal() as journal:
        assert [result.row for result in journal.results()] == list(range(min(6, rows)))
        assert list(journal.digests(0, 99)) == list(range(min(6, rows)))


def test_what_an_older_version_has_computed_is_known_once_the_job_goes_on(
    submit: Submit, tmp_path: Path
) -> None:
    """Also of the rows behind the last one that is still to do."""
    job = submit()
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.write([Result(row, 0, "ok", "text") for row in range(ROWS) if row != 7])
        assert journal.digests(0, ROWS) == {}
    assert run(job, open_workbench=lambda *_: _SlowWorkbench()) is Outcome.DONE
    with job.journal() as journal:
        assert list(journal.digests(0, 2 * ROWS)) == list(range(ROWS))
    assert verify(job) == []


def test_a_row_that_is_not_what_an_earlier_run_read_ends_the_next_one(submit: Submit) -> None:
    """Where the files' own fingerprint does not tell, as it may not in a large one."""
    job = submit()
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.write([], digests=[(3, 12345)])
    with pytest.raises(SpecChanged, match="row 3 of the input is not the row that the job read"):
        run(job, open_workbench=lambda *_: _SlowWorkbench())


def test_a_finished_job_only_exports_again(submit: Submit) -> None:
    job = submit()
    run(job)
    path = Path(job.spec().output.path)
    want = path.read_bytes()
    path.unlink()

    def no_engine(*_: Any) -> Any:
        raise AssertionError("the model was loaded for nothing")

    assert run(job, open_workbench=no_engine) is Outcome.DONE
    assert path.read_bytes() == want


def have_free(
    monkeypatch: pytest.MonkeyPatch, free: Callable[[], int], size: int = 1 << 50
) -> None:
    """Disks have so many bytes left."""
    monkeypatch.setattr(writer, "disk_of", lambda path: files.Disk(path, 0, size, free()))
    monkeypatch.setattr(OUTPUTS, "disk", writer.disk_of)


@pytest.mark.usefixtures("journal_keeps_up")
def test_a_run_ends_before_the_disk_is_full(
    submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_ROOM_SECONDS", 0.0)
    job = submit()
    free = iter([1 << 40] * 12)  # and then none
    have_free(monkeypatch, lambda: next(free, 0))
    with pytest.raises(OutputError, match=r"0\.0 MiB left") as full:
        run(job)
    assert "batchrun resume" in str(full.value.hint)
    assert (job.state(), job.failure()) == ("failed", (str(full.value), None))
    assert 0 < job.counts().rows < ROWS
    have_free(monkeypatch, lambda: 1 << 40)
    assert run(job) is Outcome.DONE


def test_a_job_that_cannot_fit_is_not_begun(
    submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit()
    have_free(monkeypatch, lambda: 0)
    with pytest.raises(OutputError, match="MiB are needed"):
        run(job, open_workbench=lambda *_: pytest.fail("a model was loaded"))


def test_a_disk_that_will_be_full_is_told_of_early(
    submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(writer, "_ROOM_SECONDS", 0.0)
    monkeypatch.setattr(writer, "COMMIT_RESULTS", 4)
    free = iter([1 << 40] * 2)  # and then next to nothing
    have_free(monkeypatch, lambda: next(free, 1), size=0)
    lines: list[str] = []
    assert run(submit(), log=lines.append) is Outcome.DONE
    assert (
        sum("it will stop before the disk is full and can be resumed" in line for line in lines)
        == 1
    )


def test_rows_without_a_prompt_can_be_left_out(submit: Submit) -> None:
    prompts = [None if i % 3 == 0 else "" if i % 3 == 1 else f"row {i}" for i in range(ROWS)]
    strict = submit({"prompt": prompts})
    assert run(strict) is Outcome.DONE_WITH_ERRORS
    assert strict.counts().failed == 2 * ROWS // 3
    job = submit({"prompt": prompts}, prompt=replace(strict.spec().prompt, skip_empty=True))
    assert run(job) is Outcome.DONE
    assert (job.counts().failed, job.counts().skipped) == (0, 2 * ROWS // 3)
    answered = [text is not None for text in output(job)["completion"].to_pylist()]
    assert answered == [i % 3 == 2 for i in range(ROWS)]
    assert output(job)["error"].null_count == ROWS
    assert job.spec().fingerprint() != strict.spec().fingerprint()


def test_an_earlier_run_adds_nothing_to_what_a_run_has_read(
    submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a lock was lost, it may still write as the next run looks at what there is."""
    job, done = submit(), Journal.done
    refused: list[Fenced] = []
    with Journal(job.path, 1) as earlier:
        earlier.begin_run()

        def late(journal: Journal) -> DoneSet:
            found = done(journal)
            with pytest.raises(Fenced) as caught:
                earlier.write([Result(0, 0, "ok", "late")])
            refused.append(caught.value)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "done", late)
            assert run(job) is Outcome.DONE
    assert len(refused) == 1
    assert [row["completion"] for row in output(job).to_pylist()].count("late") == 0
