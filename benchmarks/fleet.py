"""Two workers on the CPU against one engine on the same cores: what a fleet costs.

    python -m benchmarks.fleet [--workloads mixed long-tail] [--times 3] [--repeat 2]

Jobs through `batchrun submit`, one way after the other, with the embedded model and `--times` the
rows of a workload. The outputs must be equal, byte by byte. The last line of stdout is one JSON
object: seconds of the whole run and of its engines, the fleet's over the single engine's, and how
long each worker had nothing to do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from batchrun.machine import description
from benchmarks.workloads import WORKLOADS, generate, write

WAYS = {"one": ["--device", "cpu"], "two": ["--devices", "cpu:2"]}


def run(source: Path, output: Path, options: list[str]) -> dict[str, Any]:
    """One job; its summary."""
    batchrun = [sys.executable, "-m", "batchrun"]
    command = [*batchrun, "submit", source, "--output", output, "--overwrite", "--again", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    shown = subprocess.run(
        [*batchrun, "stats", "--json"], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["mixed", "long-tail"])
    parser.add_argument("--times", type=int, default=3, help="the rows that a workload has")
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "fleet", "machine": description(), "workloads": {}}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["BATCHRUN_HOME"] = str(root / "home")
        for workload in options.workloads:
            source = root / f"{workload}.jsonl"
            rows = WORKLOADS[workload][1] * options.times
            write(source, generate(workload, rows))
            found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for _ in range(options.repeat):
                for way, chosen in WAYS.items():
                    found[way].append(run(source, root / f"{way}.jsonl", chosen))
                one, two = ((root / f"{way}.jsonl").read_bytes() for way in WAYS)
                assert one == two, "the outputs differ"
            shown: dict[str, Any] = {"rows": rows}
            report["workloads"][workload] = shown
            for part in ("wall_s", "engine_s"):
                for way, runs in found.items():
                    seconds = statistics.median(r["time"][part] for r in runs)
                    shown[f"{way}_{part}"] = round(seconds, 2)
                shown[f"{part}_ratio"] = round(shown[f"two_{part}"] / shown[f"one_{part}"], 3)
            shown["idle"] = [
                [round(d["idle_s"] / r["time"]["engine_s"], 3) for d in r["devices"]]
                for r in found["two"]
            ]
            print(workload, json.dumps(shown), file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
