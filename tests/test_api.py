"""batchrun from Python: the same options, checks, jobs and tokens as on the command line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun import LLM, Job, list_jobs, run, submit
from batchrun.jobs import folder
from batchrun.jobs.errors import InputError, JobError, JobNotFound, OptionError
from batchrun.jobs.journal.schema import COMMAND
from batchrun.jobs.lease import Lease
from batchrun.runner import reader
from batchrun.runner.isolated import ReaderCrashed
from tests.fuzz.test_fuzz import CORPUS
from tests.tiny import write_tiny_model

PROMPTS = ["one", "two", "a longer one", "one"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def llm(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHRUN_HOME", str(tmp_path_factory.mktemp("home")))
        with LLM(model, dtype="float32", max_tokens=5, max_num_seqs=4) as found:
            yield found


def test_a_job_of_rows_in_memory_comes_to_its_end(model: str, home: Path) -> None:
    lines: list[str] = []
    rows = [{"prompt": text, "id": i, "max_tokens": 2 + i} for i, text in enumerate(PROMPTS)]
    job = submit(rows, model=model, dtype="float32", log=lines.append)
    assert lines == [
        "sampling parameters taken from columns: max_tokens; to treat them as data: "
        "--ignore-param-columns"
    ]
    assert job.wait(600) is job
    assert job.state == "done"
    assert job.stats()["rows"]["done"] == len(rows)
    with folder.find(home, job.id).journal() as journal:
        called = f"batchrun.submit(<4 rows>, model={model!r}, dtype='float32')"
        assert journal.meta(COMMAND) == called
    found = list(job.rows())
    assert [row["id"] for row in found] == [0, 1, 2, 3]
    assert all(row["completion_tokens"] <= 2 + row["id"] for row in found)
    assert job.to_arrow().to_pylist() == [{**row} for row in found]
    assert [json.loads(line) for line in job.output.read_bytes().splitlines()] == found
    assert job.output.parent == home / "jobs" / job.id
    assert [each.id for each in list_jobs()] == [Job.find().id] == [Job.find(job.id[:6]).id]
    with pytest.raises(JobNotFound):
        Job.find("other")
    with pytest.raises(JobError, match="is not running"):
        job.cancel()
    assert list((home / "jobs").glob(".stdin-*")) == []


def test_a_job_of_a_table_and_a_model_here_answer_alike(
    model: str, llm: LLM, tmp_path: Path
) -> None:
    table = pa.table({"prompt": PROMPTS, "when": pa.array([0, 1, 2, 3], pa.date32())})
    sampling = {"max_tokens": 5, "temperature": 0.9, "seed": 3, "n": 2}
    out = tmp_path / "out.parquet"
    job = run(table, model=model, output=out, dtype="float32", token_ids=True, **sampling)
    assert job.to_arrow().equals(pq.read_table(out))
    rows = list(job.rows())
    assert rows[0]["when"] == table["when"][0].as_py()
    here = llm.generate(PROMPTS, **sampling)
    assert [(r.row, r.sample) for r in here] == [(i, s) for i in range(4) for s in range(2)]
    assert [list(r.token_ids) for r in here] == [row["completion_token_ids"] for row in rows]
    assert [r.text for r in here] == [row["completion"] for row in rows]
    assert [r.finish_reason for r in here] == [row["finish_reason"] for row in rows]


def test_a_job_that_was_interrupted_shows_what_is_done_and_resumes(model: str, home: Path) -> None:
    job = submit([{"prompt": "x" * (1 + i)} for i in range(40)], model=model, max_num_seqs=1)
    job.cancel()
    assert job.state == "cancelled"
    before = list(job.rows())
    assert len(before) < 40
    with pytest.raises(OptionError, match="temperature can't be changed when a job is resumed"):
        job.resume(temperature=1)
    job.resume(max_num_seqs=32, kv_budget="64MiB").wait(600)
    after = list(job.rows())
    assert len(after) == 40
    assert after[: len(before)] == before
    assert job.progress() is not None


def test_the_examples_of_the_page_run(model: str, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "python.md").read_text(encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    names: dict[str, Any] = {"MODEL": model}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) > 3
    for block in blocks:
        exec(block, names)


def test_waiting_has_an_end_and_a_failed_job_says_why(
    model: str, tmp_path: Path, home: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "one"}\n')
    job = submit(path, model=model)
    assert job.output == tmp_path / "in-completions.jsonl"
    job.wait()
    with Lease(home / "jobs" / job.id), pytest.raises(TimeoutError, match="has not ended after"):
        Job.find(job.id).wait(0.2)
    path.write_text('{"prompt": "two"}\n')
    with pytest.raises(JobError, match="failed: the input or model changed"):
        job.resume(output="b.jsonl").wait(600)


@pytest.mark.parametrize("thread", [False, True])
def test_a_file_that_crashes_its_reader_is_an_error_of_the_caller(
    tmp_path: Path, thread: bool
) -> None:
    path = tmp_path / "bad.parquet"
    shutil.copy(CORPUS / "parquet" / "checked-aborts", path)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ReaderCrashed) as crash:
        _ = pool.submit(submit, path).result() if thread else submit(path)
    assert str(crash.value) == f"reading {path} crashes the reader (SIGABRT): the file is damaged"
    assert crash.value.path == path
    assert "write the file again" in str(crash.value.hint)
    assert list_jobs() == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temprature": 1}, "there is no option temprature; did you mean temperature?"),
        ({"temperature": "hot"}, "temperature: 'hot' is not a number"),
        ({"temperature": -1}, "temperature must be 0 or more, not -1"),
        ({"best_of": 2, "n": 3}, "best_of 2 is less than n 3"),
        ({"num_beams": 2, "stop": "a"}, "num_beams with stop: use stop_token_ids, or cut the text"),
        ({"choice_logprob": True}, "choice_logprob needs choices"),
        ({"template": "{"}, "template: the template field that begins at character 1"),
        ({"template_args": {"messages": 1}, "chat": True}, "template_args messages: batchrun sets"),
        ({"attention": "paged"}, "attention: 'paged' is not one of 'auto', 'sdpa'"),
    ],
)
def test_what_can_not_be_is_said_in_pythons_words(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError) as refused:
        submit([{"prompt": "one"}], **options)
    assert says in str(refused.value)
    assert list_jobs() == []


def test_a_model_here_takes_text_chats_and_rows(llm: LLM) -> None:
    chat = [{"role": "user", "content": "one"}]
    prompts = ["one", chat, {"messages": chat}, {"prompt": "one", "max_tokens": 2}, {"other": 1}]
    text, said, row, short, broken = llm.generate(prompts)
    assert said.token_ids == row.token_ids
    assert said.prompt_tokens == row.prompt_tokens > text.prompt_tokens
    assert len(short.token_ids) <= 2
    assert short.token_ids == text.token_ids[: len(short.token_ids)]
    assert broken.status == "error"
    assert broken.text is None
    assert "the prompt is null" in str(broken.error)
    assert llm.generate([]) == []
    [again] = llm.generate(["one"])
    assert again.token_ids == text.token_ids
    with pytest.raises(InputError, match="row 1 can't be written as JSON"):
        llm.generate([{"prompt": "one", "x": object()}])
    with pytest.raises(OptionError, match="top_p must be above 0"):
        llm.generate(["one"], top_p=2)
    with pytest.raises(OptionError, match="device does not apply here"):
        llm.generate(["one"], device="cpu")
    with pytest.raises(OptionError, match="output does not apply here"):
        LLM(output="out.jsonl")
    with pytest.raises(InputError, match="no input files were given"):
        submit([])


def test_equal_prompts_have_equal_results_and_the_best_are_kept(llm: LLM) -> None:
    first, second, third = llm.generate(["same", "same", "same"])
    assert first.token_ids == second.token_ids == third.token_ids
    assert [r.row for r in (first, second, third)] == [0, 1, 2]
    sampling = {"temperature": 1.0, "seed": 1}
    every = llm.generate(["one", "two"], n=3, best_of=3, **sampling)
    best = llm.generate(["one", "two"], n=1, best_of=3, **sampling)
    assert [r.token_ids for r in best] == [every[0].token_ids, every[3].token_ids]
    assert [r.sample for r in every] == [0, 1, 2] * 2
    assert every[0].mean_logprob >= every[1].mean_logprob >= every[2].mean_logprob  # type: ignore[operator]


def test_many_prompts_keep_their_answers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the engine's queue is full again and again, and a planner orders them."""
    monkeypatch.setattr("batchrun.runner.drive.QUEUED_REQUESTS", 3)
    assert reader.QUEUED_REQUESTS > 3
    prompts = [f"{'shared ' * (i % 3)}{i % 17}" for i in range(50)]
    alone = {prompt: llm.generate([prompt])[0].token_ids for prompt in set(prompts)}
    found = llm.generate(prompts)
    assert [r.row for r in found] == list(range(50))
    assert [r.token_ids for r in found] == [alone[prompt] for prompt in prompts]


def test_what_was_broken_off_meets_no_later_prompt(model: str, monkeypatch: Any) -> None:
    with LLM(model, dtype="float32", max_tokens=5) as llm:
        [want] = llm.generate(["two"])
        step, left = llm._runtime.engine.step, iter(range(2))  # type: ignore[union-attr]

        def stepping() -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return step()

        monkeypatch.setattr(llm._runtime.engine, "step", stepping)  # type: ignore[union-attr]
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["one", "other"])
        [found] = llm.generate(["two"])
        assert (found.row, found.token_ids) == (0, want.token_ids)


class Frame:
    """As DataFrames of pandas, polars and DuckDB show themselves to Arrow."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.column_names)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.table.__arrow_c_stream__(requested_schema)


def test_one_prompt_alone_and_columns_of_them(llm: LLM) -> None:
    two = llm.generate(["one", "two"])
    tokens = [result.token_ids for result in two]
    for same in (
        iter(["one", "two"]),
        ("one", "two"),
        pa.array(["one", "two"]),
        pa.chunked_array([["one"], ["two"]]),
        pa.table({"prompt": ["one", "two"]}),
        Frame(pa.table({"prompt": ["one", "two"]})),
    ):
        assert [result.token_ids for result in llm.generate(same)] == tokens  # type: ignore[arg-type]
    for alone in ("one", {"prompt": "one"}):
        [found] = llm.generate(alone)
        assert found.token_ids == tokens[0]
    chat = [{"role": "user", "content": "one"}]
    [said] = llm.generate([chat])
    [also] = llm.generate(chat)
    assert also.token_ids == said.token_ids
    assert also.prompt_tokens == said.prompt_tokens
    for wrong in (None, 3):
        with pytest.raises(InputError, match="prompts are texts, chats or rows, not of type"):
            llm.generate(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="it holds bytes; decode them first"):
        llm.generate(b"one")  # type: ignore[arg-type]


def test_rows_of_an_iterator_or_a_frame_are_all_there(model: str) -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    rows = [{"prompt": text, "when": when, "size": Decimal("1.10")} for text in PROMPTS]
    job = run(iter(rows), model=model, max_tokens=2)
    found = list(job.rows())
    assert [row["prompt"] for row in found] == PROMPTS
    assert {(row["when"], row["size"]) for row in found} == {
        ("2026-01-02T03:04:05.000000+00:00", "1.10")
    }
    frame = Frame(pa.table({"prompt": PROMPTS}))
    job = run(frame, model=model, max_tokens=2)  # type: ignore[arg-type]
    assert job.to_arrow()["prompt"].to_pylist() == PROMPTS


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (None, "the input is of type NoneType, neither files nor rows"),
        ({"prompt": "one"}, "the input is of type dict, neither files nor rows"),
        (b"in.jsonl", "the input is of type bytes, neither files nor rows"),
        ([3], "an input is of type int, neither a file nor a row"),
        ([{"prompt": "one"}, "two"], "row 2 is of type str, not a dict"),
        ([{"prompt": "one"}, {"prompt": object()}], "row 2 can't be written as JSON"),
        (pa.chunked_array([["one"]]), "rows of type ChunkedArray can't be read as a table"),
    ],
)
def test_what_is_neither_files_nor_rows_is_refused(model: str, inputs: Any, says: str) -> None:
    with pytest.raises(InputError) as refused:
        submit(inputs, model=model)
    assert says in str(refused.value)
    assert list_jobs() == []
