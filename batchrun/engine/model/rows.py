"""Has torch's operators on a CPU compute each row alike, whatever else is in the batch.

A product's order of additions depends on its number of rows, and sometimes on that of threads. An
elementwise loop computes what is left behind the last whole vectors of a thread's part by other
instructions, and some functions then round differently. So products are computed in tiles of a
fixed number of rows, and those functions over whole vectors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_TILE = 32  # rows: with fewer a prompt takes longer, with more a decode
_WHOLE = 64  # numbers: two vectors, which a loop takes at a time, of the widest that there are
_GRAIN = 1 << 15  # numbers: a loop over no more runs on one thread (at::internal::GRAIN_SIZE)
_MOST_TERMS = 256  # of a sum that is computed term by term

REPAIRING: ContextVar[bool] = ContextVar("batchrun_repairing", default=False)
"""Whether what torch computes now is part of a repair."""
_ACTIVE: ContextVar[bool] = ContextVar("batchrun_rows", default=False)

Function = Callable[..., Any]


def by_rows(function: Function) -> Function:
    """The function, with those of torch's operators repaired that it calls itself."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if _ACTIVE.get():
            return function(*args, **kwargs)
        token = _ACTIVE.set(True)
        try:
            with _Rows():
                return function(*args, **kwargs)
        finally:
            _ACTIVE.reset(token)

    return run


class _Rows(TorchFunctionMode):
    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        repair = _REPAIRS.get(func)
        if repair is None or REPAIRING.get():
            return func(*args, **(kwargs or {}))
        with repairing():
            return repair(func, *args, **(kwargs or {}))


@contextmanager
def repairing(now: bool = True) -> Iterator[None]:  # noqa: FBT001, FBT002 - a state
    """Within this block, whether what torch computes is part of a repair."""
    token = REPAIRING.set(now)
    try:
        yield
    finally:
        REPAIRING.reset(token)


# --- products ---


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`functional.linear` by `product`."""
    rows = x.reshape(-1, x.shape[-1])
    return product(rows, weight.mT, bias).view(*x.shape[:-1], len(weight))


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`[t, k]` times `[k, n]`, plus a bias, whose rows depend on themselves alone, bit for bit."""
    before, rows = torch.get_num_threads(), len(x)
    size, threads = _way(weight.shape, weight.stride(), weight.dtype, bias is not None, before)
    # Memory that begins where a vector may: kernels can ask where it does.
    whole = x.new_zeros(rows + -rows % size, x.shape[1])
    whole[:rows] = x
    out = x.new_empty(len(whole), weight.shape[1])
    try:
        torch.set_num_threads(threads)
        for tile, result in zip(whole.split(size), out.split(size), strict=True):
            _multiply(tile, weight, bias, result)
    finally:
        torch.set_num_threads(before)
    return out[:rows]


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


@cache
def _way(
    shape: tuple[int, int], stride: tuple[int, ...], dtype: torch.dtype, biased: bool, threads: int
) -> tuple[int, int]:
    """Rows in a tile, and threads, that give a row the same bits anywhere in any tile.

    Both are tried: all threads if one gives the same, and single rows where nothing else does.
    """
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.empty_strided(shape, stride, dtype=dtype)
    weight.copy_(torch.randn(shape, generator=generator))
    row = torch.randn(shape[0], generator=generator).to(dtype)
    bias = weight[0].clone() if biased else None

    def tried(size: int, threads: int) -> torch.Tensor:
        out = weight.new_empty(size, shape[1])
        torch.set_num_threads(threads)
        _multiply(row.repeat(size, 1), weight, bias, out)
        return out

    try:
        alike = tried(_TILE, 1)
        size = _TILE if torch.equal(alike, alike[:1].expand_as(alike)) else 1
        return size, threads if torch.equal(tried(size, threads), tried(size, 1)) else 1
    finally:
        torch.set_num_threads(threads)


def _linear(func: Function, input: Any, weight: Any, bias: Any = None) -> Any:  # noqa: A002
    return linear(input, weight, bias)


def _matmul(func: Function, a: torch.Tensor, b: torch.Tensor) -> Any:
    if a.ndim >= 2 and b.ndim == 2:
        return product(a.reshape(-1, a.shape[-1]), b).view(*a.shape[:-1], b.shape[1])
    if a.ndim == b.ndim == 3 and len(a) == len(b) and a.shape[-1] > 1:
        return torch.stack([product(*pair) for pair in zip(a, b, strict=True)])
    return _unrepaired(func, a, b)


def _addmm(func: Function, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **kw: Any) -> Any:
    return _unrepaired(func, bias, a, b, **kw) if kw or bias.ndim != 1 else product(a, b, bias)


def _unrepaired(func: Function, *args: Any, **kwargs: Any) -> Any:
    with repairing(False):
        return func(*args, **kwargs)


# --- elementwise functions ---


def _aligned(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Compute an elementwise function over whole vectors only."""
    there = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    if not there or any(isinstance(value, torch.Tensor) for value in kwargs.values()):
        return _unrepaired(func, *args, **kwargs)
    tensors = torch.broadcast_tensors(*(args[i] for i in there))
    shape, total = tensors[0].shape, tensors[0].numel()
    flat = [t.reshape(-1) for t in tensors]
    if total % _WHOLE:
        flat = [functional.pad(t, (0, -total % _WHOLE)) for t in flat]

    def compute(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        given = list(args)
        for i, part in zip(there, parts, strict=True):
            given[i] = part
        out: torch.Tensor = func(*given, **kwargs)
        return out

    # So that each thread's share, if there are several, is whole vectors too.
    threads = torch.get_num_threads()
    length = len(flat[0])
    shared = length - length % (_WHOLE * threads)
    if shared < _GRAIN * threads:
        shared = 0
    sizes = [shared] * (shared > 0)
    sizes += [_GRAIN] * ((length - shared) // _GRAIN)
    sizes += [length - sum(sizes)] * (length > sum(sizes) or not sizes)
    parts = zip(*(t.split(sizes) for t in flat), strict=True)
    outs = [compute(each) for each in parts]
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[:total].view(shape)


def _of_complex(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Products of complex numbers; those of others are exact."""
    if any(isinstance(arg, torch.Tensor) and arg.is_complex() for arg in args):
        return _aligned(func, *args, **kwargs)
    return _unrepaired(func, *args, **kwargs)


# --- sums ---


def _sum(func: Function, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A sum over another dimension than the last, term by term."""
    dim = args[0] if args else kwargs.get("dim")
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    known = isinstance(dim, int) and len(args) <= 1 and set(kwargs) <= {"dim"}
    if not known or not x.is_floating_point() or dim in (-1, x.ndim - 1):
        return _unrepaired(func, x, *args, **kwargs)
    terms = x.unbind(dim)
    if not 0 < len(terms) <= _MOST_TERMS:
        return _unrepaired(func, x, *args, **kwargs)
    return in_order(terms).to(x.dtype)


def in_order(terms: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum of tensors, one after the other, in float32 at least."""
    total = terms[0].to(torch.promote_types(terms[0].dtype, torch.float32), copy=True)
    for term in terms[1:]:
        total += term
    return total


_TENSOR = torch.Tensor
_REPAIRS: dict[Function, Function] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, _TENSOR.matmul, _TENSOR.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, _TENSOR.mm, torch.bmm, _TENSOR.bmm), _matmul),
    **dict.fromkeys((torch.sum, _TENSOR.sum), _sum),
    **dict.fromkeys((torch.mul, _TENSOR.mul, _TENSOR.__mul__, _TENSOR.__rmul__), _of_complex),
    **dict.fromkeys((torch.pow, _TENSOR.pow, _TENSOR.__pow__, _TENSOR.__rpow__), _aligned),
    **dict.fromkeys((torch.sigmoid, functional.sigmoid, _TENSOR.sigmoid), _aligned),
    **dict.fromkeys((torch.rsqrt, _TENSOR.rsqrt, torch.exp2, _TENSOR.exp2), _aligned),
    **dict.fromkeys((functional.silu, functional.gelu, functional.mish), _aligned),
    **dict.fromkeys((functional.softplus, functional.elu, functional.selu), _aligned),
}
