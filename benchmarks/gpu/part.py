"""Runs one part of the check and keeps its figures in a file, those of an unfinished part too.

python -m benchmarks.gpu.part NAME --out FILE [--toy]
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.gpu.bench import Bench, Unavailable
from benchmarks.gpu.outcome import TOY_DEVICE

_PR_SET_PDEATHSIG = 1
PACKAGES = (
    *("torch", "transformers", "triton", "flashinfer-python", "flash-attn", "cuda-bindings"),
    "numpy",
)


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide speed; one that is missing is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device(toy: bool) -> dict[str, Any]:
    """What is measured on."""
    if toy:
        return {"name": TOY_DEVICE}
    properties = torch.cuda.get_device_properties(0)
    found = {
        "name": properties.name,
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }
    return found | query("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


def query(*names: str) -> dict[str, str]:
    """Readings of nvidia-smi; none where it is missing, or hangs. It only reads."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values, strict=False)) if done.returncode == 0 else {}


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: a part may be killed at any moment."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record))
    unfinished.replace(path)


def prepared(args: argparse.Namespace, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Import the part and make its CUDA context; then its clock begins, and its figures."""
    if not args.toy:
        if not torch.cuda.is_available():
            raise Unavailable(f"torch {torch.__version__} finds no CUDA device")
        torch.zeros(1, device="cuda")
    record |= {"device": device(args.toy), "versions": versions()}
    module = importlib.import_module(f"benchmarks.gpu.{args.name}")
    if args.ready is not None:
        os.write(args.ready, b".")
        os.close(args.ready)
    limit = min(args.limit, args.deadline - time.monotonic())
    found: Iterator[dict[str, Any]] = module.run(Bench(args.toy, args.attention, limit))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds, once it is ready")
    parser.add_argument("--deadline", type=float, default=math.inf, help="by the monotonic clock")
    parser.add_argument("--ready", type=int, help="file descriptor to say so on")
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # where the check is killed
    if args.toy:
        torch.set_num_threads(1)  # toy sizes gain nothing from more
    record: dict[str, Any] = {"status": "unfinished", "figures": {}}
    try:
        for figures in prepared(args, record):
            record["figures"] |= figures
            write(args.out, record)
            print(json.dumps(figures), flush=True)
        record["status"] = "done"
    except Unavailable as error:
        record |= {"status": "unavailable", "reason": str(error)}
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        record |= {"status": "failed", "reason": f"{type(error).__name__}: {first}"}
        write(args.out, record)
        raise
    write(args.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
