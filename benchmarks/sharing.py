"""What sharing prefixes saves on a real model: a common prefix, samples, too little memory.

prefix    rows that begin with the same tokens, with sharing and without, in turn in one run
samples   several samples of each row: the memory of a prompt is there once
pressure  rows that need three times the memory there is: the same tokens, and few of them twice

python benchmarks/sharing.py [--parts prefix samples pressure] [--rows 256]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from batchrun.engine.build import Assembly
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.model.loading import load
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.settings import Settings
from batchrun.jobs.folder import home
from batchrun.machine import description
from batchrun.models.resolve import DEFAULT_MODEL, resolve

Ids = tuple[int, ...]


@dataclass
class Run:
    """One pass of a workload through an engine."""

    seconds: float
    outputs: dict[tuple[int, int], list[int]]
    figures: dict[str, Any]

    @property
    def mapped(self) -> float:
        """Bytes of pages held, averaged over time."""
        return float(self.figures["kv_mapped_s"] / self.figures["kv_s"])


def run(loaded: LoadedModel, settings: Settings, requests: Sequence[Request]) -> Run:
    with Assembly(loaded, settings) as made:
        began = time.perf_counter()
        for request in requests:
            made.engine.add(request)
        outputs = {}
        while made.engine.has_work:
            for completion in made.engine.step():
                request = completion.request
                outputs[request.row, request.sample] = completion.token_ids
        seconds = time.perf_counter() - began
        print(f"  {seconds:.1f} s", file=sys.stderr)
        return Run(seconds, outputs, made.measurements())


def tokens(rng: np.random.Generator, count: int) -> Ids:
    return tuple(rng.integers(1000, 40000, count).tolist())


def prefix(loaded: LoadedModel, settings: Settings, rows: int) -> dict[str, Any]:
    """Rows of one 600-token prefix and 8 to 40 tokens of their own, 64 at a time.

    So many run at once both ways. Were more allowed, sharing would run more.
    """
    rng = np.random.default_rng(1)
    common = tokens(rng, 600)
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    settings = replace(settings, max_num_seqs=64)
    prompts = [common + tokens(rng, int(rng.integers(8, 41))) for _ in range(rows)]
    requests = [Request(row, 0, ids, params, 0) for row, ids in enumerate(prompts)]
    shared = run(loaded, settings, requests)
    apart = run(loaded, replace(settings, share_prefixes=False), requests)
    least = len(common) + sum(len(ids) - len(common) for ids in prompts)
    same = sum(apart.outputs[key] == ids for key, ids in shared.outputs.items())
    return {
        "rows": rows,
        "seconds": shared.seconds,
        "seconds_without": apart.seconds,
        "tokens_per_s_ratio": apart.seconds / shared.seconds,
        "prefill_tokens": shared.figures["prefill_tokens"],
        "prefill_tokens_without": apart.figures["prefill_tokens"],
        "prefill_tokens_least": least,
        "kv_mapped_ratio": apart.mapped / shared.mapped,
        "peak_kv_mapped_ratio": apart.figures["peak_kv_mapped"] / shared.figures["peak_kv_mapped"],
        "same_completions": same,
    }


def samples(loaded: LoadedModel, settings: Settings, rows: int, n: int = 8) -> dict[str, Any]:
    """Eight samples of prompts of 512 tokens, all in flight at once."""
    rng = np.random.default_rng(2)
    params = SamplingParams(max_tokens=64, temperature=1.0, ignore_eos=True)
    prompts = [tokens(rng, 512) for _ in range(rows)]
    requests = [
        Request(row, s, ids, params, 0) for row, ids in enumerate(prompts) for s in range(n)
    ]
    done = run(loaded, replace(settings, max_num_seqs=rows * n), requests)
    # The last sampled token has no keys and values: nothing comes after it.
    ideal = rows * (512 + n * 63) * bytes_per_token(loaded)
    return {
        "rows": rows,
        "n": n,
        "prefill_tokens": done.figures["prefill_tokens"],
        "distinct_completions": len(set(map(tuple, done.outputs.values()))),
        "peak_kv_mapped": done.figures["peak_kv_mapped"],
        "ideal": ideal,
        "peak_to_ideal": done.figures["peak_kv_mapped"] / ideal,
        "utilisation": done.figures["kv_live_s"] / done.figures["kv_mapped_s"],
    }


def pressure(loaded: LoadedModel, settings: Settings, rows: int) -> dict[str, Any]:
    """Rows of which three times as many would run at once as memory holds."""
    rng = np.random.default_rng(3)
    lengths = rng.lognormal(3.2, 0.7, rows).clip(4, 96).astype(int)
    requests = [
        Request(row, 0, tokens(rng, 40), SamplingParams(max_tokens=int(n), ignore_eos=True), 0)
        for row, n in enumerate(lengths)
    ]
    ample = run(loaded, settings, requests)
    budget = ample.figures["peak_kv_mapped"] // 3
    short = run(loaded, replace(settings, kv_budget=budget), requests)
    computed = short.figures["prefill_tokens"] + short.figures["decode_tokens"]
    return {
        "rows": rows,
        "kv_budget": budget,
        "same_completions": sum(ample.outputs[key] == ids for key, ids in short.outputs.items()),
        "preemptions": short.figures["preemptions"],
        "recomputed_share": short.figures["recomputed_tokens"] / computed,
        "utilisation": short.figures["kv_live_s"] / short.figures["kv_mapped_s"],
        "seconds": short.seconds,
        "seconds_with_ample_memory": ample.seconds,
    }


def bytes_per_token(loaded: LoadedModel) -> int:
    return sum(s.kv_heads * (s.k_dim + s.v_dim) for s in loaded.layers) * loaded.dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--parts", nargs="*", default=["prefix", "samples", "pressure"])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rows", type=int, default=256, help="of prefix")
    parser.add_argument("--dtype", default="float32", help="in others tokens may differ")
    args = parser.parse_args()
    ref = resolve(args.model, home() / "models")
    settings = Settings(
        str(ref.path), ref.name, ref.fingerprint, home() / "verdicts", optimize=False
    )
    loaded = load(str(ref.path), name=ref.name, dtype=args.dtype)
    result: dict[str, Any] = {
        "benchmark": "sharing",
        "machine": description(),
        "model": ref.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "command": "python benchmarks/sharing.py",
    }
    for name, part in (
        ("prefix", lambda: prefix(loaded, settings, args.rows)),
        ("samples", lambda: samples(loaded, settings, 8)),
        ("pressure", lambda: pressure(loaded, settings, 96)),
    ):
        if name in args.parts:
            print(name, file=sys.stderr)
            result[name] = part()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
