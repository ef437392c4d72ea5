"""What bfloat16 and weights of 8 bits change in a model's answers, and what they gain in speed.

    python -m benchmarks.quality

Real text (this project's own documents) is read by the model in float32, in bfloat16 and with
8-bit weights, each as `batchrun` computes it. Told are the perplexity of the text, how often the
likeliest next token is float32's, and the mean Kullback-Leibler divergence from float32's
distribution; then decode steps' tokens/s at two batch sizes, the types in turn.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line sets it

import torch
from torch.nn import functional

from batchrun.engine.build import Assembly, build
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.model.hook import HOOK
from batchrun.engine.settings import Settings
from batchrun.jobs.folder import home
from batchrun.machine import description
from batchrun.models.resolve import DEFAULT_MODEL, ModelRef, resolve

ROOT = Path(__file__).parents[1]
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
}
WINDOW, WINDOWS = 512, 16
SEQUENCES, STEPS, ROUNDS = (16, 128), 24, 3


def opened(ref: ModelRef, way: str) -> Assembly:
    """The engine, of one of the ways."""
    settings = Settings(
        *(str(ref.path), ref.name, ref.fingerprint, home() / "verdicts"),
        device="cpu",
        **WAYS[way],
    )
    return build(settings, {}, lambda line: print(line, file=sys.stderr))


def windows(runtime: Assembly) -> Iterator[torch.Tensor]:
    """Tokens of the documents, a window after the other."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))
    ids = runtime.loaded.tokenizer(text).input_ids
    for i in range(WINDOWS):
        yield torch.tensor(ids[i * WINDOW : (i + 1) * WINDOW])


@torch.inference_mode()
def log_probabilities(runtime: Assembly, ids: torch.Tensor) -> torch.Tensor:
    """Of each next token of a window, `[T, V]`."""
    logits = runtime.loaded.model(input_ids=ids[None], use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def speed(runtime: Assembly, sequences: int) -> float:
    """Tokens a second of decode steps."""
    params = SamplingParams(max_tokens=STEPS + 4, ignore_eos=True)
    for row in range(sequences):
        runtime.engine.add(Request(row, 0, tuple(range(row + 5, row + 69)), params, 0))
    engine, times = runtime.engine, []
    while engine.has_work:
        before, began = engine.stats.prefill_tokens, time.perf_counter()
        engine.step()
        if engine.stats.prefill_tokens == before:
            times.append(time.perf_counter() - began)
    return sequences / statistics.median(times[:STEPS])


def main() -> None:
    ref = resolve(DEFAULT_MODEL, home() / "models")
    runtimes = {way: opened(ref, way) for way in WAYS}
    sums = {way: torch.zeros(3, dtype=torch.float64) for way in WAYS}
    for runtime in runtimes.values():
        runtime.loaded.model.set_attn_implementation("eager")
    for ids in windows(runtimes["float32"]):
        exact = log_probabilities(runtimes["float32"], ids)
        for way, runtime in runtimes.items():
            got = log_probabilities(runtime, ids)
            sums[way] += torch.tensor(
                [
                    functional.nll_loss(got[:-1], ids[1:], reduction="sum"),
                    (got.argmax(-1) == exact.argmax(-1)).sum(),
                    functional.kl_div(got, exact, reduction="sum", log_target=True),
                ],
                dtype=torch.float64,
            )
    for runtime in runtimes.values():
        runtime.loaded.model.set_attn_implementation(HOOK)
    rates: dict[str, dict[int, list[float]]] = {w: {n: [] for n in SEQUENCES} for w in WAYS}
    for _ in range(ROUNDS):
        for way, runtime in runtimes.items():
            for n in SEQUENCES:
                rates[way][n].append(speed(runtime, n))
    tokens = WINDOW * WINDOWS
    ways = {
        way: {
            "perplexity": round(float((nll / (tokens - WINDOWS)).exp()), 3),
            "same_top": round(float(same / tokens), 4),
            "divergence": round(float(divergence / tokens), 6),
            "weights_mib": round(runtimes[way].loaded.weights_bytes / 2**20, 1),
            "tokens_per_s": {
                str(n): round(statistics.median(found), 1) for n, found in rates[way].items()
            },
        }
        for way, (nll, same, divergence) in sums.items()
    }
    for runtime in runtimes.values():
        runtime.close()
    for way, row in ways.items():
        print(f"{way:10}", *(f"{key} {value}" for key, value in row.items()), sep="  ")
    result = {
        "benchmark": "quality",
        "command": "python -m benchmarks.quality",
        "date": time.strftime("%Y-%m-%d"),
        "machine": description(),
        "torch": version("torch"),
        "model": Path(ref.name).name,
        "tokens": tokens,
        "ways": ways,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
