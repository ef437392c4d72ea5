"""Compare the KV cache with static reservation and with 16-token paging, and print Table 8.

    python -m benchmarks.memory                    # tables; the last line is JSON, all figures
    python -m benchmarks.memory --plot memory.svg  # and a plot of the first comparison
    python -m benchmarks.memory --docs             # the tables and the plot of docs/memory.md
    python -m benchmarks.memory --record           # lengths of a real run, for trace.py

Requests of recorded lengths go through the real scheduler over real memory, with an executor that
computes nothing. Nothing is loaded and no GPU is used; it takes some seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.memory import chart, table8, trace

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "examples" / "prompts.parquet"
RECORDING = ("--chat", "--temperature", "0.7", "--top-p", "0.95", "--seed", "1")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw an SVG file")
    parser.add_argument("--docs", action="store_true", help="write docs/memory.md and its plot")
    parser.add_argument("--record", action="store_true", help="run the prompts, print the lengths")
    options = parser.parse_args(arguments)
    if options.record:
        record()
        return
    found = [(case, trace.compare(case)) for case in trace.CASES]
    cells = table8.table8()
    tables = {
        "compared": "\n\n".join(trace.render_case(case, runs) for case, runs in found),
        "table8": table8.render(cells),
    }
    plots = [options.plot] if options.plot else []
    plots += [ROOT / "docs" / "img" / "memory.svg"] if options.docs else []
    for path in plots:
        path.write_text(chart.draw(*found[0]), encoding="utf-8")
    for name, table in tables.items():
        print(table, end="\n\n")
        if options.docs:
            replace(ROOT / "docs" / "memory.md", name, table)
    cases = [trace.as_dict(case, runs) for case, runs in found]
    print(json.dumps({"benchmark": "memory", "cases": cases, "table8": [asdict(c) for c in cells]}))


def replace(path: Path, name: str, table: str) -> None:
    """Put a table between its two marks in a document."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, rest = path.read_text(encoding="utf-8").split(begin)
    text = f"{head}{begin}```\n{table}\n```\n{end}{rest.split(end)[1]}"
    path.write_text(text, encoding="utf-8")


def record() -> None:
    """Run the example prompts through the embedded model and print the pairs of lengths."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "completions.parquet")
        command = (sys.executable, "-m", "batchrun", "submit", str(PROMPTS), *RECORDING)
        subprocess.run((*command, "--output", str(output), "--wait"), check=True, cwd=ROOT)
        rows = pq.read_table(output, columns=["prompt_tokens", "completion_tokens"]).to_pylist()
    pairs = [f"{row['prompt_tokens']}+{row['completion_tokens']}" for row in rows]
    print(textwrap.fill(" ".join(pairs), 96))


if __name__ == "__main__":
    main()
