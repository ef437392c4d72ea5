"""Answers that don't depend on the batch: asked for, noted with the job, and computed again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from batchrun.engine import invariance
from batchrun.engine.core import EngineError, Request
from batchrun.engine.cpu import library
from batchrun.engine.engine import Engine
from batchrun.jobs import folder
from batchrun.jobs.errors import InputError, JobError, SpecChanged
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.journal.results import Result
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.stats import summarise
from batchrun.models.resolve import ModelRef, resolve
from batchrun.runner.job_run import Outcome, run_job
from batchrun.runner.live import Progress
from batchrun.runner.overdue import PromptLimit
from batchrun.runner.recompute import Recomputed, chosen, difference, recompute
from tests.jobs.test_verify import edit
from tests.tiny import write_tiny_model

ROWS = 8
BAD = 5  # a row without a prompt
SAMPLED = SamplingSpec(max_tokens=6, temperature=1.0)
GREEDY = SamplingSpec(max_tokens=8)
Submit = Callable[..., JobFolder]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    root = tmp_path_factory.mktemp("model")
    return resolve(str(write_tiny_model(root / "tiny")), root)


@pytest.fixture
def submit(tmp_path: Path, tiny: ModelRef, monkeypatch: pytest.MonkeyPatch) -> Submit:
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path))

    def make(columns: dict[str, Any] | None = None, **changes: Any) -> JobFolder:
        prompts: list[str | None] = [f"row {i % 6}: " + "word " * (i % 3) for i in range(ROWS)]
        prompts[BAD] = None
        path = tmp_path / f"in-{len(list(tmp_path.glob('in-*')))}.parquet"
        pq.write_table(pa.table({"prompt": prompts, **(columns or {})}), path)
        spec = JobSpec(
            inputs=(InputFile.of(path),),
            input_format="parquet",
            prompt=PromptSpec(column="prompt"),
            model=ModelSpec("tiny", str(tiny.path), tiny.fingerprint, dtype="float32"),
            sampling=SAMPLED,
            seed=4,
            output=OutputSpec(path=str(path.with_name(f"out-{path.name}")), format="parquet"),
            runtime=RuntimeSpec(device="cpu", max_num_seqs=8, page_size=4096),
        )
        return folder.create(tmp_path, replace(spec, **changes))

    return make


def run(job: JobFolder, tokens: float = float("inf")) -> Outcome:
    """A run that is stopped after so many tokens."""
    stop = threading.Event()

    def watch(progress: Progress) -> None:
        if progress.completion_tokens >= tokens:
            stop.set()

    return run_job(job.path, stop=stop, on_progress=watch)


def again(job: JobFolder, most: int = 100, **told: Any) -> Recomputed:
    with PromptLimit() as limit:
        return recompute(job, most, 3, limit, **told)


@pytest.fixture
def computes(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], None]:
    """Sets how this machine computes, and why its answers may vary."""

    def set_(arithmetic: str, varies: str | None) -> None:
        monkeypatch.setattr(invariance, "arithmetic", lambda _: arithmetic)
        monkeypatch.setattr(invariance, "varies", lambda *_: varies)

    return set_


def test_a_promise_that_can_not_be_kept_is_refused_at_the_start(
    submit: Submit, computes: Callable[..., None]
) -> None:
    computes("float32 torch", "the moon is full")
    job = submit(runtime=RuntimeSpec(device="cpu", deterministic=True))
    with pytest.raises(EngineError, match="--deterministic can't be guaranteed: the moon is full"):
        run(job)
    assert job.state() == "failed"
    assert summarise(job)["deterministic"] is None
    assert job.counts().rows == 0


def test_a_job_says_whether_its_answers_depend_on_the_batch(
    submit: Submit, computes: Callable[..., None]
) -> None:
    computes("float32 native", None)
    kept = submit(runtime=RuntimeSpec(device="cpu", deterministic=True))
    run(kept, tokens=20)
    mixed = submit()
    run(mixed, tokens=20)
    assert summarise(kept)["deterministic"] is summarise(mixed)["deterministic"] is True
    computes("float32 other", None)
    with pytest.raises(EngineError, match="runs 1 and 2 computed with float32 native and float32"):
        run(kept)
    run(mixed)
    why = "runs 1 and 2 computed with float32 native and float32 other"
    found = summarise(mixed)
    assert [found[n] for n in ("deterministic", "varies")] == [False, why]
    computes("float32 native", None)
    assert run(kept) is Outcome.DONE_WITH_ERRORS
    found = summarise(kept)
    assert [found[n] for n in ("deterministic", "varies")] == [True, None]
    assert found["arithmetic"] == "float32 native"


PLAIN = RuntimeSpec(device="cpu", max_num_seqs=1, share_prefixes=False, page_size=4096)


@pytest.mark.parametrize(
    "changes",
    [
        {"columns": {"temperature": [0.0, 1.0, None, 0.0] * 2, "max_tokens": [*range(1, 9)]}},
        {"n": 3, "sampling": replace(SAMPLED, stop=("\x07", "a"))},
        {"n": 2, "keep": 1, "sampling": replace(SAMPLED, logprobs=2), "runtime": PLAIN},
        {"sampling": replace(GREEDY, temperature=0.0, num_beams=3)},
        {"prompt": PromptSpec(column="prompt", chat=True, system="Hm."), "sampling": GREEDY},
    ],
    ids=["columns", "samples", "logprobs", "beams", "chat"],
)
def test_rows_computed_alone_are_those_of_the_job(
    submit: Submit, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job with a failed row, and with equal rows, which it computed once if they are greedy.

    Log-probabilities are compared to the last bit, so that job too computes one row at a time.
    """
    job = submit(**changes)
    assert run(job) is Outcome.DONE_WITH_ERRORS
    rows, add = set[int](), Engine.add

    def alone(engine: Engine, request: Request) -> None:
        assert not engine.has_work
        rows.add(request.row)
        add(engine, request)

    monkeypatch.setattr(Engine, "add", alone)
    before = {p.name: p.read_bytes() for p in job.path.iterdir()}
    seen: list[Progress] = []
    found = again(job, on_progress=seen.append)
    assert found == Recomputed(ROWS - 1, {}, summarise(job)["varies"])
    assert rows == {*range(ROWS)} - {BAD}
    assert (seen[-1].rows_done, seen[-1].rows_total) == (ROWS - 1, ROWS - 1)
    assert {p.name: p.read_bytes() for p in job.path.iterdir()} == before


NO_NATIVE = library.unsupported_reason(torch.bfloat16)


@pytest.mark.skipif(NO_NATIVE is not None, reason=str(NO_NATIVE))
@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_native_answers_are_the_same_to_the_last_bit(
    submit: Submit, tmp_path: Path, sampling: SamplingSpec
) -> None:
    """Many at a time, with prefixes in common and draft tokens, and one at a time."""
    sizes = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}
    model = resolve(str(write_tiny_model(tmp_path / "wide", **sizes)), tmp_path)
    prompts = [f"{'the same words again and again, ' * (i % 3)}row {i}" for i in range(ROWS)]
    prompts[BAD] = ""
    job = submit(
        {"prompt": prompts},
        n=2,
        model=ModelSpec("wide", str(model.path), model.fingerprint, dtype="bfloat16"),
        sampling=replace(sampling, max_tokens=30, logprobs=2),
        runtime=RuntimeSpec(device="cpu", max_num_batched_tokens=64, deterministic=True),
    )
    assert run(job, tokens=60) is Outcome.INTERRUPTED
    assert run(job) is Outcome.DONE_WITH_ERRORS
    assert summarise(job)["deterministic"] is True
    assert again(job) == Recomputed(ROWS - 1, {}, None)


def test_an_answer_that_was_not_computed_so_is_named(submit: Submit) -> None:
    job = submit(n=2)
    run(job)
    with job.journal() as journal:
        [_, was] = journal.results(range(3, 4))
        tokens = b"".join(i.to_bytes(4, "little") for i in (*was.token_ids[:-1], 99))
    edit(job, f"UPDATE results SET token_ids = x'{tokens.hex()}' WHERE id = {3 * 2 + 1}")
    found = again(job)
    last = len(was.token_ids) - 1
    assert [*found.differences] == [3]
    [line] = found.differences[3]
    assert line.startswith(f"row 3, sample 1 differs from token {last} on: 99 ")
    assert f" in the job, {was.token_ids[-1]} " in line


def test_an_unfinished_job_has_its_finished_rows_compared(submit: Submit) -> None:
    job = submit(n=2, runtime=RuntimeSpec(device="cpu", max_num_seqs=3, page_size=4096))
    assert again(job) == Recomputed(0, {}, None)
    assert run(job, tokens=40) is Outcome.INTERRUPTED
    with job.journal() as journal:
        finished = [*journal.whole_rows()]
    assert 1 <= len(finished) < ROWS - 1
    found = again(job)
    assert (found.rows, found.differences) == (len(finished), {})


def test_nothing_is_compared_with_another_model_or_input(submit: Submit, tmp_path: Path) -> None:
    job = submit()
    run(job)
    spec = job.spec()
    for path, error in (("/nowhere", InputError), (str(tmp_path), JobError)):
        with pytest.raises(error, match=path):
            again(folder.create(tmp_path, replace(spec, model=replace(spec.model, path=path))))
    pq.write_table(pa.table({"prompt": ["other"]}), spec.inputs[0].path)
    with pytest.raises(SpecChanged, match="in-0"):
        again(job)


def test_the_choice_of_rows_depends_on_the_seed_and_their_numbers(submit: Submit) -> None:
    job = submit(n=2)
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.write([Result(r, s, "ok") for r in range(500) for s in (0, 1)])
        journal.write([Result(600, 0, "ok"), *(Result(601, s, "error") for s in (0, 1))])
        some = chosen(journal, 20, 1)
        assert some == sorted(set(some)) == chosen(journal, 20, 1) != chosen(journal, 20, 2)
        assert set(some) < set(chosen(journal, 40, 1))
        assert chosen(journal, 1000, 1) == [*range(500)]
        journal.write([Result(r, s, "ok") for r in range(700, 703) for s in (0, 1)])
        assert len(set(some) - set(chosen(journal, 20, 1))) <= 3


ANSWER = Result(
    *(0, 0, "ok", "blue sky", (4, 5, 6), "length", 7, 3),
    logprob=-3.5,
    logprobs=((-1.5, ((4, -1.5),)), (-1.0, ((5, -1.0),)), (-1.0, ((6, -1.0),))),
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"logprobs": ((-1.5, ((4, -1.5),)), *ANSWER.logprobs[1:])}, None),  # type: ignore[index]
        (
            {"token_ids": (4, 9), "text": "blue sea"},
            "differs from token 1 on: 5 'ky' in the job, 9 'ea' when recomputed",
        ),
        (
            {"token_ids": (4, 5), "text": "blue "},
            "differs from token 2 on: 6 'sky' in the job, nothing more when recomputed",
        ),
        (
            {"text": "blue\0sky"},
            r"has the same tokens, but a different text from character 4 on: ' sky' in the job, "
            r"'\x00sky' when recomputed",
        ),
        (
            {"logprobs": (*ANSWER.logprobs[:2], (-1.0, ((8, -1.0),)))},  # type: ignore[index]
            "has the same tokens, but different log-probabilities from token 2 on: -1 for 6 in the "
            "job, -1 for 8 when recomputed",
        ),
        (
            {"finish_reason": "stop"},
            "differs in finish_reason: length in the job, stop when recomputed",
        ),
        ({"prompt_tokens": 8}, "differs in prompt_tokens: 7 in the job, 8 when recomputed"),
        ({"status": "error", "error": "too long"}, "can't be recomputed: too long"),
    ],
)
def test_the_first_difference_is_said(change: dict[str, Any], said: str | None) -> None:
    assert difference(ANSWER, ANSWER._replace(**change)) == said
