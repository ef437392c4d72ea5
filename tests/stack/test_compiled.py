"""Decoder layers are compiled to sm_90 code by the real inductor, Triton and ptxas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.test_docs import ROOT

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.parametrize(
    "model",
    [
        ["llama-3-8b"],
        ["qwen3-0.6b"],
        ["qwen3-0.6b", "--int8"],
        ["gemma3"],  # norms in float32
        ["gpt-oss-sinks"],  # experts with biases
        ["deepseek-mla"],  # latent attention, shared experts
    ],
    ids="".join,
)
def test_layers_are_compiled_for_a_hopper_gpu(model: list[str], tmp_path: Path) -> None:
    caches = {f"{name}_CACHE_DIR": str(tmp_path / name) for name in ("TORCHINDUCTOR", "TRITON")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.stack.sm90", *model],
        cwd=ROOT,
        env=os.environ | caches,  # what was compiled before would not be compiled again
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *kernels, outcome = map(json.loads, done.stdout.splitlines())
    assert outcome["log"] == []
    assert "compiled layers" in outcome["optimised"]
    assert len({kernel["kernel"] for kernel in kernels}) >= 5
