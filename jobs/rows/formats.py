"""The formats of inputs and outputs, and how file names and first bytes tell them apart."""

from __future__ import annotations

from batchrun.jobs.errors import OutputError
from batchrun.jobs.rows.delimited import CsvFormat
from batchrun.jobs.rows.jsonl import JsonFormat
from batchrun.jobs.rows.parquet import ParquetFormat
from batchrun.jobs.rows.row import reading
from batchrun.jobs.rows.rowformat import PACKINGS, WRITTEN_PACKINGS, RowFormat, suffixes
from batchrun.jobs.rows.store import INPUTS
from batchrun.jobs.rows.stream import text_of
from batchrun.objectstore.paths import Location

# By name; a file whose name implies none has the first format whose `begins` accepts it.
FORMATS: dict[str, RowFormat] = {f.name: f for f in (ParquetFormat(), JsonFormat(), CsvFormat())}


def input_format(path: Location) -> RowFormat | None:
    """The format that an input's name implies, if any."""
    suffix, packing = suffixes(path)
    for known in FORMATS.values():
        if suffix in known.suffixes + known.input_suffixes and not (packing and known.columnar):
            return known
    return None


def output_format(path: Location) -> str:
    """The name of the format that an output's name asks for.

    Raises:
        OutputError: The name implies no known format.
    """
    suffix, packing = suffixes(path)
    for known in FORMATS.values():
        packings = ("",) if known.columnar else ("", *WRITTEN_PACKINGS)
        if suffix in known.suffixes and packing in packings:
            return known.name
    *names, last = [name for known in FORMATS.values() for name in known.suffixes]
    raise OutputError(
        f"{path}: its name does not say which format to write",
        hint=f"use a name that ends in {', '.join(names)} or {last}; "
        f"{' or '.join(WRITTEN_PACKINGS)} may follow, except for Parquet",
    )


def input_names() -> str:
    """The suffixes of inputs, in words."""
    names = [n for known in FORMATS.values() for n in known.suffixes + known.input_suffixes]
    *packings, last = PACKINGS
    return f"{', '.join(names)}; {', '.join(packings)} or {last} may follow, except for Parquet"


def sniffed(path: Location) -> RowFormat | None:
    """The format of a file by its first bytes; None if they don't tell.

    Raises:
        InputError: It can't be read, or is known to be another kind of file.
    """
    with reading(path), INPUTS.open(path) as file:
        head = file.read(16)
    for known in FORMATS.values():
        if known.columnar and known.begins(head):
            return known
    with text_of(path) as text:
        head = text.peek(1 << 16).lstrip()
    return next((f for f in FORMATS.values() if not f.columnar and f.begins(head)), None)
