"""The job part's load through transformers' own continuous batching."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.utils import logging

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import TOY_LOAD, Load, build, prompt

_SPARE = 12.0  # seconds to stop the manager and write the figures down


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Tokens a second; where it is too slow to end in time, of what it did until then.

    `generate_batch` gives every request the same bound on new tokens, so its manager is fed here
    as it feeds it, with each request's own. Compiling and graph capture come before the clock.
    """
    logging.set_verbosity_error()
    shape, load = bench.shape("qwen3-0.6b"), TOY_LOAD if bench.toy else Load()
    model = build(shape, bench.device)
    model.set_attn_implementation("sdpa")
    config = GenerationConfig(
        max_new_tokens=load.longest, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # On a CPU it would take most of the machine's memory.
    small = {"num_blocks": 64, "max_batch_tokens": 64} if bench.toy else {}
    hints = WorkloadHints(load.longest, load.longest, load.requests)
    with model.continuous_batching_context_manager(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(**small),
        workload_hints=hints,
        timeout=5,
    ) as manager:
        # With a manager of its own it switches to flash attention where that is installed.
        yield {"attention": model.config._attn_implementation}
        began = time.perf_counter()
        for row, (size, out) in enumerate(load.lengths()):
            ids = list(prompt(size, shape.vocab, row))
            manager.add_request(ids, max_new_tokens=out, eos_token_id=-1)
        done: dict[str, int] = {}
        while len(done) < load.requests and manager.is_running() and bench.left > _SPARE:
            result = manager.get_result(timeout=0.2)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"generate_batch failed: {result.error}")
                done[result.request_id] = len(result.generated_tokens)
        seconds = time.perf_counter() - began
        running = list(manager.batch_processor.scheduler.active_requests.values())
        unfinished = sum(len(state.generated_tokens) for state in running)
        tokens = sum(done.values()) + unfinished
        yield {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "finished": len(done) == load.requests,
            "requests_done": len(done),
        }
