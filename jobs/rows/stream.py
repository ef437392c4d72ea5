"""The text in a file, whatever its compression or encoding; other kinds of files are named.

    file -> its first `size` bytes -> unpacked -> UTF-8

Compression and encoding are recognised by a file's first bytes, never by its name.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import pyarrow as pa

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.row import damaged, reading
from batchrun.jobs.rows.store import INPUTS
from batchrun.objectstore.paths import Location

MAX_RECORD = 256 << 20  # bytes of a row; more is a file of another kind
_BUFFER = 1 << 18
_ZSTD_WINDOW = 1 << 27  # bytes: the largest that Arrow unpacks, and that `zstd --long` makes

# First bytes, what such a file is, and what to do with it.
_FOREIGN = (
    (b"PAR1", "a Parquet file", "give it a name that ends in .parquet"),
    (b"PK\x03\x04", "a ZIP archive (or an Excel file)", "unpack it, or save it as CSV"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "write it as Parquet"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"\x89HDF", "an HDF5 file", "write it as Parquet"),
    (b"Obj\x01", "an Avro file", "write it as Parquet"),
    (b"ORC", "an ORC file", "write it as Parquet"),
    (b"%PDF", "a PDF", "extract its text first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "git lfs pull"),
    (b"<!doctype", "a web page, not the data", "open it: it may say what went wrong"),
    (b"<html", "a web page, not the data", "open it: it may say what went wrong"),
)
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNPACKERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": lambda file: _Pieces(file, _streams(file, bz2.BZ2Decompressor)),
    b"\xfd7zXZ\x00": lambda file: _Pieces(
        file, _streams(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))
    ),
}


@contextmanager
def text_of(path: Location, size: int | None = None) -> Iterator[io.BufferedReader]:
    """A file's text as UTF-8 bytes, without a byte order mark.

    Args:
        path: The file.
        size: Read only this many of its bytes, before unpacking: not what was appended later.

    Raises:
        InputError: It can't be read, is damaged, or is not text.
    """
    with reading(path), INPUTS.open(path, buffering=0) as raw:
        try:
            yield _decoded(path, _unpacked(path, raw, size))
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise damaged(path, error) from error


def skip(file: io.BufferedReader, what: re.Pattern[bytes]) -> int:
    """Skip what matches, however long it is; return the number of line ends in it."""
    lines = 0
    while found := what.match(file.peek()):
        lines += max(found[0].count(b"\n"), found[0].count(b"\r"))
        file.read(len(found[0]))
    return lines


def _unpacked(path: Location, raw: IO[bytes], size: int | None) -> io.BufferedReader:
    file = io.BufferedReader(
        cast(io.RawIOBase, raw if size is None else _Pieces(raw, _first(raw, size))), _BUFFER
    )
    head = file.peek(16)
    for magic, unpack in _UNPACKERS.items():
        if head.startswith(magic):
            return io.BufferedReader(unpack(file), _BUFFER)
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        window = _zstd_window(head)
        if window > _ZSTD_WINDOW:
            raise InputError(
                f"{path} is compressed with a zstd window of {window >> 20:,} MiB; "
                f"at most {_ZSTD_WINDOW >> 20} MiB are supported",
                hint=f"decompress it first: zstd -d --long=31 '{path}'",
            )
        stream = pa.CompressedInputStream(file, "zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream), _BUFFER)
    return cast(io.BufferedReader, file)


def _zstd_window(head: bytes) -> int:
    """A zstd frame's window in bytes (RFC 8878, section 3.1.1.1); 0 if `head` doesn't tell."""
    if head[:1] != b"\x28" or len(head) < 6:
        return 0
    flags = head[4]
    if flags & 0x20:  # a single segment: its window is its content
        skip, width = (0, 1, 2, 4)[flags & 3], (1, 2, 4, 8)[flags >> 6]
        return int.from_bytes(head[5 + skip : 5 + skip + width], "little")
    exponent, mantissa = head[5] >> 3, head[5] & 7
    return (1 << (10 + exponent)) // 8 * (8 + mantissa)


def _decoded(path: Location, file: io.BufferedReader) -> io.BufferedReader:
    head = file.peek(64)
    for mark, encoding in _ENCODINGS:
        if head.startswith(mark):
            return io.BufferedReader(_Pieces(file, _recoded(path, file, encoding)), _BUFFER)
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
        head = head[len(codecs.BOM_UTF8) :]
    for magic, what, advice in _FOREIGN:
        if head[: len(magic)].lower() == magic.lower():
            raise InputError(f"{path} is {what}", hint=advice)
    if len(head) >= 4 and (head[:4:2] == b"\0\0") != (head[1:4:2] == b"\0\0"):
        order = "BE" if head[0] == 0 else "LE"
        raise InputError(
            f"{path} looks like UTF-16 without a byte order mark",
            hint=f"iconv -f UTF-16{order} -t UTF-8 '{path}' > utf8-{path.name}",
        )
    return file


class _Pieces(io.RawIOBase):
    """A file of the pieces that a generator makes from another file, which stays open."""

    def __init__(self, file: IO[bytes], pieces: Iterator[bytes]) -> None:
        self._file, self._pieces, self._rest = file, pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        taken = min(len(buffer), len(self._rest))
        buffer[:taken], self._rest = self._rest[:taken], self._rest[taken:]
        return taken


def _first(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The first bytes of a file."""
    while size and (data := file.read(min(size, _BUFFER))):
        size -= len(data)
        yield data


def _streams(file: IO[bytes], make: Callable[[], Any]) -> Iterator[bytes]:
    """The content of successive bzip2 or xz streams.

    Python's own readers take a damaged beginning of a later stream for the end of the file, and
    would lose everything after it.
    """
    unpacker = make()
    while True:
        packed = b""
        if unpacker.eof:
            packed = unpacker.unused_data.lstrip(b"\0")  # padding between streams
            while not packed and (packed := file.read(_BUFFER)):
                packed = packed.lstrip(b"\0")
            if not packed:
                return
            unpacker = make()
        elif unpacker.needs_input:
            packed = file.read(_BUFFER)
            if not packed:
                raise EOFError("its compressed data ends early")
        if data := unpacker.decompress(packed, _BUFFER):
            yield data


def _recoded(path: Location, file: IO[bytes], encoding: str) -> Iterator[bytes]:
    """The text of a file in another encoding, as UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)()
    data = b" "
    while data:
        data = file.read(_BUFFER)
        try:
            yield decoder.decode(data, final=not data).encode()
        except UnicodeError as error:
            raise InputError(
                f"{path} is not valid {encoding.upper()}: {error}", hint="write it as UTF-8"
            ) from error
