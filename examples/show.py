"""Prints the first rows of a file of completions: python examples/show.py FILE [ROWS]."""

import sys
import textwrap

import pyarrow.parquet as pq


def main(path: str, count: int = 6) -> None:
    """Prints `count` rows of the Parquet file at `path`, each cut to a few lines."""
    table = pq.read_table(path)
    print(f"{path}: {table.num_rows} rows, columns {', '.join(table.column_names)}")
    for row in table.slice(0, count).to_pylist():
        print(f"\n[{row['id']}] {textwrap.shorten(row['prompt'], 160)}")
        answer = row["error"] or textwrap.shorten(row["completion"], 320)
        print(textwrap.fill(answer, 96, initial_indent="    ", subsequent_indent="    "))


if __name__ == "__main__":
    main(sys.argv[1], *(int(count) for count in sys.argv[2:3]))
