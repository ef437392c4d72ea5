"""What the check needs of this Python, and what it can do without; nothing is imported for that."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

MODULES = {  # by the package that brings it
    "click": "click",
    "jinja2": "jinja2",
    "numpy": "numpy",
    "pyarrow": "pyarrow",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "tqdm": "tqdm",
    "transformers": "transformers",
}
DRIVER = {"cuda-bindings": "cuda.bindings"}
VLLM = {"vllm": "vllm"}
PARALLEL = {"pytest-xdist": "xdist"}
TESTS = {"hypothesis": "hypothesis", "pytest": "pytest", "pytest-timeout": "pytest_timeout"}


def missing(packages: dict[str, str]) -> list[str]:
    """Those that this Python has not."""
    return [name for name, module in packages.items() if not _found(module)]


def notes() -> Iterator[str]:
    """What is optional and not here, and what that means."""
    if not _found("flashinfer"):
        yield "flashinfer-python is not installed: its rows say none, its tests are skipped"
    elif not _compiled():
        yield (
            "FlashInfer's kernels are not compiled: its rows say none, its tests are skipped; "
            "first: python -m benchmarks.gpu.prebuild_flashinfer --out kernels, then --use kernels"
        )
    if not _found("flash_attn"):
        yield "flash-attn is not installed: generate_batch has no FlashAttention, and is slower"
    if missing(VLLM):
        yield "vllm is not installed: nothing is compared with it"


def error(lacking: list[str]) -> str:
    """What to say where the check can't begin."""
    return (
        f"error: {sys.executable} has no {', '.join(lacking)}\n"
        f"hint: {sys.executable} -m pip install {' '.join(lacking)}, or python -m "
        "benchmarks.gpu.check by another Python"
    )


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it is part of
        return False


def _compiled() -> bool:
    """Whether FlashInfer has any ready kernel: brought along, or compiled when it was used."""
    spec = find_spec("flashinfer")
    folders = (spec and spec.submodule_search_locations) or ()
    base = os.environ.get("FLASHINFER_WORKSPACE_BASE") or os.path.expanduser("~")
    brought = [kernel for name in folders for kernel in Path(name).glob("data/aot/*/*.so")]
    return bool(brought) or any((Path(base) / ".cache" / "flashinfer").glob("**/*.so"))
