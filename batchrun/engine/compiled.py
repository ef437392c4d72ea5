"""Compiles C++ for the CPU it will run on, at first use, and keeps the library in the user's cache.

The sources need neither torch's headers nor an OpenMP of their own: they compute on the threads
that torch has, whose OpenMP is in the process before a library is loaded.
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
from collections.abc import Callable
from pathlib import Path

import torch

from batchrun.machine import cpu_features

_CPU = {"x86_64": ("-march=native", "-mprefer-vector-width=512")}
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp"),
    *_CPU.get(platform.machine(), ("-mcpu=native",)),
)


class CompileError(Exception):
    """A source can't be compiled here; says why in one line."""


def load(source: Path, log: Callable[[str], None] = lambda line: None) -> ctypes.CDLL:
    """The library of a source; one that a full disk or a crash has damaged is compiled again.

    Raises:
        CompileError: There is no compiler, it fails, or the cache can't be written.
    """
    try:
        path = build(source, log)
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return ctypes.CDLL(str(build(source, log)))
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(_told(error)) from error


def build(source: Path, log: Callable[[str], None] = lambda line: None) -> Path:
    """The shared library for this source, torch and CPU, compiled unless it is there.

    Raises:
        OSError: There is no compiler, or the cache can't be written.
        subprocess.SubprocessError: The compiler fails.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root) / "batchrun" / f"{source.stem}-{_key(source)}.so"
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
        log(f"compiling {source.name} for this CPU, once: takes some seconds")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            _compile(compiler, source, made)
            made.replace(path)
    return path


def _compile(compiler: str, source: Path, to: Path) -> None:
    compiled = to.with_suffix(".o")
    # Linked without -fopenmp, which would bring a second OpenMP with threads of its own.
    for command in (
        [compiler, *_FLAGS, "-c", str(source), "-o", str(compiled)],
        [compiler, "-shared", "-Wl,-z,now", str(compiled), "-o", str(to)],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True)


def _key(source: Path) -> str:
    """What a library depends on: source, flags, torch, and what the CPU can do."""
    parts = [source.read_text(encoding="utf-8"), *_FLAGS, torch.__version__, cpu_features()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _told(error: OSError | subprocess.SubprocessError) -> str:
    """The error's first line that says something."""
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else repr(error))
