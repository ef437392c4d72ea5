"""The parts of the check, in the order of their worth, and the commands that run them."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import needs

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
        beside: Whether it runs beside others of which the same holds: no time of it is a figure.
        greedy: Whether it would take all the time that others left: it gets none of that.
    """

    name: str
    limit: float
    about: str
    tests: tuple[str, ...] = ()
    sanitized: bool = False
    beside: bool = False
    greedy: bool = False


_MEMORY = ("tests/gpu/test_memory.py", "tests/gpu/test_transfers.py")

PARTS = (
    Part(
        "submit",
        150,
        "`batchrun submit`, a tiny model in bf16: killed, resumed, with `--devices all`, compared",
        beside=True,
    ),
    Part(
        "memory",
        60,
        "pytest -m gpu: the allocator, aliases, fences and copies",
        (*_MEMORY, "tests/allocator"),
        beside=True,
    ),
    Part(
        "parity",
        90,
        "pytest -m gpu: attention kernels, and tokens against `generate`",
        ("tests/gpu", "tests/attention", *(f"--ignore={name}" for name in _MEMORY)),
        beside=True,
    ),
    # Kernels are many times slower under it: fewer tests.
    Part(
        "sanitizer",
        35,
        "compute-sanitizer over the memory tests",
        (_MEMORY[0], "-k", "not cuda-1 and not cuda-2"),
        sanitized=True,
        beside=True,
    ),
    Part("ceilings", 20, "copy bandwidth and bf16 matrix rate"),
    Part("steps", 120, "Llama-3-8B shape: decode steps, prefill chunks, idle time, 1,000 chats"),
    Part("job", 110, "256 requests, Qwen3-0.6B shape: throughput, mapping, KV utilisation"),
    Part("host", 45, "what small steps cost the host, by function"),
    Part("pressure", 45, "the job with 8 GiB for keys and values, so that sequences are preempted"),
    Part("deterministic", 90, "--deterministic: what it costs, and bits in other batches"),
    Part("vmm", 30, "driver calls: create, map, set-access, unmap"),
    Part("layouts", 50, "contiguous slots against 16-token pages"),
    Part("slabs", 35, "layers_per_slab: decode attention time and waste"),
    Part("vllm", 150, "the job through vLLM, if it is installed"),
    Part("peer", 60, "the job through transformers' generate_batch", greedy=True),
)


def groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """The parts in order, those that may run side by side together."""
    for _, group in itertools.groupby(parts, key=lambda part: None if part.beside else part.name):
        yield list(group)


def most_seconds(parts: Sequence[Part]) -> float:
    """What all of them take at most."""
    return sum(max(part.limit for part in group) for group in groups(parts))


def parts_table() -> Iterator[str]:
    """The rows of METHOD.md's table."""
    for part in PARTS:
        yield f"| `{part.name}` | {part.limit:.0f} s | {part.about} |"


def unsupported_reason(part: Part, args: argparse.Namespace) -> str | None:
    """Why the part can't be run here; None where it can."""
    if part.tests and (lacking := needs.missing(needs.TESTS)):
        return f"{', '.join(lacking)} not installed"
    if part.name == "vllm" and (args.toy or needs.missing(needs.VLLM)):
        return "vllm is not rehearsed" if args.toy else "vllm is not installed"
    if part.sanitized and args.toy:
        return "there is no device to watch"
    if part.sanitized and _sanitizer() is None:
        return "compute-sanitizer is not here"
    return None


def command(part: Part, args: argparse.Namespace, out: Path) -> list[str]:
    """What runs the part."""
    if not part.tests:
        measure = [sys.executable, "-m", "benchmarks.gpu.part", part.name, f"--out={out}"]
        measure += [f"--attention={args.attention}", f"--limit={part.limit}"]
        return measure + (["--toy"] if args.toy else [])
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts="]
    pytest += [f"--junitxml={out.with_suffix('.xml')}"]
    if part.sanitized:
        tool = str(_sanitizer())
        # Calls that fail are no errors here: cuda-bindings asks for functions that there are not.
        options = ["--tool=memcheck", "--report-api-errors=no", "--error-exitcode=99"]
        return [tool, *options, *pytest, *part.tests]
    if args.toy:
        return [*pytest, "--collect-only", "-q", *part.tests]
    # Most of their time is imports, and kernels that are compiled.
    parallel = [] if needs.missing(needs.PARALLEL) else ["-n", str(min(6, os.cpu_count() or 1))]
    return [*pytest, "-v", *parallel, *part.tests]


def _sanitizer() -> str | None:
    # Beside nvcc, where the CUDA toolkit puts it, when it is not on the path.
    return shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
