"""JSON Lines as input."""

from __future__ import annotations

import json
from pathlib import Path

from jobs.errors import InputError
from jobs.source import open_source
from tests.fuzz.trial import Target, Wrong

ROWS = [
    {"prompt": f"row {i}", "id": i, "of": {"a": [i, None, 1.5e3], "text": "é\u2028\n" * i}}
    for i in range(40)
]


def seeds(scratch: Path) -> dict[str, bytes]:
    return {"plain": "".join(json.dumps(row) + "\n" for row in ROWS).encode()}


def check(name: str, data: bytes, scratch: Path) -> str:
    """Every line that is a JSON object is the row of its number; others are errors of theirs."""
    path = scratch / "rows.jsonl"
    path.write_bytes(data)
    source = open_source([path], "jsonl")
    rows = list(source.rows())
    if [row.index for row in rows] != list(range(len(rows))) or source.count() != len(rows):
        raise Wrong(f"{source.count()} rows are counted, {len(rows)} read")
    source.schema()
    return "rows"


TARGETS = [Target("jsonl", seeds, check, (InputError,))]
