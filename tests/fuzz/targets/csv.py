"""CSV and TSV as input, packed and encoded."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from batchrun.jobs.errors import InputError
from tests.fuzz.inputs import PACKERS, opened, rows_of, text_in
from tests.fuzz.trial import Target, Wrong

NAMES = ("prompt", "id", "of")


def _records(delimiter: str = ",", end: str = "\n", quoting: Any = csv.QUOTE_MINIMAL) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerow(NAMES)
    for i in range(50):
        writer.writerow([f"row {i}, é\u2028", i, 'a "quote"\nand a line' * (i % 3)])
    return text.getvalue().encode()


def seeds(scratch: Path) -> dict[str, bytes]:
    return {
        "plain": _records(),
        "quoted": _records(quoting=csv.QUOTE_ALL, end="\r\n"),
        "semicolons": _records(";"),
        "returns": _records(end="\r"),
        "tabs": _records("\t"),
        "bom": b"\xef\xbb\xbf" + _records(),
        "utf16": _records().decode().encode("utf-16"),
        **{name: pack(_records()) for name, pack in PACKERS.items()},
    }


def check(name: str, data: bytes, scratch: Path) -> str:
    """Records are those of Python's csv, up to the first that it refuses."""
    path = scratch / ("rows.tsv" if name == "tabs" else "rows.csv")
    path.write_bytes(data)
    rows = rows_of(opened(path))
    text = text_in(data)
    if text is None:
        raise Wrong("it can't be unpacked, and has rows")
    wanted = [] if "\r" in text else _wanted(text, {"tabs": "\t", "semicolons": ";"}.get(name, ","))
    for row, (cells, valid) in zip(rows, wanted, strict=False):
        found = list(row.fields.values()) if row.error is None else None
        if valid != (found is not None):
            raise Wrong(f"row {row.index} is {row.error or found!r:.200}, not {cells!r:.200}")
        if found is not None and [cell or "" for cell in found] != cells:
            raise Wrong(f"row {row.index} is {found!r:.200}, not {cells!r:.200}")
    return "rows"


def _wanted(text: str, delimiter: str) -> list[tuple[list[str], bool]]:
    """Cells of each record, and whether it is a good row; none where the header was damaged."""
    records = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    found: list[tuple[list[str], bool]] = []
    try:
        header = next(cells for cells in records if cells)
        if tuple(header) != NAMES:
            return []
        for cells in records:
            if cells:
                lone = any("\udc80" <= c <= "\udcff" for cell in cells for c in cell)
                found.append((cells, len(cells) == len(header) and not lone))
    except (csv.Error, StopIteration):
        pass
    return found


TARGETS = [Target("csv", seeds, check, (InputError,))]
