"""The product of activations and weights in Triton (Tillet et al. 2019).

Only `int8.launch` imports this file, and only if Triton is installed. Weights are the first
operand, so that those of 8 bits are widened in registers, on their way from memory to the tensor
cores.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0917 - types and calls are Triton's
    x,
    weight,
    scales,
    bias,
    out,
    tokens,
    n,
    x_stride,
    K: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_T: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    HAS_SCALES: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
):
    """`out[t, n] = sum over k of x[t, k] * weight[n, k], times scales[n], plus bias[n]`.

    Each program computes BLOCK_N rows of weights and BLOCK_T tokens. Past the end it repeats the
    last row or token, and does not store the result. The sums of an element are added up in one
    order, which depends on the block sizes alone: not on `tokens`, nor on the token's place.
    """
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inner = tl.arange(0, BLOCK_K)
    row, token = tl.minimum(rows, n - 1), tl.minimum(places, tokens - 1)
    weight_at = weight + row.to(tl.int64)[:, None] * K + inner[None, :]
    x_at = x + token.to(tl.int64)[None, :] * x_stride + inner[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            w = tl.load(weight_at)
            v = tl.load(x_at)
        else:
            w = tl.load(weight_at, mask=inner[None, :] < K - start, other=0)
            v = tl.load(x_at, mask=inner[:, None] < K - start, other=0.0)
        sums = tl.dot(w.to(v.dtype), v, sums, input_precision="ieee")  # of float32: never TF32
        weight_at += BLOCK_K
        x_at += BLOCK_K
    if HAS_SCALES:
        sums *= tl.load(scales + row)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias + row).to(tl.float32)[:, None]
    out_at = out + places.to(tl.int64)[:, None] * n + rows[None, :]
    inside = (places < tokens)[:, None] & (rows < n)[None, :]
    tl.store(out_at, tl.trans(sums).to(out.dtype.element_ty), mask=inside)


# One compilation serves any number of tokens.
kernel = triton.jit(_kernel, do_not_specialize=["tokens"])
