"""Draws jobs, runs each twice in ways that may not matter, and compares the answers bit by bit.

    python -m tests.crash.bits --examples 500

Another batch size, chunk size, memory, order, number of threads, sharing, drafts, kills in the
middle of rows: tokens, log-probabilities and scores of known text must be the same. Workers are
forked, as in harness.py, from a process that has computed nothing: OpenMP's threads don't survive a
fork.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from batchrun.engine.cpu import compile as compiled
from batchrun.jobs import folder
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.stats import summarise
from batchrun.models.resolve import ModelRef, resolve
from batchrun.runner import engine_loop, job_run, writer
from batchrun.runner.live import Progress
from tests.crash.harness import in_child
from tests.tiny import write_tiny_model

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
WORDS = ["river", "stone", "lamp", "7", "copper garden", "slow", "\n", "north"]
BEGINNINGS = ["", "Answer in one word. ", "Read this with care: " + "a b " * 30]


@dataclass(frozen=True)
class Kind:
    """What computes: native layers, or torch's operators as where there is no compiler."""

    dtype: str
    native: bool


KINDS = [Kind(dtype, native) for dtype in ("float32", "bfloat16") for native in (True, False)]


@dataclass(frozen=True)
class Way:
    """A way to run a job: `kills` are numbers of tokens and rows after which a run dies."""

    runtime: RuntimeSpec
    threads: int
    kills: tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """A job, what computes it, and two ways to run it."""

    rows: tuple[str, ...]
    texts: tuple[str, ...]  # to score behind them
    columns: dict[str, tuple[Any, ...]]  # the rows' own sampling parameters
    sampling: SamplingSpec
    n: int
    seed: int
    kind: Kind
    ways: tuple[Way, Way]


def replace_with(spec: SamplingSpec, more: dict[str, Any]) -> SamplingSpec:
    return replace(spec, **more)


def fits(row: dict[str, Any], sampling: SamplingSpec) -> bool:
    """Whether an answer has the shape that its row or the job asks for."""
    text, own = row["completion"], row.get("regex")
    if row["finish_reason"] != "stop" or sampling.stop or row.get("stop_token_ids"):
        return True
    if own or sampling.regex:
        return re.fullmatch(own or sampling.regex, text) is not None
    if sampling.choices:
        return text in sampling.choices
    if sampling.json_schema:
        Draft202012Validator(json.loads(sampling.json_schema)).validate(json.loads(text))
    return True


prompts = st.builds(
    lambda beginning, words: beginning + " ".join(words),
    st.sampled_from(BEGINNINGS),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12),
)
texts = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)  # the context always holds both
greedy = {"temperature": st.just(0.0)}
drawn = {
    "temperature": st.sampled_from([0.3, 0.8, 1.5]),
    "top_p": st.sampled_from([None, 0.9]),
    "top_k": st.sampled_from([None, 20]),
    "min_p": st.sampled_from([None, 0.02]),
}
common = {
    "max_tokens": st.integers(1, 24),
    "min_tokens": st.sampled_from([None, 1]),
    "ignore_eos": st.booleans(),
    "stop": st.sampled_from([(), ("e",), ("th", "\u00e9")]),
    "logprobs": st.sampled_from([0, 2]),
}
penalties = {
    "repetition_penalty": st.sampled_from([None, 1.2]),
    "presence_penalty": st.sampled_from([None, 0.5]),
    "frequency_penalty": st.sampled_from([None, 0.3]),
}
beams = {**common, **greedy, "stop": st.just(()), "num_beams": st.integers(2, 3)}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["one", "two"]}, "count": {"type": "integer"}},
    "required": ["kind", "count"],
}
REGEX, CHOICES = "[a-c]{2,9}( [0-9])*", ("north", "north east", "7")
shapes = st.sampled_from(
    [{}, {}, {"json_schema": json.dumps(SCHEMA)}, {"regex": REGEX}, {"choices": CHOICES}]
)
scored = {
    **common,
    "max_tokens": st.sampled_from([None, 0, 6]),
    "min_tokens": st.none(),
    "score": st.sampled_from([None, "text"]),
    "labels": st.sampled_from([None, (" a", "b", "c")]),
    "perplexity": st.booleans(),
}
sampling = st.one_of(
    *(
        st.builds(replace_with, st.builds(SamplingSpec, **common, **penalties, **how), shapes)
        for how in (greedy, drawn)
    ),
    st.builds(SamplingSpec, **scored, **drawn).filter(lambda spec: spec.scores),
    st.builds(SamplingSpec, **beams),
)
runtimes = st.builds(
    RuntimeSpec,
    device=st.just("cpu"),
    deterministic=st.just(True),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.sampled_from([16, 23, 64, 300]),
    kv_budget=st.sampled_from([None, 1 << 20, 2 << 20]),
    page_size=st.sampled_from([4096, 65536]),
    share_prefixes=st.booleans(),
    drafts=st.booleans(),
    reorder=st.booleans(),
)
ways = st.builds(
    Way,
    runtimes,
    st.sampled_from([1, 2, 3, 5]),
    st.lists(st.integers(1, 60), max_size=2).map(tuple),
)
most_rows = 10
lengths = {"max_tokens": st.integers(9, 24), "min_tokens": st.sampled_from([None, 0, 3, 9])}
others = {
    "repetition_penalty": st.sampled_from([None, 1.2]),
    "stop_token_ids": st.sampled_from([None, [40], [50, 60, 70]]),
    "regex": st.sampled_from([None, "x{3}", "(ab)+"]),
}


def each(values: dict[str, Any]) -> dict[str, Any]:
    """A value for each row."""
    many = {"min_size": most_rows, "max_size": most_rows}
    return {name: st.lists(value, **many).map(tuple) for name, value in values.items()}


columns = st.builds(
    operator.or_,
    st.one_of(st.just({}), st.fixed_dictionaries(each(lengths))),
    st.fixed_dictionaries({}, optional=each(others)),
)
jobs = st.builds(
    Drawn,
    rows=st.lists(prompts, min_size=1, max_size=most_rows).map(tuple),
    texts=st.lists(texts, min_size=most_rows, max_size=most_rows).map(tuple),
    columns=columns,
    sampling=sampling,
    n=st.integers(1, 3),
    seed=st.integers(0, 99),
    kind=st.sampled_from(KINDS),
    ways=st.tuples(ways, ways),
)


def uncompiled(*_: Any) -> Path:
    raise OSError("there is no C++ compiler here")


def run(job: JobFolder, kind: Kind, way: Way) -> int:
    """Run a job to its end; returns how often it was killed."""

    def work(dies_after: int | None) -> None:
        torch.set_num_threads(way.threads)
        if not kind.native:
            compiled.build = uncompiled  # type: ignore[assignment]
        writer._COMMIT_SECONDS = engine_loop._CHECKPOINT_SECONDS = 0.0

        def look(progress: Progress) -> None:
            done = progress.completion_tokens + progress.rows_done - progress.rows_resumed
            if dies_after is not None and done >= dies_after:
                os.kill(os.getpid(), signal.SIGKILL)

        job_run.run_job(job.path, stop=threading.Event(), on_progress=look)

    deaths = 0
    for kill in (*way.kills, None):
        killed, _ = in_child(lambda k=kill: work(k))  # type: ignore[misc]
        deaths += killed
        if not killed:
            break
    assert job.state() == "done"
    return deaths


class Trials:
    """Runs jobs in a folder of their own."""

    def __init__(self, root: Path, ref: ModelRef) -> None:
        self.root, self.ref = root, ref
        self.examples = self.rows = self.kills = 0
        self._numbers = itertools.count()

    def answers(self, spec: JobSpec, kind: Kind, way: Way) -> list[dict[str, Any]]:
        """The output's rows; floats are exact."""
        at = self.root / f"run-{next(self._numbers)}"
        at.mkdir()
        output = OutputSpec(path=str(at / "out.parquet"), format="parquet", token_ids=True)
        most = max(way.runtime.max_num_seqs or 1, spec.sampling.num_beams or 1)
        runtime = replace(way.runtime, max_num_seqs=most)
        job = folder.create(at, replace(spec, output=output, runtime=runtime))
        try:
            self.kills += run(job, kind, way)
            rows: list[dict[str, Any]] = pq.read_table(output.path).to_pylist()
            assert not [row["error"] for row in rows if row["error"]]
            assert summarise(job)["deterministic"] is True
            return rows
        finally:
            shutil.rmtree(at)

    def compare(self, drawn: Drawn) -> None:
        """Require equal answers of both ways to run a job."""
        inputs = self.root / "in.parquet"
        count = len(drawn.rows)
        # Beam search keeps no shape.
        names = [n for n in drawn.columns if n != "regex" or not drawn.sampling.num_beams]
        own = {name: drawn.columns[name][:count] for name in names}
        texts = drawn.texts[:count]
        pq.write_table(pa.table({"prompt": drawn.rows, "text": texts, **own}), inputs)
        spec = JobSpec(
            inputs=(InputFile.of(inputs),),
            input_format="parquet",
            prompt=PromptSpec(column="prompt"),
            model=ModelSpec(
                "tiny", str(self.ref.path), self.ref.fingerprint, dtype=drawn.kind.dtype
            ),
            sampling=drawn.sampling,
            n=1 if drawn.sampling.num_beams else drawn.n,
            seed=drawn.seed,
            output=OutputSpec(),
        )
        first, second = (self.answers(spec, drawn.kind, way) for way in drawn.ways)
        assert first == second
        assert all(fits(row, drawn.sampling) for row in first)
        self.examples += 1
        self.rows += len(drawn.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--examples", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["BATCHRUN_HOME"] = name
        trials = Trials(root, resolve(str(write_tiny_model(root / "tiny", **SIZES)), root))

        @settings(
            max_examples=args.examples,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(jobs)
        def same_answers(drawn: Drawn) -> None:
            trials.compare(drawn)

        same_answers()
    found = {"examples": trials.examples, "rows": trials.rows, "kills": trials.kills}
    print(json.dumps({"benchmark": "bits", **found, "answers_equal": True}), file=sys.stdout)


if __name__ == "__main__":
    main()
