"""Whatever a row holds is that row's business: a job ends, each row once, and good rows as ever."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from batchrun.engine.build import Assembly, build
from batchrun.engine.settings import Settings
from batchrun.jobs import folder
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.models.resolve import resolve
from batchrun.runner.job_run import Outcome, run_job
from batchrun.runner.param_columns import OVERRIDES
from tests.tiny import CONTEXT, SPECIAL, write_tiny_model

GOOD = ["Hello", "a longer prompt, of more than one chunk " * 3, "x", "Hello there"]
HUGE = (0, -1, 1, 2**31 - 1, 2**31, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 10**30)
REAL = (0.0, -0.0, 5e-324, 1e-310, 1e-45, 1e-7, 0.3, 1.0, 1e-30, 5.0, 3.5e38, 1e308, -1e308)
TEXTS = ("", " ", "\x00", "a\ud800", "\udc00\ud800", "\ufffd", "<extra0>", "nan", "1e999", "\u202e")
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from([*TEXTS, *SPECIAL, "".join(SPECIAL) * 9, "\u0301" * 50, "[" * 2000]),
    st.sampled_from([" " * 10**6, "é" * CONTEXT, "a" * (CONTEXT - 1), "\U0001f9d1\u200d" * 40]),
)
numbers = st.one_of(st.sampled_from(HUGE), st.sampled_from(REAL), st.integers(), st.floats())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts, numbers.map(str)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "stop"]), inner, max_size=2),
    ),
    max_leaves=4,
)
stops = st.one_of(
    values,
    st.lists(st.one_of(texts, st.none()), max_size=4),
    st.sampled_from(
        [["x" * 10**5], [chr(i) * 3 for i in range(40, 3000)], [*SPECIAL, "</s>\nUser"]]
    ),
)
stop_ids = st.one_of(
    values, st.lists(st.sampled_from(HUGE)), st.sampled_from([[*range(-1, 300)], [*range(9000)]])
)
hostile = st.fixed_dictionaries(
    {"prompt": st.one_of(texts, texts, values)},
    optional={
        **{name: st.one_of(numbers, values) for name in OVERRIDES},
        "stop": stops,
        "stop_token_ids": stop_ids,
    },
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Assembly]:
    """A model and its engine for many jobs."""
    root = tmp_path_factory.mktemp("hostile")
    path = write_tiny_model(root / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(3)])  # which the model does not have
    tokenizer.save_pretrained(path)
    ref = resolve(str(path), root)
    made = Settings(
        str(ref.path),
        "tiny",
        ref.fingerprint,
        root / "verdicts",
        dtype="float32",
        device="cpu",
        max_num_seqs=6,
        max_num_batched_tokens=48,
        page_size=4096,
    )
    bench = build(made, {}, print)
    with patch.object(bench, "close", lambda: None):  # not after each
        yield bench
    bench.close()


def answered(
    bench: Assembly, root: Path, rows: list[dict[str, Any]], n: int = 1, **prompt: Any
) -> list[dict[str, Any]]:
    """The output of a job of these rows."""
    home = root / f"home-{len(list(root.iterdir()))}"
    home.mkdir()
    path, out = home / "in.jsonl", home / "out.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    spec = JobSpec(
        inputs=(InputFile.of(path),),
        input_format="jsonl",
        prompt=PromptSpec(**prompt),
        model=ModelSpec(name="tiny", path="", fingerprint="", dtype="float32"),
        sampling=SamplingSpec(max_tokens=6),
        n=n,
        seed=1,
        output=OutputSpec(path=str(out), format="jsonl", token_ids=True),
    )
    job = folder.create(home, spec)
    outcome = run_job(job.path, stop=threading.Event(), open_workbench=lambda *_: bench)
    found = [json.loads(line) for line in out.read_text().split("\n") if line]
    assert len(found) == len(rows) * n, "not each row once"
    failed = any(row["error"] for row in found)
    assert outcome is (Outcome.DONE_WITH_ERRORS if failed else Outcome.DONE)
    assert all(row["error"] != "" and "internal" not in (row["error"] or "") for row in found)
    return found


@pytest.fixture(scope="module")
def wanted(bench: Assembly, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    rows = answered(bench, tmp_path_factory.mktemp("wanted"), [{"prompt": p} for p in GOOD])
    assert all(row["error"] is None for row in rows)
    return [row["completion_token_ids"] for row in rows]


def rows_of(*values: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"prompt": "Hello", **value} for value in values]


@example(rows=rows_of(*({"temperature": t} for t in (5e-324, 1e-45, 1e-38, 1e-30, 5.0))), n=1)
@example(rows=rows_of(*({"repetition_penalty": p} for p in (5e-324, 1e-44, 1e-5, 9e5))), n=1)
@example(rows=rows_of(*({"max_tokens": m} for m in (2**62, 2**63 - 1, 10**30))), n=1)
@example(rows=rows_of({"seed": -(2**63), "temperature": 1}, {"seed": 2**63}), n=3)
@example(rows=rows_of({"top_p": 5e-324, "min_p": 1.0, "temperature": 1, "top_k": 2**31 - 1}), n=1)
@example(rows=[{"prompt": "a <extra1> b"}, {"prompt": "\ud800"}, {"prompt": "a" * 10**6}], n=1)
@given(rows=st.lists(hostile, min_size=1, max_size=8), n=st.sampled_from([1, 1, 2]))
@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # an example is a job: to make it smaller takes long
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_what_rows_hold_harms_no_other(
    bench: Assembly, wanted: list[Any], tmp_path: Path, rows: list[dict[str, Any]], n: int
) -> None:
    mixed: list[dict[str, Any]] = []
    for i in range(max(len(rows), len(GOOD))):
        mixed += rows[i : i + 1]
        mixed += [{"prompt": p} for p in GOOD[i : i + 1]]
    found = answered(bench, tmp_path, mixed, n)
    for i, row in enumerate(mixed):
        if set(row) == {"prompt"} and row["prompt"] in GOOD:  # also one that was made
            for sample in found[i * n : (i + 1) * n]:
                assert sample["completion_token_ids"] == wanted[GOOD.index(row["prompt"])]


@pytest.mark.parametrize("n", [1, 2])
def test_rows_without_finite_numbers_and_those_that_ask_the_same(
    bench: Assembly, wanted: list[Any], tmp_path: Path, n: int
) -> None:
    [token] = bench.loaded.tokenizer("Y")["input_ids"]
    assert not any(token in ids for ids in wanted), "a good row would fail too"

    def spoil(_: object, asked: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        return embedded.masked_fill((asked[0] == token)[..., None], torch.nan)

    spoilt = bench.loaded.model.get_input_embeddings().register_forward_hook(spoil)
    bad = [*GOOD, "Hello there, You", "a Y", "Hello there, You"]
    try:
        found = answered(bench, tmp_path, [{"prompt": p} for p in [*bad, *bad]], n)
    finally:
        spoilt.remove()
    says = "the model's logits are not finite after 16 tokens of the prompt and 0 of the answer"
    for i, row in enumerate(found):
        at = i // n % len(bad)
        if at < len(GOOD):
            assert row["completion_token_ids"] == wanted[at]
        else:
            assert row["completion"] is None
            assert says in row["error"] or "after 3 tokens of the prompt" in row["error"]
