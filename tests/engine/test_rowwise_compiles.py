"""The kernels of deterministic steps are compiled for GPUs, on a machine without one.

Nothing is loaded or run: that they are right, `tests/interpreted` shows.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from batchrun.engine.attention.triton_attention import PART, blocks_for
from batchrun.engine.model.rowwise import TILES

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no triton")

SHARED = {90: 227 << 10, 86: 99 << 10}  # bytes that a program can have
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


def compile_for(
    capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int
) -> Any:
    import triton  # noqa: PLC0415 - there may be none
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    signature = types | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or name.endswith(("_stride", "_token", "_slot", "_head"))
    }
    made = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    assert f".target sm_{capability}" in made.asm["ptx"]
    assert made.asm["cubin"].startswith(b"\x7fELF")
    return made


@pytest.mark.parametrize(
    ("capability", "dtype", "int8"),
    [*((90, dtype, False) for dtype in DTYPES), (90, "bf16", True), (86, "bf16", False)],
)
def test_linear_layers(capability: int, dtype: str, int8: bool) -> None:
    from batchrun.engine.model.linear_triton import kernel  # noqa: PLC0415

    tile = TILES[DTYPES[dtype]]
    types = {"x": f"*{dtype}", "weight": "*i8" if int8 else f"*{dtype}", "scales": "*fp32"}
    types |= {"bias": f"*{dtype}", "out": f"*{dtype}"}
    types |= dict.fromkeys(("tokens", "n", "x_stride"), "i32")
    constants = {"K": 4096, "BLOCK_N": tile.n, "BLOCK_T": tile.t, "BLOCK_K": tile.k}
    constants |= {"HAS_SCALES": int8, "HAS_BIAS": True}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = compile_for(capability, kernel, types, constants, **options)
    assert made.metadata.shared <= SHARED[capability]


@pytest.mark.parametrize(
    ("capability", "dtype", "k_dim", "v_dim"),
    [
        *((90, dtype, 128, 128) for dtype in DTYPES),
        (90, "bf16", 64, 64),
        (90, "bf16", 192, 128),
        (86, "bf16", 256, 256),
        (86, "fp32", 256, 256),
        (90, "bf16", 576, 512),
    ],
)
def test_attention(capability: int, dtype: str, k_dim: int, v_dim: int) -> None:
    from batchrun.engine.attention import triton_kernels  # noqa: PLC0415

    blocks = blocks_for(DTYPES[dtype], k_dim, v_dim)
    tensors = dict.fromkeys(("q", "k", "v", "out", "sinks"), f"*{dtype}")
    tensors |= {"partial": "*fp32", "items": "*i32", "segments": "*i32"}
    numbers = dict.fromkeys(("unit", "sink_unit", "cap", "cap_unit"), "fp32")
    strides = dict.fromkeys(
        ("q_token", "q_head", "k_slot", "k_token", "k_head", "v_slot", "v_token", "v_head"), "i32"
    )
    strides |= {"k_slot": "i64", "v_slot": "i64"}
    wide_k, wide_v = (1 << (width - 1).bit_length() for width in (k_dim, v_dim))
    shape = {"HEADS": 32, "GROUP": 4, "V_DIM": v_dim, "BLOCK_V": wide_v, "PART": PART}
    shape |= {"WINDOW": 4096, "CHUNK": 0, "HAS_SINKS": True}
    of_keys = {"K_DIM": k_dim, "BLOCK_K": wide_k, "BLOCK_M": blocks.m, "BLOCK_N": blocks.n}
    made = compile_for(
        capability,
        triton_kernels.attend,
        tensors | numbers | strides,
        shape | of_keys | {"CAPPED": True},
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    assert made.metadata.shared <= SHARED[capability]
    types = {name: tensors[name] for name in ("out", "partial", "sinks", "segments")}
    types |= {"unit": "fp32", "sink_unit": "fp32"}
    compile_for(capability, triton_kernels.combine, types, shape | {"BLOCK_G": 4})
