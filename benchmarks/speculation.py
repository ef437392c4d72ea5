"""What draft tokens gain: jobs without them, with those from a row's own text, and with all.

    python -m benchmarks.speculation [--workloads extract chat ...] [--share 1.0] [--repeat 3]

Every workload is answered in several ways, in turn: without draft tokens; with those that the row's
own text suggests; where answers have a shape, also with what that forces; and, as jobs are by
default, with those from other rows' answers, too. Each run begins knowing nothing: the table of
answers is empty, no step was measured. The answers must be the same, token by token.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line sets it

import numpy as np
import pyarrow.parquet as pq

from batchrun.engine.build import Assembly, build
from batchrun.engine.constraints import Constraints
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.settings import Settings
from batchrun.engine.speculation.cost import StepCost
from batchrun.engine.speculation.speculator import Speculator
from batchrun.engine.speculation.table import AnswerTable
from batchrun.grammars.constraint import constraint_of
from batchrun.jobs.folder import home
from batchrun.machine import description
from batchrun.models.resolve import DEFAULT_MODEL, resolve
from benchmarks.ads import SCHEMA, TASK, ads
from benchmarks.workloads import WORKLOADS, generate

ROOT = Path(__file__).parent.parent
WAYS = ("off", "own text", "own text and shape", "all")
Encode = Callable[..., tuple[int, ...]]
Made = Iterator[tuple[str, int, SamplingParams]]  # prompts, samples of each, parameters


def extract() -> Made:
    """Advertisements to be read into a JSON schema."""
    params = SamplingParams(120, constraint=constraint_of("json_schema", json.dumps(SCHEMA)))
    for text, _ in islice(ads(np.random.default_rng(0)), 128):
        yield f"{TASK}\n\n{text}", 1, params


def extract_freely() -> Made:
    """The same, as the model likes to answer."""
    for text, _ in islice(ads(np.random.default_rng(1)), 96):
        yield f"{TASK}\n\n{text}", 1, SamplingParams(100)


def _questions() -> list[str]:
    texts: list[str] = pq.read_table(ROOT / "examples" / "prompts.parquet")["prompt"].to_pylist()
    return texts


def chat() -> Made:
    """The prompts of the examples, greedily."""
    for text in _questions():
        yield text, 1, SamplingParams(200)


def samples() -> Made:
    """A quarter of them, eight samples each at temperature 0.8."""
    for text in _questions()[::4]:
        yield text, 8, SamplingParams(100, temperature=0.8)


CHATS = {"extract": extract, "extract freely": extract_freely, "chat": chat, "samples": samples}
PLAIN = [name for name in WORKLOADS if name != "extract"]


def requests(name: str, share: float, assembly: Assembly, chats: Encode) -> list[Request]:
    """A workload's requests."""
    made: list[Request] = []
    if name in CHATS:
        rows = list(CHATS[name]())
        for row, (text, count, params) in enumerate(rows[: max(1, round(share * len(rows)))]):
            ids = chats({"prompt": text})
            made += [Request(row, sample, ids, params, 0) for sample in range(count)]
        return made
    whole = WORKLOADS[name][1]
    for row, each in enumerate(generate(name, max(1, round(share * whole)))):
        params = SamplingParams(each.max_tokens, ignore_eos=True)
        made.append(Request(row, 0, assembly.encode({"prompt": each.prompt}), params, 0))
    return made


@dataclass
class Way:
    """What was measured of a way to answer."""

    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    saved_s: float = 0.0

    def run(self, assembly: Assembly, wanted: list[Request], name: str) -> list[tuple[int, ...]]:
        """Answer all requests; returns their tokens."""
        engine, default = assembly.engine, assembly.scheduler.stays.proposer
        assert isinstance(default, Speculator)
        made = Speculator(
            default.num_logits,
            StepCost(default.cost.free),
            default.constraints,
            AnswerTable() if name == "all" else None,
        )
        assembly.scheduler.stays.proposer = None if name == "off" else made
        forces = name != "own text"
        before = engine.stats.steps, engine.stats.drafted_tokens, engine.stats.accepted_tokens
        for request in wanted:
            engine.add(request)
        done = []
        began = time.perf_counter()
        with nullcontext() if forces else patch.object(Constraints, "forced", lambda *_: []):
            while engine.has_work:
                done += engine.step()
        self.seconds.append(time.perf_counter() - began)
        assembly.scheduler.stays.proposer = default
        self.steps = engine.stats.steps - before[0]
        self.drafted = engine.stats.drafted_tokens - before[1]
        self.accepted = engine.stats.accepted_tokens - before[2]
        self.saved_s = made.measurements()["drafts_saved_s"]
        done.sort(key=lambda each: (each.request.row, each.request.sample))
        return [each.token_ids for each in done]


def measured(
    name: str, assembly: Assembly, chats: Encode, args: argparse.Namespace
) -> dict[str, Any]:
    """One workload in all ways, in turn."""
    wanted = requests(name, args.share, assembly, chats)
    shaped = any(request.params.constraint for request in wanted)
    names = [way for way in WAYS if shaped or way != "own text and shape"]
    ways = {way: Way() for way in names}
    tokens = 0
    Way().run(assembly, wanted[:16], "off")  # it warms up
    for number in range(args.repeat):
        # Each begins in turn, as a machine's speed drifts.
        order = names[number % len(names) :] + names[: number % len(names)]
        answers = {way: ways[way].run(assembly, wanted, way) for way in order}
        assert all(found == answers["off"] for found in answers.values()), f"{name}: other answers"
        tokens = sum(map(len, answers["off"]))
        speeds = ", ".join(f"{way} {tokens / ways[way].seconds[-1]:.0f}" for way in names)
        print(f"{name}, {number + 1}: tokens/s {speeds}", file=sys.stderr, flush=True)
    middle = {way: statistics.median(ways[way].seconds) for way in names}
    return {
        "answers": len(wanted),
        "tokens": tokens,
        "ways": {way: vars(ways[way]) for way in names},
        "tokens_per_s": {way: tokens / middle[way] for way in names},
        "over_off": middle["off"] / middle["all"],
        "over_own_text": middle["own text"] / middle["all"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    names = [*CHATS, *PLAIN]
    parser.add_argument("--workloads", nargs="*", choices=names, default=names)
    parser.add_argument("--share", type=float, default=1.0, help="of each workload's rows")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int)
    args = parser.parse_args()
    ref = resolve(DEFAULT_MODEL, home() / "models")
    settings = Settings(
        *(str(ref.path), ref.name, ref.fingerprint, home() / "verdicts"),
        dtype="bfloat16",
        device="cpu",
        max_num_seqs=args.max_num_seqs,
    )

    def log(line: str) -> None:
        print(line, file=sys.stderr)

    with build(settings, {"chat": True}, log) as other:
        chats = other.encode
    found: dict[str, Any] = {}
    with build(settings, {}, log) as assembly:
        gc.freeze()  # as a job does
        for name in args.workloads:
            found[name] = measured(name, assembly, chats, args)
        kernels = "+".join(assembly.kernels)
    print(f"{'':16} {'tokens/s':>9} {'over off':>9} {'over own text':>14}")
    for name, each in found.items():
        speed = each["tokens_per_s"]["all"]
        print(f"{name:16} {speed:9.0f} {each['over_off']:8.2f}x {each['over_own_text']:13.2f}x")
    report = {
        "benchmark": "speculation",
        "command": " ".join(["python", "-m", "benchmarks.speculation", *sys.argv[1:]]),
        "machine": description(),
        "date": f"{date.today()}",
        "kernels": kernels,
        "versions": {"torch": version("torch")},
        "model": ref.name,
        "workloads": found,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
