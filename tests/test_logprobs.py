"""`--logprobs`: the model's own log-probabilities of each token, from the logits to the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from batchrun import LLM
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Partial, Result, packed, unpacked
from tests.tiny import write_tiny_model

PROMPTS = ["one", "two rows", "three of them", "one"]
FLOAT32 = st.floats(width=32, allow_nan=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"num_beams": 3},
        {"num_beams": 2, "repetition_penalty": 1.3, "length_penalty": 2.0},
    ],
)
def test_they_are_those_of_the_models_own_logits(
    model: Path, sampling: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path))
    with LLM(str(model), dtype="float32", max_tokens=6) as llm:
        found = llm.generate(PROMPTS, logprobs=3, **sampling)
        tokenizer = llm._runtime.loaded.tokenizer  # type: ignore[union-attr]
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for prompt, result in zip(PROMPTS, found, strict=True):
        assert result.logprobs is not None
        assert len(result.logprobs) == result.completion_tokens > 0
        start = tokenizer(prompt)["input_ids"]
        with torch.inference_mode():
            logits = own(torch.tensor([[*start, *result.token_ids]])).logits[0]
        for i, (token, (logprob, likeliest)) in enumerate(
            zip(result.token_ids, result.logprobs, strict=True), len(start) - 1
        ):
            want = logits[i].log_softmax(-1)
            values, ids = want.topk(3)
            assert logprob == pytest.approx(want[token].item(), abs=1e-4)
            assert [p for _, p in likeliest] == pytest.approx(values.tolist(), abs=1e-4)
            assert [t for t, _ in likeliest] == ids.tolist()


def test_without_any_of_the_likeliest_and_of_rows_that_ask_for_none(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path))
    with LLM(str(model), dtype="float32", max_tokens=3) as llm:
        (alone,) = llm.generate(["one"], logprobs=0)
        (plain,) = llm.generate(["one"])
    assert alone.logprobs is not None
    assert [likeliest for _, likeliest in alone.logprobs] == [()] * 3
    assert plain.logprobs is None
    assert plain.token_ids == alone.token_ids


def logprobs_of(most: int) -> st.SearchStrategy[tuple[Any, ...]]:
    pairs = st.lists(st.tuples(st.integers(0, 2**31 - 1), FLOAT32), min_size=most, max_size=most)
    return st.lists(st.tuples(FLOAT32, pairs.map(tuple)), max_size=3).map(tuple)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 3).flatmap(logprobs_of))
def test_what_is_packed_is_what_is_unpacked(logprobs: tuple[Any, ...]) -> None:
    assert unpacked(packed(logprobs)) == logprobs
    assert unpacked(packed(None)) is None


def test_a_journal_keeps_them_of_results_and_of_what_has_begun(tmp_path: Path) -> None:
    logprobs = ((-0.5, ((7, -0.5), (9, -1.25))), (-2.0, ((1, -0.25), (2, -1.0))))
    result = Result(0, 0, "ok", "ab", (7, 3), "stop", 1, 2, logprobs=logprobs)
    partial = Partial(1, 0, (7,), None, logprobs[:1])
    Journal.create(tmp_path)
    with Journal(tmp_path, 1) as journal:
        journal.begin_run()
        journal.write([result], partials=[partial])
        assert list(journal.results()) == [result]
        assert journal.partials() == {(1, 0): partial}
        journal.check()


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", "out.csv"])
def test_they_are_columns_of_the_output(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal rows, which are computed once, too."""
    import batchrun  # noqa: PLC0415

    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path / "home"))
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    out = tmp_path / name
    batchrun.run(rows, model=str(model), output=str(out), max_tokens=3, logprobs=2, dtype="float32")
    if name.endswith("parquet"):
        table = pq.read_table(out)
        pair = pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())])
        assert table.schema.field("logprobs").type.value_type == pa.float32()
        assert table.schema.field("top_logprobs").type.value_type.value_type == pair
        found = table.to_pylist()
    elif name.endswith("jsonl"):
        found = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        import csv  # noqa: PLC0415

        with out.open() as file:
            read = list(csv.DictReader(file))
        names = ("logprobs", "top_logprobs")
        found = [{**row, **{name: json.loads(row[name]) for name in names}} for row in read]
    for row in found:
        assert len(row["logprobs"]) == len(row["top_logprobs"]) == int(row["completion_tokens"])
        assert row["logprobs"] == [likeliest[0]["logprob"] for likeliest in row["top_logprobs"]]
    assert found[3]["top_logprobs"] == found[0]["top_logprobs"]
