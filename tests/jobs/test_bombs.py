"""Text that unpacks to far more than it is: it ends or is refused, in bounded time and memory."""

import bz2
import gzip
import json
import lzma
import sys
import time
import tracemalloc

import pytest

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.source import expand_inputs, open_source

ROW, RECORD = b'{"prompt": "hi"}\n', b"hi,1\n"
HEAD = b"prompt,id\n"
MIB = 1 << 20


def bomb(path, head, piece, times, tail=b""):
    with gzip.open(path, "wb", 1) as file:
        file.write(head)
        for _ in range(times):
            file.write(piece)
        file.write(tail)
    parts, kind = expand_inputs([str(path)])
    return lambda: open_source(parts, kind)


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("lines.jsonl.gz", (ROW, b"\n" * MIB, ROW), 2),
        ("first.jsonl.gz", (b"", b"\n" * MIB, ROW), 1),
        ("blank.jsonl.gz", (ROW, b" " * MIB, b"\n" + ROW), 2),
        ("mixed.jsonl.gz", (ROW, b" \t\r\n" * (MIB // 4), ROW), 2),
        ("array.json.gz", (b'[{"a": 1},', b" " * MIB, b'{"a": 2}]'), 2),
        ("after.json.gz", (b'[{"a": 1}]', b"\n" * MIB, b""), 1),
        ("lines.csv.gz", (HEAD + RECORD, b"\n" * MIB, RECORD), 2),
        ("first.csv.gz", (b"", b"\n" * MIB, HEAD + RECORD), 1),
        ("crlf.csv.gz", (HEAD + RECORD, b"\r\n" * (MIB // 2), RECORD), 2),
        ("returns.csv.gz", (b"prompt,id\rhi,1\r", b"\r" * MIB, b"hi,2\r"), 2),
    ],
)
def test_what_is_blank_is_passed_over_at_once(tmp_path, name, text, rows):
    head, piece, tail = text
    source = bomb(tmp_path / name, head, piece, 8, tail)
    calls = 0

    def called(frame, event, argument):
        nonlocal calls
        calls += 1

    sys.setprofile(called)
    try:
        assert source().count() == rows
    finally:
        sys.setprofile(None)
    assert calls < 100_000  # line by line they are millions


def test_lines_are_counted_where_they_are_passed_over(tmp_path):
    for name, text in (
        ("in.jsonl", b"\n\n" + ROW + b"\n \n\n" + b"broken\n" + ROW),
        ("in.csv", b"\n\n" + HEAD + b"\n\r\n\n" + b"hi\n" + RECORD),
    ):
        path = tmp_path / name
        path.write_bytes(text)
        parts, kind = expand_inputs([str(path)])
        [error] = [row.error for row in open_source(parts, kind).rows() if row.error]
        assert error.startswith(f"line 7 of {name} ")


@pytest.mark.parametrize(
    ("name", "head", "piece"),
    [
        ("line.jsonl.gz", ROW * 2, b"x" * MIB),
        ("value.json.gz", b'\n\n[{"a": "', b"x" * MIB),
        ("quote.csv.gz", HEAD + RECORD + b'"', (b"x" * 63 + b"\n") * (MIB // 64)),
        ("cell.csv.gz", HEAD + RECORD, b"x" * MIB),
        ("cell.tsv.gz", b"prompt\tid\rhi\t1\r", b"x" * MIB),
    ],
)
def test_one_endless_row_is_refused_in_bounded_memory(tmp_path, monkeypatch, name, head, piece):
    for module in ("jsonl", "delimited"):
        monkeypatch.setattr(f"batchrun.jobs.rows.{module}.MAX_RECORD", MIB)
    source = bomb(tmp_path / name, head, piece, 32)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"line 3 of .* is longer than 1 MiB"):
            source().count()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB  # csv's reader takes four bytes a character, and doubles what it has


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
@pytest.mark.parametrize("after", [b"garbage", b"damaged", b"\0" * 5000])
def test_what_follows_a_packed_stream_is_read_or_refused(tmp_path, pack, after):
    """Python's own readers end there without a word, and the rows behind it were lost."""
    path = tmp_path / "in.jsonl"
    second = bytearray(pack(ROW))
    if after == b"damaged":
        second[1] ^= 1
    path.write_bytes(pack(ROW) + (after if after != b"damaged" else b"") + second)
    parts, kind = expand_inputs([str(path)])
    if after.strip(b"\0"):
        with pytest.raises(InputError, match=r"in\.jsonl is damaged"):
            open_source(parts, kind).count()
    else:
        assert open_source(parts, kind).count() == 2


def test_a_row_with_many_blanks_is_carried_in_time_that_grows_with_its_size(tmp_path):
    path = tmp_path / "in.json"
    blanks = " " * (1 << 19)
    path.write_text(f'[{{"prompt":\n"{blanks}"}}]')
    parts, kind = expand_inputs([str(path)])
    began = time.process_time()
    [chunk] = open_source(parts, kind).chunks()
    assert [json.loads(text) for text in chunk.objects()] == [{"prompt": blanks}]
    assert time.process_time() - began < 10  # a square of the blanks takes minutes


def test_a_first_line_that_is_nested_without_end_is_a_bad_row(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"[" * 100_000 + b"\n" + ROW)
    parts, kind = expand_inputs([str(path)])
    with pytest.raises(InputError, match=r"in\.jsonl"):
        open_source(parts, kind)
    path.write_bytes(ROW + b"[" * 100_000 + b"\n" + ROW)
    rows = list(open_source(parts, kind).rows())
    assert [row.error is None for row in rows] == [True, False, True]


def test_a_number_smaller_than_any_decimal_keeps_its_text(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "hi", "x": 1e-99999999999999999999}\n')
    source = open_source(expand_inputs([str(path)])[0], "jsonl")
    assert str(source.schema().field("x").type) == "string"
    [chunk] = source.chunks()
    assert chunk.arrow(source.schema())["x"].to_pylist() == ["1e-99999999999999999999"]
