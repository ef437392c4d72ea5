"""Everything that a GPU must show, in one command: tests, figures, one JSON, a table.

    make gpu-check                                   all of it
    python -m benchmarks.gpu.check --only steps,job  some of the parts
    python -m benchmarks.gpu.check --budget 300      the parts that fit into so many seconds
    python -m benchmarks.gpu.check --continue FILE   what FILE, an earlier JSON, has not
    python -m benchmarks.gpu.check --toy             the rehearsal, on a CPU

Each part is a process of its own with a time limit of its own: one that fails or hangs costs its
own figures and nothing else. They run in the order of their worth, those that time nothing side by
side, and the JSON is written after each: what ends the check early costs what was not done.
benchmarks/METHOD.md says what each figure means.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import details, needs, outcome, runner, table
from benchmarks.gpu.outcome import Records
from benchmarks.gpu.parts import PARTS, ROOT, Part, groups, unsupported_reason

FAILURES = ("failed", "timed out")
REHEARSED = 10  # times as long as on a GPU: the rehearsal's machine may be busy with other things


def main() -> int:
    args = _arguments()
    if lacking := needs.missing(needs.MODULES | ({} if args.toy else needs.DRIVER)):
        print(needs.error(lacking), file=sys.stderr)
        return 1
    device = outcome.TOY_DEVICE if args.toy else cuda_device()
    if device is None:
        print(
            "error: there is no CUDA device here (libcuda.so.1 is missing or finds none)\n"
            "hint: rehearse on the CPU with python -m benchmarks.gpu.check --toy",
            file=sys.stderr,
        )
        return 1
    for note in () if args.toy else needs.notes():
        print(f"note: {note}", flush=True)
    earlier: dict[str, Any] = {}
    if args.earlier:
        earlier, reason = outcome.earlier_check(args.earlier, args.commit, device)
        if reason:
            print(f"nothing is continued: {reason}", flush=True)
    began = time.monotonic()
    patience = REHEARSED if args.toy else 1
    parts = [replace(p, limit=patience * p.limit) for p in PARTS if p.name in args.only]
    with tempfile.TemporaryDirectory() as scratch:
        logs = args.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)

        def keep(records: Records) -> None:
            result.update(outcome.summary(records, args, time.monotonic() - began, earlier))
            outcome.save(args.out, result, logs)

        result: dict[str, Any] = {}
        done = earlier.get("parts", {})
        run = run_all(parts, args, logs, done, deadline=began + args.budget, keep=keep)
    _show(result)
    if (whole := outcome.result_file(result)) is not None:
        whole.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['seconds']:.0f} s; {whole or args.out}, {outcome.archive_of(args.out)}")
    return int(any(result["parts"][name]["status"] in FAILURES for name in run))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--only", default=",".join(names), help="parts, separated by commas")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds, all together")
    parser.add_argument(
        "--continue", type=Path, dest="earlier", metavar="FILE", help="JSON of an earlier check"
    )
    parser.add_argument("--toy", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--out", type=Path, help="the JSON; default build/gpu-check.json")
    parser.add_argument("--logs", type=Path, help="folder that keeps what the parts print")
    parser.add_argument("--attention", default="auto", help="backend of the engine's parts")
    parser.add_argument("--commit", default=outcome.commit(), help="where there is no git here")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(names):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if args.earlier and not args.earlier.exists():
        parser.error(f"there is no {args.earlier}")
    args.out = args.out or ROOT / "build" / f"gpu-check{'-toy' if args.toy else ''}.json"
    return args


def run_all(
    parts: Sequence[Part],
    args: argparse.Namespace,
    logs: Path,
    earlier: Records,
    *,
    deadline: float,
    keep: Callable[[Records], None],
) -> list[str]:
    """Run the parts, some side by side; each may use the seconds that others left.

    Args:
        parts: In order.
        args: Of the command line.
        logs: Folder of the logs.
        earlier: What an earlier check found; parts that it has done are not run.
        deadline: When all must have ended, by the monotonic clock; a part whose limit does not fit
            before it is skipped.
        keep: Called with all records after each part.

    Returns:
        The names of the parts that were run.
    """
    records, spare = dict(earlier), 0.0
    run: list[str] = []
    keep(records)
    for group in groups(parts):
        due: list[Part] = []
        for part in group:
            if earlier.get(part.name, {}).get("status") == "done":
                print(f"{part.name:10} done before", flush=True)
            elif (record := _not_run(part, args, deadline - time.monotonic())) is None:
                print(f"{part.name:10} {part.about} ...", flush=True)
                due.append(part if part.greedy else replace(part, limit=part.limit + spare))
            else:
                if record["status"] == "unavailable" or part.name not in records:
                    records[part.name] = record
                _report(part, record, logs)
        with ThreadPoolExecutor(max(1, len(due))) as pool:
            startup = runner.STARTUP * (REHEARSED if args.toy else 1)
            run_one = partial(runner.run, args=args, logs=logs, startup=startup, deadline=deadline)
            found = list(pool.map(run_one, due))
        records |= {part.name: record for part, record in zip(due, found, strict=True)}
        keep(records)
        run += [part.name for part in due]
        left = []
        for part, record in zip(due, found, strict=True):
            _report(part, record, logs)
            given = part.limit + spare * part.greedy
            left.append(given - (record["seconds"] - record["start_s"]))
        spare = max(0.0, min(left, default=spare))
    return run


def _not_run(part: Part, args: argparse.Namespace, left: float) -> dict[str, Any] | None:
    """The record of a part that can't be run here, or in the seconds left; None where it can."""
    reason = unsupported_reason(part, args)
    if reason is not None:
        return {"status": "unavailable", "reason": reason, "figures": {}}
    if part.limit <= left:
        return None
    reason = f"its {part.limit:.0f} s do not fit into the {max(0.0, left):.0f} s left"
    return {"status": "skipped", "reason": reason, "figures": {}}


def _report(part: Part, record: dict[str, Any], logs: Path) -> None:
    reason = f": {record['reason']}" if "reason" in record else ""
    seconds = f", {record['seconds']} s" if "seconds" in record else ""
    print(f"{part.name:10} {record['status']}{seconds}{reason}", flush=True)
    if record["status"] in FAILURES:
        log = logs / f"{part.name}.log"
        print("    " + "\n    ".join(log.read_text(errors="replace").splitlines()[-12:]))


def _show(result: dict[str, Any]) -> None:
    """The figures beside their targets, and those that have none."""
    print()
    print("\n".join(table.text(table.rows(result["parts"], toy=result["toy"]))))
    for lines in details.sections(result["parts"]):
        print()
        print("\n".join(lines))


def cuda_device() -> str | None:
    """Name of the first device, or None; makes no context, so that it costs the parts nothing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
    )
    return None if failed else name.value.decode()


if __name__ == "__main__":
    sys.exit(main())
