"""What is kept of a check: its JSON and its logs, after each part, and an earlier check's parts."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import table
from benchmarks.gpu.parts import PARTS, ROOT

TOY_DEVICE = "CPU rehearsal, 1 thread"
Records = dict[str, dict[str, Any]]


def summary(
    records: Records, args: argparse.Namespace, seconds: float, earlier: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON of the check; `earlier` is that of the check it continues, or empty."""
    measured = [record for record in records.values() if "device" in record]
    source = measured[0] if measured else earlier
    commands = [earlier["command"]] if earlier else []
    return {
        "benchmark": "gpu-check",
        "toy": args.toy,
        "date": time.strftime("%Y-%m-%d"),
        "command": " && ".join([*commands, " ".join([_MODULE, *sys.argv[1:]])]),
        "commit": args.commit,
        "device": source.get("device", {}),
        "versions": source.get("versions", {}),
        "seconds": round(seconds + earlier.get("seconds", 0.0), 1),
        "table": [row.as_dict() for row in table.rows(records, toy=args.toy)],
        "parts": {
            part.name: {
                k: v for k, v in records[part.name].items() if k not in ("device", "versions")
            }
            for part in PARTS
            if part.name in records
        },
    }


_MODULE = "python -m benchmarks.gpu.check"


def save(out: Path, result: Mapping[str, Any], logs: Path) -> None:
    """Write the JSON, and beside it an archive of the logs; each whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(out)
    with tarfile.open(unfinished, "w:gz") as archive:
        for log in sorted(logs.iterdir()):
            archive.add(log, f"logs/{log.name}")
    unfinished.replace(archive_of(out))


def archive_of(out: Path) -> Path:
    """Where the logs of the check lie whose JSON is `out`."""
    return out.with_name(f"{out.stem}-logs.tar.gz")


def earlier_check(path: Path, commit: str, device: str) -> tuple[dict[str, Any], str | None]:
    """A check to continue, and why it can't be: figures of two programs or devices don't mix."""
    found: dict[str, Any] = json.loads(path.read_text())
    if commit == "unknown":
        return {}, "the commit is not known here; say it with --commit"
    if found["commit"] != commit:
        return {}, f"{path} is of commit {found['commit']}, and this is {commit}"
    its = found["device"].get("name", device)
    if its != device:
        return {}, f"{path} is of {its}, and this is {device}"
    return found, None


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


def result_file(result: Mapping[str, Any]) -> Path | None:
    """Where the whole check of a device is kept for good; None for parts of one, or a rehearsal."""
    complete = {part.name for part in PARTS} == {
        name for name, record in result["parts"].items() if record["status"] != "skipped"
    }
    if result["toy"] or not complete or not result["device"]:
        return None
    name = re.sub(r"\W+", "-", result["device"]["name"].lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
