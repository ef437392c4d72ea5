"""Cells of CSV and TSV as they are written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs.jsontext import encode

PACKED = {".gz", ".zst", ".bz2", ".xz"}  # suffixes behind that which says the format
_SPECIAL = re.compile(r'["\r\n,;\t|]|^\s|\s$')


def delimiter_of(path: Path) -> str:
    """What separates cells in an output of this name: a tab, or a comma."""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        suffix = Path(path.stem).suffix.lower()
    return "\t" if suffix == ".tsv" else ","


def joined(values: Iterable[Any], delimiter: str) -> str:
    """One record, without the line's end. Lists and objects are JSON."""
    return delimiter.join(map(_cell, values))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        text = str(value)
    else:
        text = encode(value)
    if text in ("nan", "inf", "-inf") and isinstance(value, float):
        return ""
    return '"' + text.replace('"', '""') + '"' if not text or _SPECIAL.search(text) else text
