"""Prints the likeliest answer to each question of scored.parquet."""

from pathlib import Path

import pyarrow.parquet as pq

rows = pq.read_table(Path(__file__).parent / "scored.parquet").to_pylist()
best: dict[str, dict[str, object]] = {}
for row in sorted(rows, key=lambda row: row["score_sum"]):
    best[row["question"]] = row
for row in rows:
    if best[row["question"]] is row:
        print(f"{row['question']:36} {row['answer']:24} {row['score_sum']:7.2f}  {row['right']}")
