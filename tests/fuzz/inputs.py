"""What is right of any input that is text: all ways to its rows agree."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.jobs.rows.delimited import record_of
from batchrun.jobs.rows.row import Row, Source, valid_text
from batchrun.jobs.rows.source import expand_inputs, open_source
from tests.fuzz.trial import Wrong

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
}
_UNPACKERS = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": lambda data: _streams(bz2.BZ2Decompressor, data),
    b"\xfd7zXZ\0": lambda data: _streams(lzma.LZMADecompressor, data),
    b"\x28\xb5\x2f\xfd": lambda data: pa.CompressedInputStream(pa.py_buffer(data), "zstd").read(),
}


def opened(path: Path) -> Source:
    parts, kind = expand_inputs([str(path)])
    return open_source(parts, kind)


def rows_of(source: Source) -> list[Row]:
    """All rows of a source, read in every way that there is.

    Raises:
        Wrong: Two ways don't agree.
    """
    rows = list(source.rows())
    if [row.index for row in rows] != list(range(len(rows))) or source.count() != len(rows):
        raise Wrong(f"{source.count()} rows are counted, {len(rows)} read")
    schema = source.schema()
    objects: list[Any] = []
    cells: list[str | None] = []
    digests: list[int | None] = []
    batches = []
    for chunk in source.chunks():
        objects += chunk.objects()
        found = chunk.cells(schema.names, ",")
        cells += [None if values is None else record_of(values, ",") for values in found]
        digests += chunk.digests(source.column_names)
        batches.append(chunk.arrow(schema))
        batches[-1].validate(full=True)
    if not len(rows) == len(objects) == len(cells) == sum(batch.num_rows for batch in batches):
        raise Wrong(f"{len(rows)} rows, {len(objects)} objects, {len(cells)} records")
    if digests != [row.digest for row in rows]:
        raise Wrong("digests of chunks are not those of rows")
    for row, found, record in zip(rows, objects, cells, strict=True):
        if (row.error is None) != (found is not None) or (row.error is None) != (
            record is not None
        ):
            raise Wrong(f"row {row.index} is {row.error!r}, and carried as {found!r}, {record!r}")
        if found is not None:
            carried = json.loads(found) if isinstance(found, str) else found
            if plain(carried) != plain(row.fields):
                raise Wrong(
                    f"row {row.index} is {row.fields!r:.300}, and carried as {found!r:.300}"
                )
    pq.write_table(pa.Table.from_batches(batches, schema), io.BytesIO())
    return rows


def text_in(data: bytes) -> str | None:
    """What Python's own modules read, where a file can be unpacked and is UTF-8 or UTF-16."""
    try:
        for magic, unpack in _UNPACKERS.items():
            if data.startswith(magic):
                data = unpack(data)
                break
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    except Exception:
        return None


def _streams(make: Callable[[], Any], data: bytes) -> bytes:
    """All of the streams, which Python's own functions read up to one that is none."""
    unpacked = b""
    while data:
        stream = make()
        unpacked += stream.decompress(data)
        if not stream.eof:
            raise EOFError
        data = stream.unused_data.lstrip(b"\0")
    return unpacked


def plain(value: Any) -> Any:
    """JSON by the rules of `batchrun.jobs.rows.jsontext`, to be compared."""
    if isinstance(value, dict):
        return {valid_text(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, float):
        found = float(value)
        return repr(found) if abs(found) < float("inf") else None
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value) if len(str(value)) <= 308 else "a long one"
    return value


def deep(value: Any, most: int) -> bool:
    """Whether a value has more levels."""
    level: Sequence[Any] = [value]
    while level and most >= 0:
        items = [v.values() if isinstance(v, dict) else v for v in level]
        level = [item for inner in items for item in inner if isinstance(item, dict | list)]
        most -= 1
    return bool(level)
