"""What the shape of an answer costs: constrained answers against free ones, in one run.

    python -m benchmarks.shapes [--rows 64] [--repeat 5]

The same prompts are answered freely, under a JSON schema without draft tokens, and under it with
draft tokens, in turns. The time a step is compared over steps in which every row computes one
token: what masks and matchers add to it. The steps a row are those of its whole answer: tokens that
the schema forces take none of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line sets it

import pyarrow.parquet as pq

from batchrun.engine.build import Assembly, build
from batchrun.engine.core import Completion, Request, SamplingParams
from batchrun.engine.settings import Settings
from batchrun.grammars.constraint import constraint_of
from batchrun.jobs.folder import home
from batchrun.machine import description
from batchrun.models.resolve import DEFAULT_MODEL, resolve

ROOT = Path(__file__).parent.parent
SCHEMA = {
    "type": "object",
    "properties": {
        "summary": {"type": "string", "minLength": 150, "maxLength": 160},
        "category": {"enum": ["science", "history", "everyday life", "programming", "other"]},
        "difficulty": {"type": "integer", "minimum": 1, "maximum": 5},
        "needs_calculation": {"type": "boolean"},
    },
    "required": ["summary", "category", "difficulty", "needs_calculation"],
}
MOST_TOKENS = 160


@dataclass
class Way:
    """A way to answer, and what was measured of it.

    `whole` are the seconds of steps in which every row computed one token.
    """

    constraint: str | None
    drafts: bool
    whole: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps_a_row: float = 0.0
    tokens_a_row: float = 0.0

    def run(self, assembly: Assembly, prompts: list[tuple[int, ...]]) -> list[Completion]:
        """Answer all prompts."""
        free = self.constraint is None
        params = SamplingParams(MOST_TOKENS, constraint=self.constraint, ignore_eos=free)
        engine, proposer = assembly.engine, assembly.scheduler.stays.proposer
        if not self.drafts:
            assembly.scheduler.stays.proposer = None
        for row, ids in enumerate(prompts):
            engine.add(Request(row, 0, ids, params, 0))
        plans: list[Any] = []
        launch = assembly.executor.launch
        assembly.executor.launch = lambda plan: (plans.append(plan), launch(plan))[1]  # type: ignore[func-returns-value, method-assign]
        done: list[Completion] = []
        taken = 0
        began = time.perf_counter()
        while engine.has_work:
            before = time.perf_counter()
            done += engine.step()
            segments = plans[-1].segments
            taken += sum(segment.sampled for segment in segments)
            if len(segments) == len(prompts) and all(s.length == 1 for s in segments):
                self.whole.append(time.perf_counter() - before)
        self.seconds.append(time.perf_counter() - began)
        assembly.executor.launch = launch  # type: ignore[method-assign]
        assembly.scheduler.stays.proposer = proposer
        self.steps_a_row = taken / len(prompts)
        self.tokens_a_row = sum(len(each.token_ids) for each in done) / len(prompts)
        return sorted(done, key=lambda each: each.request.row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    ref = resolve(DEFAULT_MODEL, home() / "models")
    settings = Settings(str(ref.path), ref.name, ref.fingerprint, home() / "verdicts", device="cpu")
    texts = pq.read_table(ROOT / "examples" / "prompts.parquet")["prompt"].to_pylist()
    schema = constraint_of("json_schema", json.dumps(SCHEMA))
    ways = {
        "free": Way(None, drafts=False),
        "schema": Way(schema, drafts=False),
        "schema, drafts": Way(schema, drafts=True),
    }
    with build(settings, {"chat": True}, lambda line: print(line, file=sys.stderr)) as assembly:
        rows = (texts * -(-args.rows // len(texts)))[: args.rows]
        prompts = [assembly.encode({"prompt": text}) for text in rows]
        for number in range(args.repeat + 1):
            answers = {name: way.run(assembly, prompts) for name, way in ways.items()}
            if not number:  # it warms up
                for way in ways.values():
                    way.whole.clear()
                    way.seconds.clear()
        kernels = "+".join(assembly.kernels)
    plain, drafted = (
        [each.token_ids for each in answers[name]] for name in ("schema", "schema, drafts")
    )
    assert plain == drafted
    step = {name: statistics.median(way.whole) for name, way in ways.items() if way.whole}
    for name, way in ways.items():
        shown = f"{step[name] * 1e3:.2f} ms a step, " if name in step else ""
        print(
            f"{name:15} {shown}{way.steps_a_row:.1f} steps and {way.tokens_a_row:.1f} tokens a "
            f"row, {statistics.median(way.seconds):.2f} s"
        )
    report = {
        "benchmark": "shapes",
        "command": " ".join(["python", "-m", "benchmarks.shapes", *sys.argv[1:]]),
        "machine": description(),
        "date": f"{date.today()}",
        "kernels": kernels,
        "versions": {name: version(name) for name in ("torch", "llguidance")},
        "model": ref.name,
        "rows": args.rows,
        "step_ms": {name: seconds * 1e3 for name, seconds in step.items()},
        "steps_a_row": {name: way.steps_a_row for name, way in ways.items()},
        "tokens_a_row": {name: way.tokens_a_row for name, way in ways.items()},
        "seconds": {name: statistics.median(way.seconds) for name, way in ways.items()},
        "ratio": step["schema"] / step["free"],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
