"""OpenVINO GenAI's `ContinuousBatchingPipeline`.

- Weights of 16 bits, computed in bfloat16 (`INFERENCE_PRECISION_HINT`), KV cache in bfloat16 too:
  its default of 8 bits would be another precision than the other peers'.
- `cache_size` 4 GB: room for every sequence of these workloads; prefix caching on.
- `dynamic_split_fuse` with 256 tokens a step: prompts are cut so that decodes never wait for them.
- The hint LATENCY is one stream on all cores, which is what one pipeline needs; THROUGHPUT, one
  for each core, ends in a floating point exception on two cores with 16-bit precision (2026.4.1).
- With `prompt_lookup`, 5 guesses after up to 3 tokens that came before, as its sample has it.
- The chat template is not applied: the prompts are the tokens that all other peers see.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openvino_genai as genai
from measure import main


class OpenVino:
    """A pipeline whose steps this drives itself, so that token counts can be seen."""

    def __init__(self, model: Path, device: str, options: dict[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        chosen = {
            "cache_size": 4,
            "max_num_batched_tokens": 256,
            "max_num_seqs": 256,
            "dynamic_split_fuse": True,
            "enable_prefix_caching": True,
            **options.pop("scheduler", {}),
        }
        for name, value in chosen.items():
            setattr(scheduler, name, value)
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16",
            "KV_CACHE_PRECISION": "bf16",
            **options,
        }
        self._guesses = properties.get("prompt_lookup", False)
        self.settings = {**chosen, **properties}
        self._pipe = genai.ContinuousBatchingPipeline(
            str(model), scheduler, device.upper(), properties
        )
        self._tokenizer = self._pipe.get_tokenizer()

    def run(self, prompts: Sequence[str], counts: Sequence[int]) -> list[int]:
        """Add all requests, step until none is left, detokenise."""
        configs = []
        for count in counts:
            config = genai.GenerationConfig()
            config.max_new_tokens = count
            config.ignore_eos = True
            config.apply_chat_template = False
            config.do_sample = False
            if self._guesses:
                config.num_assistant_tokens, config.max_ngram_size = 5, 3
            configs.append(config)
        handles = [
            self._pipe.add_request(number, prompt, config)
            for number, (prompt, config) in enumerate(zip(prompts, configs, strict=True))
        ]
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
        answers = [handle.read_all()[0].generated_ids for handle in handles]
        self._tokenizer.decode(answers)
        return [len(ids) for ids in answers]

    def close(self) -> None:
        """Nothing is left to end."""


if __name__ == "__main__":
    main(OpenVino, ["openvino-genai", "openvino"])
