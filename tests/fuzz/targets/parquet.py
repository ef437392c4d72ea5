"""Parquet as input."""

from __future__ import annotations

import io
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.delimited import record_of
from batchrun.jobs.rows.jsonable import json_values
from batchrun.jobs.rows.source import expand_inputs, open_source
from batchrun.jobs.rows.store import Noted, unnoted
from batchrun.runner.isolated import isolated
from tests.fuzz.mutate import damaged
from tests.fuzz.thrift import Span, spans, varint
from tests.fuzz.trial import Target, Wrong

ROWS = 60
_CHECKED = {"checked", "nested2"}  # seeds whose pages have checksums
_NUMBERS = [0, 1, 2, 3, 5, 7, 64, 127, 128, 255, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40]
_NUMBERS += [(1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def _texts() -> pa.Table:
    return pa.table(
        {
            "prompt": [f"row {i} " + "é\u2028" * (i % 5) for i in range(ROWS)],
            "id": range(ROWS),
            "of": pa.array([None if i % 7 == 0 else f"kind {i % 3}" for i in range(ROWS)]),
        }
    )


def _nested() -> pa.Table:
    return pa.table(
        {
            "prompt": [f"row {i}" for i in range(ROWS)],
            "messages": [
                [{"role": "user", "content": f"{i} {j}"} for j in range(i % 3)] for i in range(ROWS)
            ],
            "deep": [None if i % 5 == 0 else [[i], [], [None, i]] for i in range(ROWS)],
            "of": [{"a": i, "b": {"c": [i] * (i % 4)}} for i in range(ROWS)],
            "pairs": pa.array(
                [[("k", i), ("l", None)] for i in range(ROWS)], pa.map_(pa.string(), pa.int32())
            ),
        }
    )


def _kinds() -> pa.Table:
    day = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    return pa.table(
        {
            "prompt": pa.array([f"row {i}" for i in range(ROWS)], pa.large_string()),
            "kind": pa.array([f"kind {i % 4}" for i in range(ROWS)]).dictionary_encode(),
            "at": pa.array([day] * ROWS, pa.timestamp("us", "UTC")),
            "day": pa.array([date(2026, 1, 2)] * ROWS),
            "sum": pa.array([Decimal(i) / 8 for i in range(ROWS)], pa.decimal128(20, 3)),
            "raw": pa.array([bytes([i] * 4) for i in range(ROWS)], pa.binary(4)),
            "yes": pa.array([None if i % 9 == 0 else i % 2 == 0 for i in range(ROWS)]),
            "part": pa.array([i / 7 for i in range(ROWS)], pa.float32()),
            "took": pa.array(range(ROWS), pa.duration("ms")),
            "small": pa.array([i % 100 for i in range(ROWS)], pa.uint8()),
        }
    )


def _written(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def _groups() -> bytes:
    """Several groups, one of them without rows."""
    file, table = io.BytesIO(), _texts()
    with pq.ParquetWriter(file, table.schema, write_page_checksum=True) as writer:
        for low, high in ((0, 25), (25, 25), (25, 26), (26, ROWS)):
            writer.write_table(table.slice(low, high - low))
    return file.getvalue()


def seeds(scratch: Path) -> dict[str, bytes]:
    encodings: Any = {
        "prompt": "DELTA_BYTE_ARRAY",
        "id": "DELTA_BINARY_PACKED",
        "of": "DELTA_LENGTH_BYTE_ARRAY",
    }
    return {
        "plain": _written(_texts(), use_dictionary=False, compression="none"),
        "dictionary": _written(_texts(), row_group_size=25),
        "checked": _written(_texts(), write_page_checksum=True, data_page_size=200),
        "groups": _groups(),
        "zstd": _written(_texts(), compression="zstd", data_page_version="2.0", data_page_size=200),
        "delta": _written(
            _texts(), use_dictionary=False, column_encoding=encodings, compression="gzip"
        ),
        "nested": _written(_nested(), data_page_size=300),
        "nested2": _written(
            _nested(), data_page_version="2.0", compression="none", write_page_checksum=True
        ),
        "kinds": _written(_kinds(), compression="lz4", store_decimal_as_integer=True),
        "int96": _written(_kinds(), use_deprecated_int96_timestamps=True, use_dictionary=["kind"]),
    }


# --- damage that knows where things are ----------------------------------------------------------


def mutate(sound: bytes, rng: Random) -> bytes:
    """Damage anywhere, to a value in the footer or in a page's header, or to what pages hold."""
    kind = rng.randrange(5)
    if kind == 0:
        return damaged(sound, rng)
    begin = _footer(sound)
    if kind == 1:
        pages = _pages(sound)
        low, high = rng.choice(pages)[1]
        piece = damaged(sound[low:high], rng)
        return sound[:low] + (piece + bytes(high - low))[: high - low] + sound[high:]
    if kind == 2:
        data = bytearray(sound)
        inside = spans(sound, rng.choice(_pages(sound))[0])[0]
        for _ in range(rng.choice([1, 1, 2])):
            _replace_in_place(data, rng.choice(inside), rng)
        return bytes(data)
    footer = sound[begin:-8]
    if rng.random() < 0.2:
        footer = damaged(footer, rng)
    else:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            try:
                footer = _with_other_value(footer, rng)
            except ValueError:  # it is no structure any more
                break
    size = len(footer) if rng.random() < 0.95 else rng.choice(_NUMBERS) % (1 << 32)
    return sound[:begin] + footer + size.to_bytes(4, "little") + b"PAR1"


def _footer(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def _pages(sound: bytes) -> list[tuple[int, tuple[int, int]]]:
    """Where each page's header begins, and what it holds."""
    found = []
    meta = pq.ParquetFile(io.BytesIO(sound)).metadata
    for group in range(meta.num_row_groups):
        for number in range(meta.num_columns):
            column = meta.row_group(group).column(number)
            at = column.data_page_offset
            if column.has_dictionary_page:  # which comes first
                at = column.dictionary_page_offset
            end = at + column.total_compressed_size
            while at < end:
                inside, begin = spans(sound, at)
                integers = [span for span in inside if span.kind == "integer"]
                size = _zigzag(sound, integers[2])  # type, uncompressed size, compressed size
                found.append((at, (begin, begin + size)))
                at = begin + size
    return found


def _zigzag(data: bytes, span: Span) -> int:
    number = sum((byte & 127) << 7 * i for i, byte in enumerate(data[span.begin : span.end]))
    return number >> 1 ^ -(number & 1)


def _with_other_value(footer: bytes, rng: Random) -> bytes:
    span = rng.choice(spans(footer, 0)[0])
    was = footer[span.begin : span.end]
    if span.kind == "type":
        piece = bytes([rng.choice([was[0] ^ 1 << rng.randrange(8), rng.randrange(256)])])
    elif span.kind == "bytes":
        piece = damaged(was, rng)
        if rng.random() < 0.8:  # of the same length
            piece = (piece + bytes(len(was)))[: len(was)]
    elif rng.random() < 0.5:
        number = _zigzag(was, Span("", 0, len(was))) + rng.choice([-2, -1, 1, 2, 100])
        piece = varint(number << 1 ^ number >> 63)
    else:
        piece = varint(rng.choice(_NUMBERS))
    return footer[: span.begin] + piece + footer[span.end :]


def _replace_in_place(data: bytearray, span: Span, rng: Random) -> None:
    for at in range(span.begin, span.end):
        if rng.random() < 0.5 or span.end - span.begin == 1:
            goes_on = data[at] & 128 if span.kind in ("integer", "length") else 0
            data[at] = goes_on | rng.randrange(128 if goes_on or span.kind == "integer" else 256)


# --- what is right -------------------------------------------------------------------------------


def check(name: str, data: bytes, scratch: Path) -> str:
    """Rows, their number and their columns are what Arrow itself reads, through each way out.

    Where pages have checksums, and nothing else of the file was damaged, it is refused.
    """
    path = scratch / "rows.parquet"
    path.write_bytes(data)
    found = _rows(path, unnoted)
    if name in _CHECKED and _only_pages_differ(_seeds()[name], data):
        raise Wrong("a page that its checksum does not fit is taken")
    return found


def _only_pages_differ(sound: bytes, data: bytes) -> bool:
    """Whether what pages hold was damaged, and nothing else."""
    if data == sound or len(data) != len(sound):
        return False
    left = bytearray(data)
    for _, (begin, end) in _pages(sound):
        left[begin:end] = sound[begin:end]
    return left == sound


@cache
def _seeds() -> dict[str, bytes]:
    return seeds(Path())


def check_isolated(name: str, data: bytes, scratch: Path) -> str:
    """The same in a child process, as batchrun reads files at the command line."""
    path = scratch / "rows.parquet"
    path.write_bytes(data)
    return isolated(lambda note: _rows(path, note.reading))


def _rows(path: Path, noted: Noted) -> str:
    parts, kind = expand_inputs([str(path)])
    source = open_source(parts, kind, noted=noted)
    schema, names = source.schema(), source.column_names
    read: list[list[Any]] = [[] for _ in names]
    lines = cells = indices = 0
    batches = []
    for chunk in source.chunks():
        batch = chunk.arrow(schema)
        batch.validate(full=False)
        batches.append(batch)
        digests = chunk.digests(names)
        if chunk.first != indices or len(digests) != batch.num_rows != chunk.num_rows:
            raise Wrong(f"rows {chunk.first} on: {chunk.num_rows}, {len(digests)} digests")
        indices += chunk.num_rows
        lines += sum(1 for _ in chunk.objects())
        cells += sum(1 for values in chunk.cells(names, ",") if record_of(values, ",") is not None)
        for values, column in zip(read, batch.columns, strict=True):
            values.extend(json_values(column, "replace"))
    rows = [row.index for row in source.rows(names[:2])]
    counts = {source.count(), lines, cells, indices, len(rows)}
    if len(counts) != 1 or rows != list(range(indices)):
        raise Wrong(f"{source.count()} rows are counted; {counts}")
    file = io.BytesIO()
    pq.write_table(pa.Table.from_batches(batches, schema), file)
    said = _arrow_says(path)
    if said is not None and repr(read) != repr(said):
        raise Wrong("the rows are not those that Arrow reads")
    return "rows"


def _arrow_says(path: Path) -> list[list[Any]] | None:
    try:
        table = pq.read_table(path, use_threads=False)
        return [
            [value for piece in column.chunks for value in json_values(piece, "replace")]
            for column in table.columns
        ]
    except Exception:
        return None


TARGETS = [Target("parquet", seeds, check, (InputError,), mutate, isolated=check_isolated)]
