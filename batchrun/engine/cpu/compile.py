"""Compiles C++ for this CPU on first use, and keeps the library in the user's cache.

A library runs with the user's rights, so it is loaded only from where nobody else could have put
it. If others can write to the cache, it is compiled into a folder of this process alone.

The sources need neither torch's headers nor their own OpenMP: they run on torch's threads, and
torch has loaded its OpenMP before a library is loaded.
"""

from __future__ import annotations

import ctypes
import getpass
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from batchrun import platforms
from batchrun.machine import cpu_features
from batchrun.trust import who_else

_CPU = {"x86_64": ("-march=native", "-mprefer-vector-width=512")}
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp"),
    *_CPU.get(platform.machine(), ("-mcpu=native",)),
)


class CompileError(Exception):
    """A source can't be compiled here; the message says why in one line."""


def load(
    source: Path,
    log: Callable[[str], None] = lambda line: None,
    structs: Iterable[type[ctypes.Structure]] = (),
    dtype: str = "",
) -> ctypes.CDLL:
    """Load a source's library; one damaged by a full disk or a crash is compiled again.

    Args:
        source: C++, which may include the headers beside it.
        log: Called with a line if the source has to be compiled.
        structs: Passed to the library; their sizes must match the source's.
        dtype: The one to compile, of a source that has several.

    Raises:
        CompileError: There is no compiler, it fails, or there is nowhere to keep the library.
    """
    _share_openmp()
    try:
        path = build(source, log, dtype)
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            if os.statvfs(path.parent).f_flag & os.ST_NOEXEC:
                raise CompileError(
                    f"{path.parent} is mounted noexec: set XDG_CACHE_HOME to another folder"
                ) from None
            path.unlink(missing_ok=True)
            library = ctypes.CDLL(str(build(source, log, dtype)))
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(_told(error)) from error
    for struct in structs:
        size: int = getattr(library, f"batchrun_sizeof_{struct.__name__}")()
        assert size == ctypes.sizeof(struct), f"{source.name} has another {struct.__name__}"
    return library


@cache
def _share_openmp() -> None:
    """Let libraries call the OpenMP that torch has loaded, which its ARM build keeps to itself."""
    folder = Path(torch.__file__).parent
    for path in (*folder.glob("lib/lib*omp*.so*"), *folder.parent.glob("torch.libs/lib*omp*.so*")):
        with suppress(OSError):  # it is not loaded
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
            return


def build(source: Path, log: Callable[[str], None] = lambda line: None, dtype: str = "") -> Path:
    """The shared library for this source, torch and CPU; compiled if it is not in the cache.

    Raises:
        OSError: There is no compiler, or the cache can't be written.
        subprocess.SubprocessError: The compiler fails.
    """
    flags = (*_FLAGS, f"-DOF_{dtype.upper()}") if dtype else _FLAGS
    path = _folder(log) / f"{source.stem}-{_key(source, flags)}.so"
    if _is_ours(path):
        return path
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++"))), "")
    if not compiler:
        raise OSError("there is no C++ compiler (g++ or c++)")
    with path.with_suffix(".lock").open("w") as lock:
        platforms.flock(lock)
        if _is_ours(path):
            return path
        log(f"compiling {source.name} for this CPU (once, takes a few seconds)")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            _compile([compiler, *flags], source, made)
            made.chmod(0o700)
            made.replace(path)
    return path


def guard_caches(log: Callable[[str], None] = lambda line: None) -> None:
    """Make libraries that cache compiled code keep it where nobody else can write.

    Call this before they are loaded. A folder that the user has set for one stays.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no entry in /etc/passwd: torch uses this name
        user = f"uid_{os.getuid()}"
    name, home = re.sub(r'[\\/:*?"<>|]', "_", user), Path(os.path.expanduser("~"))
    for variable, folder in (
        ("TORCHINDUCTOR_CACHE_DIR", Path(tempfile.gettempdir()) / f"torchinductor_{name}"),
        ("TRITON_CACHE_DIR", home / ".triton" / "cache"),
        ("FLASHINFER_WORKSPACE_BASE", home / ".cache" / "flashinfer"),
    ):
        if variable in os.environ or not folder.is_absolute():
            continue
        with suppress(OSError):  # it can't be made: the library will say so if it needs it
            if why := _why_not(folder):
                log(f"{why}: compiled code is not kept there")
                os.environ[variable] = str(_of_this_process())


def _folder(log: Callable[[str], None]) -> Path:
    """The folder where libraries are kept, with links resolved."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(root):  # neither HOME nor an entry in /etc/passwd
        raise OSError("there is no home folder: set HOME or XDG_CACHE_HOME")
    folder = Path(os.path.realpath(root)) / "batchrun"
    why = _why_not(folder)
    if why is None:
        return folder
    log(f"{why}: compiled code is not kept there (chmod go-w, or set XDG_CACHE_HOME)")
    return _of_this_process()


def _why_not(folder: Path) -> str | None:
    """Why a folder can't be trusted; None if it can. Creates it if it is missing."""
    folder.mkdir(0o700, parents=True, exist_ok=True)
    return who_else(Path(os.path.realpath(folder)))


def _is_ours(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and who_else(path) is None


def _of_this_process() -> Path:
    """A temporary folder that is removed when the process ends.

    Raises:
        OSError: Others could write there too.
    """
    folder = Path(os.path.realpath(_temporary().name))
    if why := who_else(folder):
        raise OSError(
            f"there is no safe place for compiled code: {why}; set TMPDIR to a folder of your own"
        )
    return folder


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="batchrun-")


def _compile(compiler: list[str], source: Path, to: Path) -> None:
    compiled = to.with_suffix(".o")
    # Linked without -fopenmp, which would bring a second OpenMP with threads of its own.
    for command in (
        [*compiler, "-c", str(source), "-o", str(compiled)],
        [compiler[0], "-shared", "-Wl,-z,now", str(compiled), "-o", str(to)],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True)


def _key(source: Path, flags: Iterable[str]) -> str:
    """A hash of what a library depends on: source, headers, flags, torch and CPU features."""
    files = [source, *sorted(source.parent.glob("*.h"))]
    texts = [file.read_text(encoding="utf-8") for file in files]
    parts = [*texts, *flags, torch.__version__, cpu_features()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _told(error: OSError | subprocess.SubprocessError) -> str:
    """The first informative line of an error."""
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else repr(error))
