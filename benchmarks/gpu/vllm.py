"""The job part's load through vLLM, its weights random too."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.job import settings_of
from benchmarks.gpu.shapes import Load, config, prompt

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Tokens a second; compiling and graph capture come before the clock."""
    from vllm import LLM, SamplingParams, __version__  # noqa: PLC0415 - optional

    shape, load = bench.shape("qwen3-0.6b"), Load()
    wanted = config(shape)
    wanted.architectures = [_ARCHITECTURES[shape.family]]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        wanted.save_pretrained(folder)
        engine = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enable_prefix_caching=False,
            **settings_of(bench, load),
        )
    lengths = load.lengths()
    prompts = [
        {"prompt_token_ids": list(prompt(size, shape.vocab, row))}
        for row, (size, _) in enumerate(lengths)
    ]
    greedy = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    engine.generate(prompts, SamplingParams(max_tokens=8, **greedy), use_tqdm=False)
    yield {"version": __version__, "ready_s": time.perf_counter() - began}
    each = [SamplingParams(max_tokens=out, **greedy) for _, out in lengths]
    began = time.perf_counter()
    answers = engine.generate(prompts, each, use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    yield {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds}
