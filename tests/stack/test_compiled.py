"""What runs on a GPU is compiled for one by the real inductor, Triton and ptxas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from batchrun.engine.model.int8 import WIDEN_ABOVE, Tile, tile_for
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


DEVICES = {90: (132, 227 << 10), 86: (72, 99 << 10)}  # multiprocessors, and shared memory of each
TILES = {
    (capability, tile_for(tokens, n, *device))
    for capability, device in DEVICES.items()
    for tokens in range(1, WIDEN_ABOVE + 1)
    for n in (1024, 4096, 14336)
}


@pytest.mark.parametrize(
    ("capability", "tile"), sorted(TILES, key=repr), ids=lambda v: str(v).replace(" ", "")
)
def test_the_kernel_for_8_bit_weights_is_compiled_with_each_tile(
    capability: int, tile: Tile
) -> None:
    """For an H100, and for the least shared memory that a device has whose kernel it is."""
    import triton  # noqa: PLC0415 - there may be none
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    from batchrun.engine.model.linear_triton import kernel  # noqa: PLC0415

    for dtype, inner, bias in (("bf16", 4096, False), ("fp16", 100, True)):
        of_call = {"x": f"*{dtype}", "weight": "*i8", "scales": "*fp32", "bias": f"*{dtype}"}
        of_call |= {"out": f"*{dtype}", "tokens": "i32", "n": "i32", "x_stride": "i32"}
        constants = {"K": inner, "BLOCK_N": tile.n, "BLOCK_T": tile.t, "BLOCK_K": tile.k}
        constants |= {"HAS_SCALES": True, "HAS_BIAS": bias}
        signature = of_call | dict.fromkeys(constants, "constexpr")
        made = triton.compile(
            triton.compiler.ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )
        assert f".target sm_{capability}" in made.asm["ptx"]
        assert made.asm["cubin"].startswith(b"\x7fELF")
        assert made.metadata.shared <= DEVICES[capability][1]
