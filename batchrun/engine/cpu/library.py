"""The libraries of native layers, for each dtype, and the structs that they take."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from batchrun.engine import cpu
from batchrun.engine.cpu import Level
from batchrun.engine.cpu import compile as compiled
from batchrun.engine.cpu.compile import CompileError

_SOURCE = Path(__file__).with_name("layers.cpp")
_SOURCE_BF16 = Path(__file__).with_name("layers_bf16.cpp")


@dataclass(frozen=True)
class Arithmetic:
    """What computes with activations of one dtype.

    Args:
        dtype: Of activations.
        library: The compiled library.
        level: The instructions that multiply bfloat16; NOTHING where float32 is computed with.
    """

    dtype: torch.dtype
    library: ctypes.CDLL
    level: Level

    def function(self, name: str) -> Callable[[object], object]:
        """The library's function of that name, which takes a pointer to a struct."""
        found: Callable[[object], object] = getattr(self.library, _symbol(name, self.dtype))
        return found


@cache
def unsupported_reason(dtype: torch.dtype) -> str | None:
    """Why this machine can't compute with a dtype; None if it can. May compile for seconds."""
    try:
        arithmetic(dtype)
    except CompileError as error:
        return f"it can't be compiled: {error}"
    except AttributeError:
        return f"this compiler does not support {str(dtype)[6:]}"
    return None


def arithmetic(dtype: torch.dtype) -> Arithmetic:
    """What computes with a dtype here.

    Raises:
        CompileError: The library can't be compiled.
        AttributeError: The compiler does not know the dtype.
    """
    return _arithmetic(dtype, cpu.level() if dtype == torch.bfloat16 else Level.NOTHING)


@cache
def _arithmetic(dtype: torch.dtype, level: Level) -> Arithmetic:
    structs = Linear, Project, Finish, Norm
    if level:
        with suppress(CompileError):  # the compiler may be older than the CPU
            return Arithmetic(dtype, compiled.load(_SOURCE_BF16, structs=structs), level)
    library = compiled.load(_SOURCE, structs=structs, dtype=str(dtype)[6:])
    getattr(library, _symbol("linear", dtype))
    return Arithmetic(dtype, library, Level.NOTHING)


def _symbol(name: str, dtype: torch.dtype) -> str:
    return f"batchrun_{name}_{str(dtype)[6:]}"


class Matrix(ctypes.Structure):
    """The struct of that name in layers.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("n", "k")),
    )


_SIZES = tuple((name, ctypes.c_int64) for name in ("rows", "threads", "level"))


class Linear(ctypes.Structure):
    """The struct of that name in layers.h."""

    _fields_ = (
        ("weight", Matrix),
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *_SIZES,
    )


class Project(ctypes.Structure):
    """The struct of that name in layers.h."""

    _fields_ = (
        ("weight", Matrix),
        ("norm", ctypes.c_void_p),
        ("heads_norm", ctypes.c_void_p * 2),
        ("heads", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("dim", "rotary")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "out")),
        *_SIZES,
    )


class Finish(ctypes.Structure):
    """The struct of that name in layers.h."""

    _fields_ = (
        *((name, Matrix) for name in ("output", "gate_up", "down")),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("attended", "x", "out")),
        *_SIZES,
    )


class Norm(ctypes.Structure):
    """The struct of that name in layers.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("n", "rows", "threads")),
    )
