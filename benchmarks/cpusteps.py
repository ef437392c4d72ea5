"""Where a CPU's time goes: steps against the roofline model, and what lies outside the forward.

    python -m benchmarks.cpusteps [--workload decode-heavy] [--rows 96]

The roofline model is that of docs/performance.md: weights once a step and the keys and values that
attention reads over the measured bandwidth, or operations over the measured matrix rate, whichever
takes longer. Both ceilings are measured before and after each run, and the better one counts.
The model is one of steps that compute one token a row, and so do these; then the same rows run with
draft tokens, as jobs do by default, and that time too is set against the model of these steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line sets it

import torch

from batchrun.engine.build import Assembly, build
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.cpu import library
from batchrun.engine.cpu.linear import NativeLinear
from batchrun.engine.plan import StepPlan
from batchrun.engine.settings import Settings
from batchrun.jobs.folder import home
from batchrun.machine import description
from batchrun.models.resolve import DEFAULT_MODEL, ModelRef, resolve
from benchmarks.gpu.roofline import Ceilings, Span, Work, work
from benchmarks.gpu.shapes import Shape
from benchmarks.workloads import WORKLOADS, Row, generate


def ceilings() -> Ceilings:
    """Bytes a second that all cores read, and bf16 operations a second of a square product."""
    memory = torch.ones(1 << 29, dtype=torch.uint8).view(torch.int64)
    reading = min(_timed(memory.sum) for _ in range(5))
    side, rates = 2048, []
    x = torch.randn(side, side).bfloat16()
    linear = torch.nn.Linear(side, side, bias=False).bfloat16()
    products: list[torch.nn.Module] = [linear]
    if library.unsupported_reason(torch.bfloat16) is None:
        products.append(NativeLinear(linear, torch.bfloat16))
    for product in products:
        rates.append(2 * side**3 / min(_timed(lambda p=product: p(x)) for _ in range(8)))
    return Ceilings(memory.nbytes / reading, max(rates))


def _timed(call: Any) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        call()
    return time.perf_counter() - began


@dataclass
class Timed:
    """One step: its seconds, those of the forward in it, and what it had to do."""

    seconds: float
    forward: float
    work: Work
    decodes: bool  # and nothing else


class Watch:
    """Steps an engine and times it."""

    def __init__(self, runtime: Assembly) -> None:
        self.steps: list[Timed] = []
        self._engine = runtime.engine
        self._shape = _shape(runtime)
        executor: Any = runtime.executor
        self._launch, self._forward = executor.launch, executor._forward
        executor.launch, executor._forward = self._note, self._time
        self._in_forward = 0.0
        self._plan: StepPlan | None = None

    def _time(self, *args: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._forward(*args)
        finally:
            self._in_forward += time.perf_counter() - began

    def _note(self, plan: StepPlan) -> Any:
        self._plan = plan
        return self._launch(plan)

    def step(self) -> None:
        """Let the engine take one."""
        self._in_forward, self._plan = 0.0, None
        began = time.perf_counter()
        self._engine.step()
        seconds = time.perf_counter() - began
        if self._plan:
            spans = [Span(s.start, s.length, s.sampled) for s in self._plan.segments]
            decodes = all(span.length == 1 for span in spans)
            must = work(self._shape, spans)
            self.steps.append(Timed(seconds, self._in_forward, must, decodes))


def figures(steps: list[Timed], best: Ceilings) -> dict[str, float]:
    """What a run's steps were, as shares and seconds."""
    seconds = sum(s.seconds for s in steps)
    decodes = [s for s in steps if s.decodes]
    in_decodes = sum(s.seconds for s in decodes)
    return {
        "steps": len(steps),
        "seconds": seconds,
        "of_roofline": sum(s.work.seconds(best) for s in steps) / seconds,
        "of_roofline_decodes": sum(s.work.seconds(best) for s in decodes) / in_decodes,
        "outside_forward": 1 - sum(s.forward for s in steps) / seconds,
        "outside_forward_decodes": 1 - sum(s.forward for s in decodes) / in_decodes,
        "read_gb_per_s": sum(s.work.bytes for s in decodes) / in_decodes / 1e9,
    }


def repeated(
    ref: ModelRef, rows: list[Row], repeat: int, *, drafts: bool
) -> tuple[list[list[Timed]], list[Ceilings]]:
    """The steps of some runs after one that warms up, and the ceilings around them."""
    settings = Settings(
        *(str(ref.path), ref.name, ref.fingerprint, home() / "verdicts"),
        dtype="bfloat16",
        device="cpu",
        drafts=drafts,
    )
    measured, runs = [ceilings()], []
    with build(settings, {}, lambda line: print(line, file=sys.stderr)) as runtime:
        watch = Watch(runtime)
        for _ in range(repeat + 1):
            watch.steps = []
            for i, row in enumerate(rows):
                ids = tuple(runtime.encode({"prompt": row.prompt}))
                params = SamplingParams(max_tokens=row.max_tokens, ignore_eos=True)
                runtime.engine.add(Request(i, 0, ids, params, 0))
            while runtime.engine.has_work:
                watch.step()
            runs.append(watch.steps)
            measured.append(ceilings())
    return runs[1:], measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--workload", default="decode-heavy", choices=list(WORKLOADS))
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    args = parser.parse_args()
    ref = resolve(args.model, home() / "models")
    rows = list(generate(args.workload, args.rows, 0))
    alone, measured = repeated(ref, rows, args.repeat, drafts=False)
    drafting, more = repeated(ref, rows, args.repeat, drafts=True)
    measured += more
    best = Ceilings(max(c.bandwidth for c in measured), max(c.matrix for c in measured))
    each = [figures(steps, best) for steps in alone]
    middle = {key: statistics.median(run[key] for run in each) for key in each[0]}
    tokens = sum(row.max_tokens for row in rows)
    drafted = statistics.median(sum(step.seconds for step in steps) for steps in drafting)
    middle["tokens_per_s"] = tokens / middle["seconds"]
    middle["drafting_tokens_per_s"] = tokens / drafted
    middle["drafting_of_roofline"] = middle["of_roofline"] * middle["seconds"] / drafted
    for key, value in middle.items():
        print(f"{key:24} {value:10.4g}")
    result = {
        "benchmark": "cpusteps",
        "command": " ".join(["python", "-m", "benchmarks.cpusteps", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": description(),
        "torch": version("torch"),
        "model": Path(ref.name).name,
        "workload": args.workload,
        "rows": args.rows,
        "bandwidth": best.bandwidth,
        "matrix": best.matrix,
        **{key: round(value, 4) for key, value in middle.items()},
    }
    print(json.dumps(result))


def _shape(runtime: Assembly) -> Shape:
    config = runtime.loaded.model.config
    return Shape(
        name=config.model_type,
        family="llama",
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        q_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=runtime.loaded.layers[0].k_dim,
        vocab=config.vocab_size,
        tied=True,
        rope_theta=0.0,
        context=runtime.loaded.max_model_len,
    )


if __name__ == "__main__":
    main()
