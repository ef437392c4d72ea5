"""The parts of the check, in the order of their worth, and the commands that run them."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Args:
        name: Also of its module, where it has no `tests`.
        limit: Seconds that it may take once it is ready, beside what parts before it left.
        about: What it shows.
        tests: What pytest is to run; none for a part that measures.
        sanitized: Whether the tests run under compute-sanitizer.
    """

    name: str
    limit: float
    about: str
    tests: tuple[str, ...] = ()
    sanitized: bool = False


PARTS = (
    Part("submit", 150, "`batchrun submit`, a tiny model in bf16: killed, resumed, compared"),
    Part(
        "memory",
        60,
        "pytest -m gpu: the allocator, aliases, fences and copies",
        ("tests/gpu/test_memory.py", "tests/gpu/test_transfers.py", "tests/allocator"),
    ),
    Part(
        "parity",
        120,
        "pytest -m gpu: attention kernels, and tokens against `generate`",
        ("tests/gpu/test_parity.py", "tests/attention"),
    ),
    Part("ceilings", 20, "copy bandwidth and bf16 matrix rate"),
    Part("steps", 100, "Llama-3-8B shape: decode steps, prefill chunks, idle time"),
    Part("job", 75, "256 requests, Qwen3-0.6B shape: throughput, mapping, KV utilisation"),
    Part("peer", 70, "the same through transformers' generate_batch"),
    Part("vmm", 30, "driver calls: create, map, set-access, unmap"),
    Part("layouts", 50, "contiguous slots against 16-token pages"),
    Part("slabs", 35, "layers_per_slab: decode attention time and waste"),
    # Kernels are many times slower under it: fewer tests.
    Part(
        "sanitizer",
        35,
        "compute-sanitizer over the memory tests",
        ("tests/gpu/test_memory.py", "-k", "not cuda-1 and not cuda-2"),
        sanitized=True,
    ),
)


def parts_table() -> Iterator[str]:
    """The rows of METHOD.md's table."""
    for part in PARTS:
        yield f"| `{part.name}` | {part.limit:.0f} s | {part.about} |"


def command(part: Part, args: argparse.Namespace, out: Path) -> list[str] | None:
    """What runs the part; None where its tool is missing."""
    if not part.tests:
        measure = [sys.executable, "-m", "benchmarks.gpu.part", part.name, f"--out={out}"]
        measure += [f"--attention={args.attention}", f"--limit={part.limit}"]
        return measure + (["--toy"] if args.toy else [])
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts="]
    pytest += [f"--junitxml={out.with_suffix('.xml')}"]
    if not part.sanitized:
        return [*pytest, *(["--collect-only", "-q"] if args.toy else ["-v"]), *part.tests]
    # Beside nvcc, where the CUDA toolkit puts it, when it is not on the path.
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None or args.toy:
        return None
    return [tool, "--tool=memcheck", "--error-exitcode=99", *pytest, *part.tests]
