"""Decodes on a CPU by a kernel of our own, native.cpp; longer segments by SDPA.

SDPA is called once a sequence, where waking the kernel costs more than reading the keys. The
library takes all sequences in one call. It needs neither torch's headers nor an OpenMP of its own:
it computes on the threads that torch has, whose OpenMP is in the process before it is loaded.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from batchrun.engine.attention import Geometry, LayerAttention, Upload
from batchrun.engine.attention.batch import split
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.core import Segment
from batchrun.machine import cpu_features

_SOURCE = Path(__file__).with_name("native.cpp")
_CPU = {"x86_64": ("-march=native", "-mprefer-vector-width=512")}
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp"),
    *_CPU.get(platform.machine(), ("-mcpu=native",)),
)
_FUNCTIONS = {
    torch.float32: "batchrun_decode_float32",
    torch.bfloat16: "batchrun_decode_bfloat16",
}


def why_not(geometry: Geometry, name: str = "native", *, compiled: bool = False) -> str | None:
    """See `attention.why_not`. A compiler takes two seconds: having to is no reason."""
    if geometry.device.type != "cpu":
        return "it computes on a CPU"
    if geometry.dtype not in _FUNCTIONS:
        return f"it computes in float32 and bfloat16, not in {str(geometry.dtype)[6:]}"
    return None


def make(
    geometry: Geometry,
    upload: Upload | None,
    log: Callable[[str], None],
    name: str = "native",
) -> Native:
    """See `attention.create`; compiles at first use, and keeps the result in the user's cache."""
    try:
        library = _load(build(log), log)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"it can't be compiled: {_told(error)}") from error
    return Native(getattr(library, _FUNCTIONS[geometry.dtype]))


class _Call(ctypes.Structure):
    """As in native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out", "sinks")),
        *((name, ctypes.c_void_p) for name in ("slots", "ends")),
        *((name, ctypes.c_int64) for name in ("n", "q_heads", "kv_heads", "k_dim", "v_dim")),
        ("query_stride", ctypes.c_int64 * 2),
        ("key_stride", ctypes.c_int64 * 3),
        ("value_stride", ctypes.c_int64 * 3),
        ("window", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class Native:
    """One call for all decodes of a step, which reads each key and each value once.

    Args:
        decode: One of the library's functions, which takes a pointer to a `_Call`.
    """

    name = "native"
    capturable = False  # there are no graphs on a CPU

    def __init__(self, decode: Callable[..., object]) -> None:
        self._decode = decode
        self._prefills = SDPA()
        self._decodes, _ = split(())
        self._longer = False

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        """See `AttentionBackend.plan`."""
        if fixed:
            raise ValueError("native computes on a CPU, which records no graphs")
        self._decodes, _ = split(segments)
        longer = segments[len(self._decodes) :]
        self._longer = len(longer) > 0
        self._prefills.plan(longer)

    def run(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """See `AttentionBackend.run`."""
        at, batch = len(self._decodes), self._decodes
        if not at:
            return self._prefills.run(layer, query, keys, values)
        if query.stride(2) != 1:
            query = query.contiguous()
        sinks = None if layer.sinks is None else layer.sinks.float().contiguous()
        out = query.new_empty(*query.shape[:2], values.shape[3])
        call = _Call(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            batch.slots.ctypes.data,
            batch.ends.ctypes.data,
            at,
            query.shape[1],
            keys.shape[2],
            *(keys.shape[3], values.shape[3]),
            query.stride()[:2],
            keys.stride()[:3],
            values.stride()[:3],
            layer.window or 0,
            torch.get_num_threads(),
            layer.scale,
            layer.softcap or 0.0,
        )
        self._decode(ctypes.byref(call))
        if self._longer:
            out[at:] = self._prefills.run(layer, query[at:], keys, values)
        return out


def _load(path: Path, log: Callable[[str], None]) -> ctypes.CDLL:
    """Load the library; one that a full disk or a crash has damaged is compiled again."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(build(log)))


def build(log: Callable[[str], None] = lambda line: None) -> Path:
    """The shared library for this source, torch and CPU, compiled unless it is there.

    Raises:
        OSError: There is no compiler, or the cache can't be written.
        subprocess.SubprocessError: The compiler fails.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root) / "batchrun" / f"native-{_key()}.so"
    if path.exists():
        return path
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++"))), "")
    if not compiler:
        raise OSError("there is no C++ compiler (g++ or c++)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        log("compiling the attention kernel for this CPU, once: takes some seconds")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            _compile(compiler, made)
            made.replace(path)
    return path


def _compile(compiler: str, to: Path) -> None:
    compiled = to.with_suffix(".o")
    # Linked without -fopenmp, which would bring a second OpenMP with threads of its own.
    for command in (
        [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)],
        [compiler, "-shared", "-Wl,-z,now", str(compiled), "-o", str(to)],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


@cache
def _key() -> str:
    """What a library depends on: source, flags, torch, and what the CPU can do."""
    parts = [_SOURCE.read_text(encoding="utf-8"), *_FLAGS, torch.__version__, cpu_features()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _told(error: OSError | subprocess.SubprocessError) -> str:
    """The error's first line that says something."""
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else repr(error))
