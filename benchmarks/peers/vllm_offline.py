"""vLLM's `LLM.generate`, at what its CPU documentation recommends for offline inference.

- `VLLM_CPU_OMP_THREADS_BIND` names all cores: "auto" keeps one of them for the scheduler's process,
  which is half of a machine with two.
- tcmalloc and Intel's OpenMP are preloaded, as its installation page for x86 says.
- `VLLM_CPU_KVCACHE_SPACE` is 4 GiB: room for every sequence of these workloads at once.
- bfloat16, prefix caching and chunked prefill (its defaults), compiled by inductor (its default);
  compiling happens while the model is loaded and warmed up, and is not counted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from measure import main, with_environment

_TCMALLOC = (
    "/usr/lib/*/libtcmalloc_minimal.so.4",
    f"{sys.prefix}/usr/lib/*/libtcmalloc_minimal.so.4",
)


class Vllm:
    """An `LLM`, whose engine runs in processes of its own."""

    def __init__(self, model: Path, device: str, options: dict[str, Any]) -> None:
        if device == "cpu":
            cores = sorted(os.sched_getaffinity(0))
            preload = [found[0] for p in _TCMALLOC if (found := glob(p))][:1]
            with_environment(
                {
                    "VLLM_CPU_OMP_THREADS_BIND": options.pop("bind", ",".join(map(str, cores))),
                    "VLLM_CPU_KVCACHE_SPACE": str(options.pop("kv_gib", 4)),
                    "LD_PRELOAD": ":".join([*preload, f"{sys.prefix}/lib/libiomp5.so"]),
                    "VLLM_NO_USAGE_STATS": "1",
                    "HF_HUB_OFFLINE": "1",
                }
            )
        from vllm import LLM  # noqa: PLC0415 - reads the environment

        self.settings = {
            "dtype": "bfloat16",
            **{k: v for k, v in os.environ.items() if k.startswith("VLLM_CPU")},
            "LD_PRELOAD": [Path(p).name for p in os.environ.get("LD_PRELOAD", "").split(":") if p],
            **options,
        }
        self._llm = LLM(str(model), dtype="bfloat16", max_model_len=2048, **options)

    def run(self, prompts: Sequence[str], counts: Sequence[int]) -> list[int]:
        """One call with all prompts, each with its own parameters."""
        from vllm import SamplingParams  # noqa: PLC0415

        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in counts]
        outputs = self._llm.generate(list(prompts), params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Its processes end with this one."""


if __name__ == "__main__":
    main(Vllm, ["vllm-cpu", "torch", "transformers"])
