"""A job whose first rows all fail the same way ends; any other goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs import folder
from batchrun.jobs.errors import JobError
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.identity import set_limits
from batchrun.jobs.journal.results import Result
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.models.resolve import ModelRef, resolve
from batchrun.runner.failing import ENOUGH
from batchrun.runner.job_run import Outcome, run_job
from tests.tiny import write_tiny_model

Submit = Callable[..., JobFolder]
LONG = "word " * 900  # even its characters are too many for the tiny model's context
LONGER = "x " * 700  # only its tokens are, which the engine finds
MANY = 3 * ENOUGH


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    root = tmp_path_factory.mktemp("model")
    return resolve(str(write_tiny_model(root / "tiny")), root)


@pytest.fixture
def submit(tmp_path: Path, tiny: ModelRef, monkeypatch: pytest.MonkeyPatch) -> Submit:
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path))

    def make(prompts: Sequence[str | None], **changes: Any) -> JobFolder:
        path = tmp_path / f"in-{len(list(tmp_path.glob('in-*')))}.parquet"
        pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), path)
        spec = JobSpec(
            inputs=(InputFile.of(path),),
            input_format="parquet",
            prompt=PromptSpec(column="prompt"),
            model=ModelSpec("tiny", str(tiny.path), tiny.fingerprint, "float32"),
            sampling=SamplingSpec(max_tokens=2, temperature=0.0),
            output=OutputSpec(path=str(path.with_name(f"out-{path.name}")), format="parquet"),
            runtime=RuntimeSpec(max_num_seqs=8, page_size=4096),
        )
        return folder.create(tmp_path, replace(spec, **changes))

    return make


def run(job: JobFolder) -> Outcome:
    return run_job(job.path, stop=threading.Event())


def ends(job: JobFolder, *said: str) -> None:
    with pytest.raises(JobError) as ended:
        run(job)
    for text in (*said, "row ", "all failed the same way"):
        assert text in str(ended.value)
    assert f"batchrun resume {job.id} --keep-going" in str(ended.value.hint)
    assert job.state() == "failed"


@pytest.mark.parametrize(
    ("bad", "reorder"),
    [(None, True), (LONG, True), (LONGER, True), (LONGER, False)],
    ids=["null", "too long", "refused", "refused in file order"],
)
def test_a_job_whose_rows_all_fail_the_same_way_ends(
    submit: Submit, bad: str | None, reorder: bool
) -> None:
    """With the rows that had failed in the journal; and again, until it is told to go on."""
    prompts = [bad and f"{i} {bad}" for i in range(MANY)]
    job = submit(prompts, runtime=RuntimeSpec(max_num_seqs=8, page_size=4096, reorder=reorder))
    ends(job)
    kept = job.counts()
    assert kept.rows == kept.failed >= ENOUGH
    ends(job, f"the first {kept.failed} rows")
    assert job.counts() == kept
    set_limits(job.path, {"keep_going": True})
    assert run(job) is Outcome.DONE_WITH_ERRORS
    assert job.counts().failed == MANY


def test_no_more_rows_are_journaled_than_it_takes(submit: Submit) -> None:
    job = submit([None] * (ENOUGH + 1))
    ends(job, "the first 100 rows", "null_prompt", "row 0: the prompt is null")
    assert job.counts().failed == ENOUGH


@pytest.mark.parametrize(
    "prompts",
    [
        [None] * ENOUGH,  # nothing is left to do
        [None] * (ENOUGH - 1),
        [*([None, ""] * ENOUGH)],  # not the same way
        ["fine", *[None] * MANY],  # found long before that row has ended
        [*[None] * (ENOUGH - 1), "fine", *[None] * MANY],
        [None if i % 10 else "fine" for i in range(MANY)],
    ],
    ids=["all", "few", "two ways", "first is fine", "100th is fine", "every tenth is fine"],
)
def test_a_job_goes_on_that_may_have_good_rows(submit: Submit, prompts: list[str | None]) -> None:
    assert run(submit(prompts)) is Outcome.DONE_WITH_ERRORS


def test_samples_are_no_rows(submit: Submit) -> None:
    job = submit([None] * (ENOUGH - 1), n=2, sampling=SamplingSpec(max_tokens=2, temperature=1.0))
    assert run(job) is Outcome.DONE_WITH_ERRORS
    job = submit([None] * MANY, n=2, sampling=SamplingSpec(max_tokens=2, temperature=1.0))
    ends(job, "the first 100 rows")


def test_rows_of_earlier_runs_count(submit: Submit) -> None:
    """A good one, and bad ones: 60 of them, and 40 more."""
    good, bad = submit(["fine", *[None] * MANY]), submit([None] * MANY)
    error = Result(0, 0, "error", error="the prompt is null", error_kind="null_prompt")
    with good.journal(readonly=False) as journal:
        journal.begin_run()
        journal.write([Result(0, 0, "ok", "text", (1,), "stop", 1, 1)])
    with bad.journal(readonly=False) as journal:
        journal.begin_run()
        journal.write([error._replace(row=row) for row in range(60)])
    assert run(good) is Outcome.DONE_WITH_ERRORS
    assert good.retry_failed() == MANY
    assert run(good) is Outcome.DONE_WITH_ERRORS
    ends(bad, "the first 100 rows", "row 0: the prompt is null")
    assert bad.counts().failed == ENOUGH
