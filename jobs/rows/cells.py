"""Cells of CSV and TSV as they are written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from batchrun.jobs.rows.jsontext import as_text
from batchrun.jobs.rows.rowformat import suffixes

_SPECIAL = re.compile(r'["\r\n,;\t|]|^\s|\s$')


def delimiter_of(path: Path) -> str:
    """What separates cells in an output of this name: a tab, or a comma."""
    return "\t" if suffixes(path)[0] == ".tsv" else ","


def joined(values: Iterable[Any], delimiter: str) -> str:
    """One record, without the line's end. Lists and objects are JSON."""
    return delimiter.join(map(_cell, values))


def _cell(value: Any) -> str:
    text = as_text(value)
    if text is None:
        return ""
    return '"' + text.replace('"', '""') + '"' if not text or _SPECIAL.search(text) else text
