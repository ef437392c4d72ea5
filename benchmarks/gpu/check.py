"""Everything that a GPU must show, in one command: tests, figures, one JSON, a table.

    make gpu-check                                   under 9 minutes on one H200
    python -m benchmarks.gpu.check --only steps,job  some of the parts
    python -m benchmarks.gpu.check --toy             the rehearsal, on a CPU

Each part is a process of its own with a time limit of its own: one that fails or hangs costs its
own figures and nothing else. benchmarks/METHOD.md says what each figure means.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu import details, table

ROOT = Path(__file__).parents[2]
TESTS = ("tests/gpu", "tests/allocator", "tests/attention")
# The part of the tests that runs under compute-sanitizer, which slows kernels many times.
SANITIZED = ("tests/gpu/test_memory.py", "-k", "not cuda-1 and not cuda-2")


@dataclass(frozen=True)
class Part:
    """A part of the check and the seconds it may take, beside what the parts before it left."""

    name: str
    limit: float
    about: str


PARTS = (
    Part("ceilings", 20, "copy bandwidth and bf16 matrix rate"),
    Part("vmm", 30, "driver calls: create, map, set-access, unmap"),
    Part("steps", 100, "Llama-3-8B shape: decode steps, prefill chunks, idle time"),
    Part("job", 75, "256 requests, Qwen3-0.6B shape: throughput, mapping, KV utilisation"),
    Part("peer", 70, "the same through transformers' generate_batch"),
    Part("layouts", 50, "contiguous slots against 16-token pages"),
    Part("slabs", 35, "layers_per_slab: decode attention time and waste"),
    Part("tests", 120, "pytest -m gpu"),
    Part("sanitizer", 35, "compute-sanitizer over the memory tests"),
)  # 535 s together, under 9 minutes


def parts_table() -> Iterator[str]:
    """The rows of METHOD.md's table."""
    for part in PARTS:
        yield f"| `{part.name}` | {part.limit:.0f} s | {part.about} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--only", default=",".join(names), help="parts, separated by commas")
    parser.add_argument("--toy", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--out", type=Path, help="the JSON; default benchmarks/results/gpu-*.json")
    parser.add_argument("--logs", type=Path, help="folder that keeps what the parts print")
    parser.add_argument("--attention", default="auto", help="backend of the engine's parts")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if not args.toy and not cuda_devices():
        print(
            "error: there is no CUDA device here (libcuda.so.1 is missing or finds none)\n"
            "hint: rehearse on the CPU with python -m benchmarks.gpu.check --toy",
            file=sys.stderr,
        )
        return 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        logs = args.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        records = run_all([part for part in PARTS if part.name in wanted], args, logs)
    result = summary(records, args, time.monotonic() - began)
    out = args.out or default_out(result, whole=wanted == names)
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print()
    print("\n".join(table.text(table.rows(records, toy=args.toy))))
    for lines in details.sections(records):
        print()
        print("\n".join(lines))
    print(f"\n{result['seconds']:.0f} s{f'; {out}' if out else ''}")
    return int(any(r["status"] in ("failed", "timed out") for r in records.values()))


def run_all(
    parts: Sequence[Part], args: argparse.Namespace, logs: Path
) -> dict[str, dict[str, Any]]:
    """Run the parts in turn; each may also use the seconds that those before it left."""
    records: dict[str, dict[str, Any]] = {}
    end = time.monotonic()
    for part in parts:
        end += part.limit
        limit = max(part.limit, end - time.monotonic())
        records[part.name] = run(replace(part, limit=limit), args, logs)
    return records


def cuda_devices() -> int:
    """Devices that the driver finds; makes no context, so that it costs the parts nothing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def run(part: Part, args: argparse.Namespace, logs: Path) -> dict[str, Any]:
    """Run one part in a process group of its own; returns its record, whatever happened."""
    out = logs.resolve() / f"{part.name}.json"
    log = logs / f"{part.name}.log"
    out.unlink(missing_ok=True)
    command = _command(part, args, out)
    if command is None:
        return {"status": "unavailable", "reason": f"{part.name} has no tool", "figures": {}}
    print(f"{part.name:10} {part.about} ... ", end="", flush=True)
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            # What newer libraries warn of must not cost the tests of a lent device.
            env={**os.environ, "PYTEST_ADDOPTS": "-W default -p no:cacheprovider"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(part.limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Its group too: a compiler left running would slow the next part down.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    record = _record(part, out, code, log)
    record["seconds"] = round(time.monotonic() - began, 1)
    reason = f": {record['reason']}" if "reason" in record else ""
    print(f"{record['status']}, {record['seconds']} s{reason}", flush=True)
    if code:
        print("    " + "\n    ".join(log.read_text(errors="replace").splitlines()[-12:]))
    return record


def _command(part: Part, args: argparse.Namespace, out: Path) -> list[str] | None:
    """What runs the part; None where its tool is missing."""
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts="]
    tests += [f"--junitxml={out.with_suffix('.xml')}"]
    if part.name == "tests":
        folders = [folder for folder in TESTS if (ROOT / folder).exists()]
        return [*tests, *(["--collect-only", "-q"] if args.toy else ["-v"]), *folders]
    if part.name == "sanitizer":
        # Beside nvcc, where the CUDA toolkit puts it, when it is not on the path.
        tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
        if tool is None or args.toy:
            return None
        return [tool, "--tool=memcheck", "--error-exitcode=99", *tests, *SANITIZED]
    command = [sys.executable, "-m", "benchmarks.gpu.part", part.name, f"--out={out}"]
    command += [f"--attention={args.attention}", f"--limit={part.limit}"]
    return command + (["--toy"] if args.toy else [])


def _record(part: Part, out: Path, code: int | None, log: Path) -> dict[str, Any]:
    """What is known of a part that ended with `code`, None for one that ran out of time."""
    if part.name in ("tests", "sanitizer"):
        record = {"figures": _counts(out.with_suffix(".xml"), log)}
    elif out.exists():
        record = json.loads(out.read_text())
    else:
        record = {"figures": {}}
    if code is None:
        return record | {"status": "timed out", "reason": f"not done after {part.limit:.0f} s"}
    if code:
        said = log.read_text(errors="replace").split("\n")
        reason = record.get("reason") or next(filter(None, reversed(said)), "it said nothing")
        return record | {"status": "failed", "reason": f"exit code {code}: {reason}"}
    return {"status": "done"} | record


def _counts(report: Path, log: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped; of an unfinished run what its log shows."""
    if report.exists():
        suite = ElementTree.parse(report).getroot()[0]
        count = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
        failed = count["failures"] + count["errors"]
        passed = count["tests"] - failed - count["skipped"]
        return {"passed": passed, "failed": failed, "skipped": count["skipped"]}
    words = re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)", log.read_text(errors="replace"))
    return {
        "passed": words.count("PASSED"),
        "failed": words.count("FAILED") + words.count("ERROR"),
        "skipped": words.count("SKIPPED"),
    }


def summary(
    records: dict[str, dict[str, Any]], args: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """The JSON of the check."""
    measured = [record for record in records.values() if "device" in record]
    return {
        "benchmark": "gpu-check",
        "toy": args.toy,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks.gpu.check", *sys.argv[1:]]),
        "commit": commit(),
        "device": measured[0]["device"] if measured else {},
        "versions": measured[0]["versions"] if measured else {},
        "seconds": round(seconds, 1),
        "table": [row.as_dict() for row in table.rows(records, toy=args.toy)],
        "parts": {
            name: {k: v for k, v in record.items() if k not in ("device", "versions")}
            for name, record in records.items()
        },
    }


def commit() -> str:
    """The commit that is checked, and whether the files differ from it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def default_out(result: dict[str, Any], *, whole: bool) -> Path | None:
    """Where a whole check of a device is kept; None for parts of one and for rehearsals."""
    if result["toy"] or not whole or not result["device"]:
        return None
    name = re.sub(r"\W+", "-", result["device"]["name"].lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"gpu-{name}.json"


if __name__ == "__main__":
    sys.exit(main())
