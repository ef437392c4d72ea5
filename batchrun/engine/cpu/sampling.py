"""Sampling over whole vocabularies on a CPU, by sampling.cpp.

A token's weight is an integer, so sums are exact and a row's draw depends only on its logits, its
parameters and its random number. Without a compiler, numpy computes the same weights and draws the
same tokens, about twenty times slower.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from batchrun.engine.core import SamplingParams
from batchrun.engine.cpu import compile as compiled
from batchrun.engine.cpu.compile import CompileError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_SOURCE = Path(__file__).with_name("sampling.cpp")
_BITS = 44  # the highest logit weighs 2^44; one that is more than 30.5 lower weighs 0
_LOWEST = np.float32(-30.5)
AS_IT_IS = SamplingParams(temperature=1.0)  # draws from all logits
_TERMS = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it can't be compiled."""
    try:
        return compiled.load(_SOURCE)
    except CompileError:
        return None


def draw(
    logits: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]
) -> torch.Tensor:
    """Draw a token from each row of `[N, V]`, inverting its distribution at a number in [0, 1).

    Logits are divided by the temperature, then filtered by top-k, top-p and min-p, in this order.
    If the temperature is so low that float32 overflows, a row gets its most likely token.

    Returns:
        `[N]` int64; -1 if a logit is NaN or +inf, or none is finite.
    """
    logits = _readable(logits)
    columns = np.array(
        [
            [number, p.temperature, p.top_p, _log(p.min_p), p.top_k or logits.shape[1]]
            for p, number in zip(params, numbers, strict=True)
        ]
    )
    native = library()
    if native is None:
        rows = zip(logits, params, numbers, strict=True)
        return torch.tensor([_invert(weights(row, p), number) for row, p, number in rows])
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    native.batchrun_draw(*_rows(logits), columns.ctypes, _at(tokens), _threads())
    return tokens


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The first of the highest logits of each row, `[N, V]` to `[N]` int64.

    It is -1 if the highest is infinite or any logit is NaN.
    """
    native = library() if logits.dtype == torch.bfloat16 else None
    if native is None or not hasattr(native, "batchrun_argmax"):  # it needs AVX-512
        highest, tokens = logits.max(dim=-1)  # argmax takes four times as long
        return torch.where(highest.isfinite(), tokens, -1)
    logits = logits.contiguous()
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    sizes = map(ctypes.c_int64, logits.shape)
    native.batchrun_argmax(_at(logits), *sizes, _at(tokens), _threads())
    return tokens


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of each row, `[N, V]` to `[N]` float32."""
    native = library()
    if native is None:
        sums = [np.ldexp(np.float64(weights(row, AS_IT_IS).sum()), -_BITS) for row in logits]
        with np.errstate(divide="ignore"):
            return (logits.amax(dim=-1).double() + torch.from_numpy(np.log(sums))).float()
    logits = _readable(logits)
    found = logits.new_empty(len(logits), dtype=torch.float32)
    native.batchrun_logsumexp(*_rows(logits), _at(found), _threads())
    return found


def penalise(
    logits: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    penalties: torch.Tensor,
    *,
    counts: torch.Tensor,
    prompt: torch.Tensor,
) -> bool:
    """Penalise some rows of float32 `[N, V]` in place; False if native code can't.

    Args:
        logits: All rows; native code needs them contiguous.
        rows: `[M]`, the rows to penalise.
        slots: `[M]`, their slots in `counts` and `prompt`.
        penalties: `[3, M]` float32: repetition, presence, frequency.
        counts: `[num_slots, V]` int32, how often each token is in the output.
        prompt: `[num_slots, V]` bool, whether each token is in the prompt.
    """
    native = library()
    if native is None or not logits.is_contiguous():
        return False
    places = (_at(tensor) for tensor in (rows, slots, penalties, counts, prompt))
    sizes = (ctypes.c_int64(n) for n in (logits.shape[1], len(rows)))
    native.batchrun_penalise(_at(logits), *sizes, *places, _threads())
    return True


def mask(logits: torch.Tensor, rows: NDArray[np.int64], bits: NDArray[np.uint32]) -> bool:
    """Apply masks to some rows of `[N, V]` in place; False if native code can't.

    Args:
        logits: All rows; native code needs them contiguous, in float32 or bfloat16.
        rows: `[M]`, the rows.
        bits: `[M, words]`: see `batchrun.engine.plan.Masks`.
    """
    native, known = library(), logits.dtype in (torch.float32, torch.bfloat16)
    if native is None or not known or not logits.is_contiguous():
        return False
    sizes = ctypes.c_int64(logits.shape[1]), ctypes.c_int64(len(rows))
    native.batchrun_mask(
        *(_at(logits), logits.dtype == torch.bfloat16, *sizes),
        *(ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(bits.ctypes.data)),
        *(ctypes.c_int64(bits.shape[1]), _threads()),
    )
    return True


def weights(logits: torch.Tensor, params: SamplingParams) -> Ints:
    """The weight of each token of `[V]`, an int64 in proportion to its probability.

    All weights are 0 if a logit is NaN or +inf, or none is finite.
    """
    with np.errstate(all="ignore"):
        own: Floats = np.asarray(logits.float().numpy(), np.float32)
        first = np.zeros(len(own), np.int64)
        if not np.isfinite(own.max()):
            return first
        x = np.fmax(own / np.float32(params.temperature), np.float32(-np.inf))
        highest = x.max()
        if not np.isfinite(highest):
            first[np.argmax(own)] = 1
            return first
        limit = highest + _LOWEST
        if 0 < params.top_k < len(x):
            limit = max(limit, np.partition(x, -params.top_k)[-params.top_k])
        if params.top_p < 1:
            head = np.sort(x[x >= limit])[::-1]
            mass = _weights(head - highest).cumsum()
            # The token that reaches top_p is the last one kept.
            need = min(math.ceil(params.top_p * float(mass[-1])), int(mass[-1]))
            limit = head[np.searchsorted(mass, need)]
        limit = max(limit, highest + np.float32(_log(params.min_p)))
        kept: Ints = np.where(x >= limit, _weights(x - highest), 0)
        return kept


def _weights(x: Floats) -> Ints:
    """Integers in proportion to exp(x), for x <= 0; bit for bit those of sampling.cpp."""
    power = np.fmax(x, np.float32(-40)) * np.float32(1.44269504)
    whole = np.rint(power)
    part = power - whole
    p = np.full_like(part, _TERMS[0])
    for term in _TERMS[1:]:
        p = p * part + np.float32(term)
    found: Ints = np.ldexp(p, whole.astype(np.int32) + _BITS).astype(np.int64)
    return found


def _invert(weights: Ints, number: float) -> int:
    cdf = weights.cumsum()
    total = int(cdf[-1])
    if not total:
        return -1
    return int(np.searchsorted(cdf, min(int(number * float(total)), total - 1), side="right"))


def _log(x: float) -> float:
    return math.log(x) if x else -math.inf


def _readable(logits: torch.Tensor) -> torch.Tensor:
    known = logits.dtype in (torch.float32, torch.bfloat16)
    return (logits if known else logits.float()).contiguous()


def _rows(logits: torch.Tensor) -> tuple[object, ...]:
    """The logits as native arguments: address, whether they are bfloat16, and shape."""
    return _at(logits), logits.dtype == torch.bfloat16, *map(ctypes.c_int64, logits.shape)


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _threads() -> ctypes.c_int64:
    return ctypes.c_int64(torch.get_num_threads())
