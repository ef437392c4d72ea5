"""Tries many mutants of every kind of file that batchrun reads.

    python -m tests.fuzz                         # 2,000 of each
    python -m tests.fuzz parquet --mutants 50000 --seed 7 --keep /tmp/escaped

What escapes (no right data and no typed error, but an internal error, a signal, a hang, or more
memory than its bound) is kept as a file. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from hashlib import blake2b
from pathlib import Path

from tests.fuzz.targets import all_targets
from tests.fuzz.trial import attempt, mutants


def main() -> int:
    targets = all_targets()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("targets", nargs="*", choices=[[], *targets], help="all by default")
    parser.add_argument("--mutants", type=int, default=2000, help="of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for what escapes")
    options = parser.parse_args()
    began, tried, escaped = time.perf_counter(), {}, []
    for name in options.targets or targets:
        report = attempt(targets[name], mutants(targets[name], options.mutants, options.seed))
        tried[name] = dict(report.outcomes)
        print(f"{name:20} {dict(report.outcomes)}")
        for of, how, data in report.escaped:
            digest = blake2b(data, digest_size=6).hexdigest()
            print(f"ESCAPED {name} {of} {digest}: {how}", file=sys.stderr)
            escaped.append(f"{name} {digest}: {how.splitlines()[0][:200]}")
            if options.keep is not None:
                (options.keep / name).mkdir(parents=True, exist_ok=True)
                (options.keep / name / f"{of}-{digest}").write_bytes(data)
    figures = {
        "benchmark": "fuzz",
        "seed": options.seed,
        "mutants": sum(sum(outcomes.values()) for outcomes in tried.values()),
        "outcomes": tried,
        "escaped": escaped,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(figures))
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
