"""Transformers' own two ways: `generate` over static batches, and `generate_batch`.

Static batches are at their best here: rows sorted by how long their answers will be, which a user
does not know ahead, so that few sequences of a batch wait for its longest; SDPA; bfloat16. In
batches of 64: on two cores with AMX a step at 100 tokens of context takes 85 ms with 16 sequences,
102 ms with 32, 156 ms with 64, which is 190, 310 and 410 tokens/s. `torch.compile` is left out: its
documentation pairs it with a static cache, whose shapes change with every batch of these files.

`generate_batch` is continuous batching; its manager is started once, as for a service, and not
counted. On a CPU its defaults take nine tenths of the memory and make steps of up to 8,192 tokens,
which warm up for half a minute: here it has pages for 65,536 tokens and 256 tokens a step, as
OpenVINO has. On a GPU it has its defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import main
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

_ON_CPU = {"page_size": 256, "num_blocks": 256, "max_batch_tokens": 256}


class Transformers:
    """A model and its tokenizer."""

    def __init__(self, model: Path, device: str, options: dict[str, Any]) -> None:
        self._continuous = options.pop("continuous", False)
        self._batch = options.pop("batch", 64)
        self._device = device
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).to(device)
        self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self._tokenizer.pad_token_id = self._tokenizer.eos_token_id
        self.settings = {"dtype": "bfloat16", "attention": "sdpa"}
        if self._continuous:
            chosen = {**(_ON_CPU if device == "cpu" else {}), **options}
            self._manager = self._model.init_continuous_batching(
                generation_config=self._config(max_new_tokens=2048),
                continuous_batching_config=ContinuousBatchingConfig(**chosen),
            )
            self._manager.warmup()
            self._manager.start()
            self.settings |= chosen
        else:
            self.settings |= {"batch": self._batch, "sorted": True}

    def run(self, prompts: Sequence[str], counts: Sequence[int]) -> list[int]:
        """Tokenise, generate, detokenise."""
        ways = self._by_request if self._continuous else self._static
        return ways(prompts, counts)

    @torch.inference_mode()
    def _static(self, prompts: Sequence[str], counts: Sequence[int]) -> list[int]:
        made = [0] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda row: (counts[row], len(prompts[row])))
        for first in range(0, len(order), self._batch):
            rows = order[first : first + self._batch]
            inputs = self._tokenizer(
                [prompts[row] for row in rows], return_tensors="pt", padding=True
            ).to(self._device)
            most = max(counts[row] for row in rows)
            config = self._config(max_new_tokens=most, min_new_tokens=most)
            output = self._model.generate(**inputs, generation_config=config)
            answers = output[:, inputs["input_ids"].shape[1] :].tolist()
            answers = [ids[: counts[row]] for row, ids in zip(rows, answers, strict=True)]
            self._tokenizer.batch_decode(answers)
            for row, ids in zip(rows, answers, strict=True):
                made[row] = len(ids)
        return made

    def _by_request(self, prompts: Sequence[str], counts: Sequence[int]) -> list[int]:
        inputs = self._tokenizer(list(prompts))["input_ids"]
        answers: dict[str, list[int]] = {}
        for number, (ids, count) in enumerate(zip(inputs, counts, strict=True)):
            self._manager.add_request(ids, request_id=str(number), max_new_tokens=count)
        while len(answers) < len(prompts):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.error is not None:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                answers[result.request_id] = result.generated_tokens
            elif result is None and not self._manager.is_running():
                raise RuntimeError("the generation thread ended early")
        self._tokenizer.batch_decode(list(answers.values()))
        return [len(answers[str(number)]) for number in range(len(prompts))]

    def _config(self, **lengths: int) -> GenerationConfig:
        config = GenerationConfig(do_sample=False, pad_token_id=0, **lengths)
        config.eos_token_id = -1 if self._continuous else None  # every row makes all its tokens
        return config

    def close(self) -> None:
        """End the generation thread."""
        if self._continuous:
            self._manager.stop(block=True)


if __name__ == "__main__":
    main(Transformers, ["transformers", "torch"])
