"""The same prompts through batchrun and through transformers' own two ways, in one run.

Greedy, one dtype, the same chat prompts and the same bound on new tokens, so that in float32 all
three compute the same completions; how many agree token for token is printed beside the speed. Each
way is measured several times, in turn, because machines are noisy; the median counts. The model is
loaded once and its loading is not counted, nor is tokenising.

    python benchmarks/throughput.py [--input examples/prompts.parquet] [--max-tokens 64]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow.parquet as pq
import torch
from transformers import GenerationConfig

from batchrun.engine.build import Assembly, build
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.model.loading import load
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.settings import Settings
from batchrun.jobs.folder import home
from batchrun.machine import description
from batchrun.models.resolve import DEFAULT_MODEL, resolve

Outputs = list[list[int]]


def run_batchrun(runtime: Assembly, prompts: Outputs, max_tokens: int) -> Outputs:
    params = SamplingParams(max_tokens=max_tokens)
    for row, ids in enumerate(prompts):
        runtime.engine.add(Request(row, 0, tuple(ids), params, 0))
    done: dict[int, list[int]] = {}
    while runtime.engine.has_work:
        for completion in runtime.engine.step():
            done[completion.request.row] = completion.token_ids
    return [done[row] for row in range(len(prompts))]


def run_generate(loaded: LoadedModel, prompts: Outputs, max_tokens: int, batch: int) -> Outputs:
    """`generate` over left-padded batches in file order, as its documentation shows."""
    model, eos = loaded.model, loaded.eos_ids
    model.set_attn_implementation("sdpa")
    pad = min(eos)
    done: Outputs = []
    for first in range(0, len(prompts), batch):
        chunk = prompts[first : first + batch]
        width = max(map(len, chunk))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in chunk])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chunk])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        done += [_cut(row, eos) for row in out[:, width:].tolist()]
    return done


def run_generate_batch(loaded: LoadedModel, prompts: Outputs, max_tokens: int) -> Outputs:
    """Transformers' own continuous batching."""
    model, eos = loaded.model, loaded.eos_ids
    model.set_attn_implementation("sdpa")
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(eos),
        pad_token_id=min(eos),
    )
    out = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    # Its answers are keyed by request names that end in the prompt's number.
    by_number = {int(name.rsplit("_", 1)[-1]): o.generated_tokens for name, o in out.items()}
    return [_cut(by_number[number], eos) for number in sorted(by_number)]


def _cut(ids: list[int], eos: frozenset[int]) -> list[int]:
    """Tokens up to and with the first end token."""
    for i, token in enumerate(ids):
        if token in eos:
            return ids[: i + 1]
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--input", default="examples/prompts.parquet")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="*", default=[16, 64], help="of generate")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="in others the ways' tokens may differ")
    args = parser.parse_args()

    ref = resolve(args.model, home() / "models")
    settings = Settings(str(ref.path), ref.name, ref.fingerprint, home() / "verdicts", args.dtype)
    texts = pq.read_table(args.input, columns=["prompt"])["prompt"].to_pylist()
    figures: dict[str, Any] = {}
    plain = load(str(ref.path), dtype=args.dtype)
    with build(settings, {"chat": True}, print) as runtime:
        prompts = [list(runtime.encode({"prompt": text})) for text in texts]
        ways: dict[str, Callable[[], Outputs]] = {
            "batchrun": lambda: run_batchrun(runtime, prompts, args.max_tokens),
            **{
                f"generate, batches of {size}": partial(
                    run_generate, plain, prompts, args.max_tokens, size
                )
                for size in args.batch
            },
            "generate_batch": lambda: run_generate_batch(plain, prompts, args.max_tokens),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        outputs: dict[str, Outputs] = {}
        for _ in range(args.repeat):
            for name, way in ways.items():
                began = time.perf_counter()
                outputs[name] = way()
                seconds[name].append(time.perf_counter() - began)
                print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
        held = runtime.usage.as_dict()
    tokens = sum(map(len, outputs["batchrun"]))
    print(f"{'':24} {'tokens/s':>9} {'seconds':>8} {'same completions':>17}")
    for name in ways:
        middle = statistics.median(seconds[name])
        count = sum(map(len, outputs[name]))
        same = sum(a == b for a, b in zip(outputs[name], outputs["batchrun"], strict=True))
        figures[name] = {
            "tokens_per_s": round(count / middle, 1),
            "seconds": [round(s, 2) for s in seconds[name]],
            "same_completions": same,
        }
        print(f"{name:24} {count / middle:9.1f} {middle:8.1f} {same:8} of {len(prompts)}")
    ours = figures["batchrun"]["tokens_per_s"]
    static = max(figures[name]["tokens_per_s"] for name in ways if "batches" in name)
    print(
        json.dumps(
            {
                "benchmark": "throughput",
                "command": " ".join(["python", *sys.argv]),
                "date": time.strftime("%Y-%m-%d"),
                "machine": description(),
                "torch": version("torch"),
                "transformers": version("transformers"),
                "model": Path(ref.name).name,
                "dtype": args.dtype,
                "rows": len(prompts),
                "completion_tokens": tokens,
                "utilisation": round(held["kv_live_s"] / held["kv_mapped_s"], 3),
                "ways": figures,
                "ratio_to_generate": round(ours / static, 2),
                "ratio_to_generate_batch": round(
                    ours / figures["generate_batch"]["tokens_per_s"], 2
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
