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
from functools import wraps
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_TILE = 32  # rows: with fewer a prompt takes longer, with more a decode
_SHARED = 1 << 16  # weights: what has fewer is multiplied by one thread
_TRIED = 4096  # results, to find out whether they are the same
_NEAR = 64  # columns whose results are close to 0
_WHOLE = 64  # numbers: two vectors, which a loop takes at a time, of the widest that there are
_ALONE = 1 << 14  # numbers: a loop over no more runs on one thread (GELU; others take twice that)
_EACH = 1 << 15  # numbers: with as many for each thread, a loop runs on all (at's GRAIN_SIZE)

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
def repairing(now: bool = True) -> Iterator[None]:
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
    size, threads = _way(weight, bias, before)
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


_WAYS: dict[tuple[Any, ...], tuple[int, int]] = {}


def _way(weight: torch.Tensor, bias: torch.Tensor | None, threads: int) -> tuple[int, int]:
    """Rows in a tile, and threads, that give a row the same bits anywhere in any tile.

    Both are tried, once for weights of one shape: all threads if one gives the same, and single
    rows where nothing else does.
    """
    key = (weight.shape, weight.stride(), weight.dtype, bias is not None, threads)
    if key not in _WAYS:
        try:
            size = _TILE if _same_anywhere(weight, bias) else 1
            large = weight.numel() >= _SHARED
            _WAYS[key] = size, threads if large and _same_by(threads, weight, bias, size) else 1
        finally:
            torch.set_num_threads(threads)
    return _WAYS[key]


def _same_anywhere(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a row gets the same bits anywhere in a tile."""
    torch.set_num_threads(1)
    for x in _made_up(weight, 1):
        alike = weight.new_empty(_TILE, weight.shape[1])
        _multiply(x.repeat(_TILE, 1), weight, bias, alike)
        if not torch.equal(alike, alike[:1].expand_as(alike)):
            return False
    return True


def _same_by(threads: int, weight: torch.Tensor, bias: torch.Tensor | None, size: int) -> bool:
    """Whether so many threads compute the same bits as one."""
    for x in _made_up(weight, size):
        found = weight.new_empty(2, size, weight.shape[1])
        for count, out in zip((1, threads), found, strict=True):
            torch.set_num_threads(count)
            _multiply(x, weight, bias, out)
        if not torch.equal(*found):
            return False
    return True


def _made_up(weight: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Rows for some thousands of results, if not of a very narrow weight.

    Some columns' results are close to 0 although their terms are not, so that another order of
    additions shows in them: 16 bits round it away in all but one of some thousand others.
    """
    generator, (k, n) = torch.Generator().manual_seed(0), weight.shape
    near = weight[:, :: -(-n // min(_NEAR, max(1, k // 2)))].float()
    across = torch.linalg.qr(near).Q
    for _ in range(min(16, -(-_TRIED // n))):
        x = torch.randn(size, k, generator=generator)
        yield (x - x @ across @ across.mT).to(weight.dtype)


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
    if len(there) == 1 and args[there[0]].numel() <= _ALONE and _is_whole(args[there[0]]):
        return func(*args, **kwargs)
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

    # Each thread's share, too, is whole vectors.
    length, before = len(flat[0]), torch.get_num_threads()
    threads = min(before, length // _EACH)
    shared = length - length % (_WHOLE * threads) if threads > 1 else 0
    sizes = [shared] * (shared > 0) + [_ALONE] * ((length - shared) // _ALONE)
    sizes += [length - sum(sizes)] * (length > sum(sizes) or not sizes)
    try:
        if 1 < threads < before:
            torch.set_num_threads(threads)
        outs = [compute(each) for each in zip(*(t.split(sizes) for t in flat), strict=True)]
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[:total].view(shape)


def _is_whole(tensor: torch.Tensor) -> bool:
    return tensor.numel() % _WHOLE == 0 and tensor.is_contiguous()


def _of_complex(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Products of complex numbers; those of others are exact."""
    if any(isinstance(arg, torch.Tensor) and arg.is_complex() for arg in args):
        return _aligned(func, *args, **kwargs)
    return _unrepaired(func, *args, **kwargs)


# --- sums ---


def _sum(func: Function, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A sum over another dimension than the last, term by term."""
    dim: Any = args[0] if args else kwargs.get("dim")
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    known = isinstance(dim, int) and len(args) <= 1 and set(kwargs) <= {"dim"}
    if known and x.is_floating_point() and dim not in {-1, x.ndim - 1} and x.shape[dim]:
        return in_order(x.unbind(dim)).to(x.dtype)
    return _unrepaired(func, x, *args, **kwargs)


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
