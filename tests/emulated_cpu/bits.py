"""Prints a hash of what native code computes in float32: layers, norms, attention, whole models."""

from __future__ import annotations

import hashlib

import torch

from batchrun.engine.core import SamplingParams
from batchrun.engine.cpu.linear import NativeLinear, rms_norm
from batchrun.engine.model.optimize import optimize
from batchrun.engine.model.prepare import prepare
from tests.engine.test_cpu_layers import NATIVE, made
from tests.parity.runner import rig, run
from tests.parity.test_generate import prompts


def main() -> None:
    seen = hashlib.sha256()

    def note(tensor: torch.Tensor) -> None:
        seen.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())

    torch.manual_seed(1)
    params = SamplingParams(max_tokens=12, temperature=0.8, scored=True, ignore_eos=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(70, 1536).to(dtype)
        with torch.inference_mode():
            note(NativeLinear(torch.nn.Linear(1536, 70).to(dtype), dtype)(x))
            note(rms_norm(x, torch.randn(1536), 1e-5))
        for name in ("biases", "qwen3", "mistral"):
            loaded = prepare(made(NATIVE[name], dtype))
            optimize(loaded.model, compile=False, log=print)
            with rig(loaded, attention="native") as engine:
                for done in run(engine, prompts()[:6], params):
                    seen.update(repr((done.token_ids, done.logprob)).encode())
    print(seen.hexdigest())


if __name__ == "__main__":
    main()
