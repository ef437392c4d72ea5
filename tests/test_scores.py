"""`--score`, `--labels`, `--perplexity`: the model's own probabilities of known text."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import batchrun
from batchrun import LLM
from batchrun.engine import build, executor, sampling
from batchrun.jobs.errors import InputError, OptionError
from batchrun.jobs.holders import holders
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result, Scores
from batchrun.jobs.lease import LOCK
from batchrun.runner.recompute import difference
from tests.cli.gate import Gate
from tests.tiny import CONTEXT, byte_vocabulary, write_tiny_model

ROWS = [
    {"prompt": "one", "answer": " is a number"},
    {"prompt": "two rows of some length, which are", "answer": "x"},
    {"prompt": "one", "answer": " is a name"},
    {"prompt": "a", "answer": "été, 雪"},
    {"prompt": "two rows of some length, which are", "answer": ""},
]
Ids = list[int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def own(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path / "home"))


def tokens(text: str) -> Ids:
    """As of the tiny model: no special tokens, and one a byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: PLC0415

    known = {token: i for i, token in enumerate(byte_vocabulary())}
    return [known[bytes_to_unicode()[byte]] for byte in text.encode()]


def log_softmax(own: Any, ids: Ids) -> torch.Tensor:
    with torch.inference_mode():
        return own(torch.tensor([ids])).logits[0].log_softmax(-1)


def wanted(own: Any, prompt: str, text: str) -> list[float]:
    start, ids = tokens(prompt), tokens(prompt + text)
    logprobs = log_softmax(own, ids)
    return [logprobs[i - 1, ids[i]].item() for i in range(len(start), len(ids))]


def check(own: Any, found: list[Result]) -> None:
    for row, result in zip(ROWS, found, strict=True):
        assert result.error is None
        assert result.scores is not None
        want = wanted(own, row["prompt"], row["answer"])
        assert result.scores.logprobs == pytest.approx(want, abs=1e-4)
        assert result.scores.sum == pytest.approx(sum(want), abs=1e-3)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 7, 64, None])
def test_a_text_has_the_scores_of_the_models_own_logits(
    model: Path, own: Any, chunk: int | None, share: bool
) -> None:
    limits = {"max_num_batched_tokens": chunk, "share_prefixes": share}
    with LLM(str(model), dtype="float32", score="answer", **limits) as llm:
        found = llm.generate(ROWS)
    check(own, found)
    for result in found:
        assert (result.text, result.token_ids, result.finish_reason) == (None, (), "scored")
    assert found[4].scores == Scores()
    assert (found[4].scores.sum, found[4].scores.mean) == (0, None)


@pytest.mark.parametrize("optimize", [True, False])
def test_beside_rows_that_generate_and_log_probabilities_of_what_they_generate(
    model: Path, own: Any, optimize: bool
) -> None:
    rows = [{**row, "max_tokens": i % 3 * 4} for i, row in enumerate(ROWS)]
    options = {"dtype": "float32", "optimize": optimize, "max_num_batched_tokens": 9}
    with LLM(str(model), **options) as llm:
        found = llm.generate(rows, score="answer", logprobs=1, ignore_eos=True)
        alone = llm.generate(
            [{k: v for k, v in row.items() if v} for row in rows], logprobs=1, ignore_eos=True
        )
    check(own, found)
    for row, result, other in zip(rows, found, alone, strict=True):
        assert result.completion_tokens == row["max_tokens"]
        assert len(result.logprobs or ()) == row["max_tokens"]
        if row["max_tokens"]:  # it continues the prompt, not the text
            assert result.token_ids == other.token_ids
            assert result.logprobs is not None
            assert other.logprobs is not None
            each = ([own for own, _ in r.logprobs] for r in (result, other) if r.logprobs)
            assert next(each) == pytest.approx(next(each), abs=1e-5)
            assert result.finish_reason == "length"


def test_labels_have_the_probabilities_of_their_first_tokens(model: Path, own: Any) -> None:
    labels = [" yes", "no", "été"]
    with LLM(str(model), dtype="float32") as llm:
        found = llm.generate(ROWS, labels=labels)
        both = llm.generate(ROWS, labels=labels, score="answer")
    check(own, both)
    for row, result, other in zip(ROWS, found, both, strict=True):
        probs = log_softmax(own, tokens(row["prompt"]))[-1].exp()
        want = [probs[tokens(label)[0]].item() for label in labels]
        assert result.scores is not None
        assert result.scores.label_probs == pytest.approx(want, rel=1e-4)
        assert sum(want) < 0.5, "they are not normalised over the labels"
        assert result.scores.logprobs == ()
        assert other.scores is not None
        assert other.scores.labels == result.scores.labels


def test_perplexity_is_of_the_text_or_else_of_the_prompt(model: Path, own: Any) -> None:
    with LLM(str(model), dtype="float32", perplexity=True) as llm:
        of_prompts = llm.generate(ROWS)
        of_texts = llm.generate(ROWS, score="answer")
        (full,) = llm.generate(["x" * CONTEXT])
    for row, prompt, text in zip(ROWS, of_prompts, of_texts, strict=True):
        assert prompt.scores is not None
        assert text.scores is not None
        want = wanted(own, row["prompt"][:1], row["prompt"][1:])
        mean = sum(want) / len(want) if want else None
        assert prompt.scores.perplexity == (mean and pytest.approx(math.exp(-mean), rel=1e-3))
        assert text.scores.logprobs == pytest.approx(
            wanted(own, row["prompt"], row["answer"]), abs=1e-4
        )
    assert of_prompts[3].scores is not None
    assert of_prompts[3].scores.perplexity is None, "a prompt of one token"
    assert full.scores is not None
    assert len(full.scores.logprobs) == CONTEXT - 1


def test_an_answer_of_a_chat(model: Path, own: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    with LLM(str(model), dtype="float32", score="answer") as llm:
        (found,) = llm.generate([{"messages": chat, "answer": "<|im_end|>"}])
        tokenizer = llm._runtime.loaded.tokenizer  # type: ignore[union-attr]
        start = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    ids = [*start, *tokens("<|im_end|>")]  # what reads like a control token is text
    logprobs = log_softmax(own, ids)
    want = [logprobs[i - 1, ids[i]].item() for i in range(len(start), len(ids))]
    assert found.scores is not None
    assert found.scores.logprobs == pytest.approx(want, abs=1e-4)


def test_what_is_wrong_with_a_row_is_its_own_error(model: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "answer": None},
        {"prompt": "a"},
        {"prompt": "a", "answer": 7},
        {"prompt": "a" * 100, "answer": "b" * (CONTEXT - 99)},
        {"prompt": "a" * 100, "answer": "b" * (CONTEXT - 100)},
        {"prompt": "a", "answer": "b", "max_tokens": CONTEXT},
        {"prompt": "a", "answer": "b", "max_tokens": -1},
    ]
    with LLM(str(model), dtype="float32") as llm:
        found = llm.generate(rows, score="answer")
        (refused,) = llm.generate([{"prompt": "a", "max_tokens": 0}])
    kinds = ["null_score", "null_score", "wrong_type", "prompt_too_long", None, None]
    assert [result.error_kind for result in found] == [*kinds, "bad_parameter"]
    assert found[3].scores is None
    assert refused.error_kind == "bad_parameter"
    assert "0 only where known text is scored" in (refused.error or "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 0}, "0 only where known text is scored"),
        ({"max_tokens": -1, "perplexity": True}, "0 or more"),
        ({"labels": "a,b", "num_beams": 2}, "must be 1 where known text is scored"),
        ({"labels": "a,b", "best_of": 2, "temperature": 1.0}, "with scores nothing is generated"),
        ({"labels": "a,a"}, "appears twice"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    tmp_path: Path, model: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        batchrun.submit(ROWS, model=str(model), **options)


def test_a_column_that_is_missing_or_no_text_is_refused_at_once(model: Path) -> None:
    with pytest.raises(InputError, match="no column 'answr'") as caught:
        batchrun.submit(ROWS, model=str(model), score="answr")
    assert "'answer'" in (caught.value.hint or "")
    table = pa.table({"prompt": ["a"], "answer": [7]})
    with pytest.raises(InputError, match="'answer' holds int64, not text to score"):
        batchrun.submit(table, model=str(model), score="answer")


def test_labels_that_begin_alike_are_refused_by_name(model: Path) -> None:
    with (
        LLM(str(model), dtype="float32") as llm,
        pytest.raises(InputError, match="'positive' and 'possible' begin with the same token"),
    ):
        llm.generate(["a"], labels="negative,positive,possible")


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", "out.csv"])
def test_they_are_columns_of_the_output(model: Path, own: Any, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    options = {"score": "answer", "labels": "yes,no", "perplexity": True, "n": 2}
    rows = [*ROWS, {"prompt": "a", "answer": None}]
    batchrun.run(rows, model=str(model), output=str(out), dtype="float32", **options)
    if name.endswith("parquet"):
        table = pq.read_table(out)
        pair = pa.struct([("yes", pa.float64()), ("no", pa.float64())])
        types = {"score_logprobs": pa.list_(pa.field("element", pa.float32())), "label_probs": pair}
        types |= dict.fromkeys(("score_sum", "score_mean", "perplexity"), pa.float64())
        types |= {"score_tokens": pa.int64()}
        assert {name: table.schema.field(name).type for name in types} == types
        found = table.to_pylist()
    elif name.endswith("jsonl"):
        found = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        with out.open() as file:
            read = list(csv.DictReader(file))
        names = [name for name in read[0] if name.startswith(("score", "label", "perp", "comp"))]
        found = [
            {**row, **{name: json.loads(row[name] or "null") for name in names}} for row in read
        ]
    assert [int(row["sample"]) for row in found] == [0, 1] * 6
    for row, plain in zip(found[:10:2], ROWS, strict=True):
        want = wanted(own, plain["prompt"], plain["answer"])
        assert row["score_logprobs"] == pytest.approx(want, abs=1e-4)
        assert row["score_tokens"] == len(want)
        mean = sum(want) / len(want) if want else None
        assert row["score_sum"] == pytest.approx(sum(want), abs=1e-3)
        assert row["score_mean"] == (mean and pytest.approx(mean, abs=1e-4))
        assert row["perplexity"] == (mean and pytest.approx(math.exp(-mean), rel=1e-3))
        assert list(row["label_probs"]) == ["yes", "no"]
        assert (row["completion"], row["finish_reason"]) == (None, "scored")
        assert row["completion_tokens"] == 0
    assert found[-1]["error"]
    assert [found[-1][name] for name in ("score_logprobs", "score_sum", "label_probs")] == [
        None
    ] * 3


@pytest.mark.parametrize("bound", [1, 10_000])
def test_the_logits_of_a_step_stay_within_their_bound(
    model: Path, own: Any, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are scored at once, and however many tokens a step may have."""
    monkeypatch.setattr(build, "_CPU_LOGITS", bound)
    monkeypatch.setattr(sampling, "_CPU_SCORES", 24 * 259 * 3)  # three rows
    sizes: list[int] = []
    parts: list[int] = []
    own_score, own_norm = executor.score, sampling._logsumexp

    def score(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(logits.nbytes)
        return own_score(logits, *others)

    def norm(logits: torch.Tensor) -> torch.Tensor:
        parts.append(len(logits))
        return own_norm(logits)

    monkeypatch.setattr(executor, "score", score)
    monkeypatch.setattr(sampling, "_logsumexp", norm)
    with LLM(str(model), dtype="float32", max_num_batched_tokens=8192, score="answer") as llm:
        found = llm.generate(ROWS * 3)
    check(own, found[: len(ROWS)])
    row = 259 * 4
    assert max(sizes) == max(row, bound // row * row)
    assert max(parts) <= 3


def test_logits_that_are_not_finite_make_no_number(model: Path) -> None:
    logits = torch.zeros(6, 8)
    logits[1, 3] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4, 3] = -torch.inf
    places = torch.arange(6)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = sampling.score(logits.to(dtype), places, torch.full((6,), 3)).tolist()
        assert found[0] == found[5] == pytest.approx(-math.log(8))
        assert all(map(math.isnan, found[1:4]))
        assert found[4] == -math.inf


def test_rows_that_are_computed_again_are_compared_by_their_scores() -> None:
    was = Result(0, 0, "ok", finish_reason="scored", scores=Scores((-0.5, -1.0), (-2.0,)))
    assert difference(was, was) is None
    other = was._replace(scores=Scores((-0.5, -1.5), (-2.0,)))
    assert difference(was, other) == (
        "has different scores of known text from number 2 on: -1 in the job, -1.5 when recomputed"
    )
    less = difference(was, was._replace(scores=None))
    assert less == (
        "has different scores of known text from number 0 on: -2 in the job, none when recomputed"
    )
    exact = Scores((0.1,), ())  # kept as float32
    kept = was._replace(scores=Scores.unpacked(exact.packed()))
    assert difference(kept, was._replace(scores=exact)) is None


@pytest.mark.parametrize("reorder", [True, False])
def test_equal_rows_are_scored_once(model: Path, own: Any, tmp_path: Path, reorder: bool) -> None:
    """With any temperature, as nothing is drawn; but not where text or labels differ."""
    rows = [{**row, "temperature": t} for t in (0.5, 1.0, None) for row in ROWS]
    options = {"dtype": "float32", "score": "answer", "temperature": 0.7, "n": 2}
    options["reorder"] = reorder
    job = batchrun.run(rows, model=str(model), output=str(tmp_path / "o.jsonl"), **options)
    stats = job.stats()
    assert stats["finish_reasons"] == {"scored": 30}
    assert stats["duplicates"]["rows"] == (25 if reorder else 0)
    found = list(job.rows())
    for i, row in enumerate(found):
        plain = ROWS[i // 2 % len(ROWS)]
        want = wanted(own, plain["prompt"], plain["answer"])
        assert row["score_logprobs"] == pytest.approx(want, abs=1e-4)


def test_a_job_that_is_killed_goes_on_and_scores_what_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results of finished rows are kept; the others are the same as without the kill."""
    rows = [{**row, "max_tokens": i % 2 * 40} for i in range(12) for row in ROWS]
    options = {"dtype": "float32", "score": "answer", "labels": "a,b", "ignore_eos": True}
    options |= {"max_num_seqs": 2, "max_num_batched_tokens": 16, "reorder": False}
    output, gate = str(tmp_path / "o.jsonl"), Gate(tmp_path / "gate")
    gate.place.mkdir()
    gate.close(60)  # of several hundred steps
    monkeypatch.setenv("PYTHONPATH", f"{gate.place}:{os.environ.get('PYTHONPATH', '')}")
    job = batchrun.submit(rows, model=str(model), output=output, **options)
    while (progress := job.progress()) is None or progress.rows_done < 3:
        assert job.state in ("new", "queued", "running")
        time.sleep(0.02)
    for process in holders(job._job.path / LOCK):
        os.kill(process.pid, signal.SIGKILL)
    job._reap()
    while job.state == "running":
        time.sleep(0.02)
    assert job.state == "interrupted"
    with job._job.journal() as journal:
        kept = {(r.row, r.sample): r for r in journal.results()}
    assert 0 < len(kept) < len(rows)
    gate.open()
    job.resume().wait()
    with job._job.journal() as journal:
        assert {key: r for r in journal.results() if (key := (r.row, r.sample)) in kept} == kept
    options |= {"output": str(tmp_path / "w.jsonl"), "again": True}
    whole = batchrun.run(rows, model=str(model), **options)
    assert list(job.rows()) == list(whole.rows())


def test_a_journal_keeps_them(tmp_path: Path) -> None:
    some = Scores((-0.5, -math.inf), (-1.25, -3.0))
    results = [
        Result(0, 0, "ok", finish_reason="scored", scores=some),
        Result(1, 0, "ok", finish_reason="scored", scores=Scores()),
        Result(2, 0, "ok", "text", (7,), "stop", 1, 1),
    ]
    Journal.create(tmp_path)
    with Journal(tmp_path, 1) as journal:
        journal.begin_run()
        journal.write(results)
        assert list(journal.results()) == results
        journal.check()
    assert some.perplexity == math.inf


LOGPROBS = st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(tuple)


@given(LOGPROBS, LOGPROBS)
def test_what_is_packed_is_what_is_unpacked(logprobs: Any, labels: Any) -> None:
    scores = Scores(logprobs, labels)
    assert Scores.unpacked(scores.packed()) == scores


@pytest.fixture(scope="module")
def bits(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Scores of rows with any limits of a step; the model is loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHRUN_HOME", str(tmp_path_factory.mktemp("home")))
        with LLM(str(model), dtype="float32", max_num_seqs=5) as llm:
            runtime = llm._runtime
            assert runtime is not None
            if runtime.varies is not None:
                pytest.skip(runtime.varies)

            def computed(rows: list[dict[str, Any]], chunk: int, scored: int, share: bool) -> Any:
                scheduler = runtime.scheduler
                scheduler.max_num_batched_tokens, scheduler.max_scored_tokens = chunk, scored
                scheduler._share = share
                found = llm.generate(rows, score="answer", labels=["a", "b"])
                return [(r.scores, r.token_ids) for r in found]

            yield computed


TEXTS = st.sampled_from(["one", "one two", "x" * 40, "x" * 40 + "y", "é" * 9, "a b c d" * 6])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from([0, 0, 3])), min_size=1, max_size=7),
    chunk=st.integers(1, 90),
    scored=st.integers(1, 60),
    share=st.booleans(),
)
def test_a_row_has_the_same_bits_in_any_batch(
    bits: Any, rows: list[tuple[str, str, int]], chunk: int, scored: int, share: bool
) -> None:
    fields = [{"prompt": p, "answer": a, "max_tokens": n} for p, a, n in rows]
    together = bits(fields, chunk, scored, share)
    assert together == [bits([row], 1024, 1024, True)[0] for row in fields]
