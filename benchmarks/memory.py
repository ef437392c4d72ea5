"""KV memory on one trace of real lengths: writes the tables and the plot of docs/memory.md.

    python benchmarks/memory.py             # `batchrun bench memory` into docs/
    python benchmarks/memory.py --record    # lengths of a real run, for batchrun/report/memory.py

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from batchrun.allocator.compare import table8
from batchrun.report import chart, memory

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "examples" / "prompts.parquet"
RECORDING = ("--chat", "--temperature", "0.7", "--top-p", "0.95", "--seed", "1")


def main() -> int:
    if "--record" in sys.argv:
        return record()
    found = [(case, memory.compare(case)) for case in memory.CASES]
    (ROOT / "docs" / "img" / "memory.svg").write_text(chart.draw(*found[0]), encoding="utf-8")
    tables = {
        "compared": "\n\n".join(memory.render_case(case, runs) for case, runs in found),
        "table8": memory.render_table8(table8()),
    }
    for name, table in tables.items():
        print(table, end="\n\n")
        replace(ROOT / "docs" / "memory.md", name, table)
    cases = [memory.as_dict(case, runs) for case, runs in found]
    print(json.dumps({"benchmark": "memory", "cases": cases}))
    return 0


def replace(path: Path, name: str, table: str) -> None:
    """Put a table between its two marks in a document."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, rest = path.read_text(encoding="utf-8").split(begin)
    text = f"{head}{begin}```\n{table}\n```\n{end}{rest.split(end)[1]}"
    path.write_text(text, encoding="utf-8")


def record() -> int:
    """Run the example prompts through the embedded model and print the pairs of lengths."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "completions.parquet")
        command = (sys.executable, "-m", "batchrun", "submit", str(PROMPTS), *RECORDING)
        subprocess.run((*command, "--output", str(output), "--wait"), check=True, cwd=ROOT)
        rows = pq.read_table(output, columns=["prompt_tokens", "completion_tokens"]).to_pylist()
    pairs = [f"{row['prompt_tokens']}+{row['completion_tokens']}" for row in rows]
    print(textwrap.fill(" ".join(pairs), 96))
    return 0


if __name__ == "__main__":
    sys.exit(main())
