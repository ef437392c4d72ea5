"""Runs one part of the check and keeps its figures in a file, those of an unfinished part too.

python -m benchmarks.gpu.part NAME --out FILE [--toy]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.gpu.bench import Bench, Unavailable

PACKAGES = ("torch", "transformers", "triton", "flashinfer-python", "cuda-bindings", "numpy")


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
        return {"name": "CPU rehearsal, 1 thread"}
    properties = torch.cuda.get_device_properties(0)
    found = {
        "name": properties.name,
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }
    return found | query("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


def query(*names: str) -> dict[str, str]:
    """Readings of nvidia-smi; none where it is missing. It only reads."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    done = subprocess.run(
        [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values, strict=False)) if done.returncode == 0 else {}


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: a part may be killed at any moment."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record))
    unfinished.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--limit", type=float, default=600.0)
    args = parser.parse_args()
    bench = Bench(args.toy, args.attention, args.limit)
    if args.toy:
        torch.set_num_threads(1)  # toy sizes gain nothing from more
    record: dict[str, Any] = {"status": "unfinished", "figures": {}}
    try:
        if not args.toy and not torch.cuda.is_available():
            raise Unavailable(f"torch {torch.__version__} finds no CUDA device")
        record |= {"device": device(args.toy), "versions": versions()}
        found: Iterator[dict[str, Any]] = importlib.import_module(
            f"benchmarks.gpu.{args.name}"
        ).run(bench)
        for figures in found:
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
