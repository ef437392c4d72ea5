"""CSV and TSV, as a source and as an output. Every value is text, as in the file.

An empty cell is null; a cell of two quotes is empty text. A record with more or fewer cells than
the header is a bad row.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.jsontext import as_text
from batchrun.jobs.rows.row import check_names, partition_fields
from batchrun.jobs.rows.rowformat import ROW, TextFormat, suffixes
from batchrun.jobs.rows.store import Part
from batchrun.jobs.rows.stream import MAX_RECORD, skip, text_of
from batchrun.jobs.rows.textsource import Asked, Header, Record, TextSource
from batchrun.objectstore.paths import Location

if TYPE_CHECKING:
    from batchrun.jobs.output.joined import Joined

csv.field_size_limit(MAX_RECORD)  # Python's own limit is less than a long prompt

_DELIMITERS = ",;\t|"  # a .csv uses the one most frequent in its header, the first if tied
_LONE_COLUMNS = (b"prompt", b'"prompt"', b"messages", b'"messages"')
_SPECIAL = re.compile(r'["\r\n,;\t|]|^\s|\s$')
_QUOTED = re.compile(r'"(?:[^"]++|"")*+"')
_BLANK, _BLANK_OF_ANY_END = re.compile(rb"(?:\r?\n)++"), re.compile(rb"[\r\n]++")
_ANY_END = re.compile(rb"\r\n?|\n")
_LINE_END = re.compile(r"\r\n|\r|\n")
_RETURN = "\udc0d"  # replaces a \r inside a line, which Python's csv would take for its end


class DelimitedSource(TextSource):
    """CSV and TSV files; each begins with the names of its columns.

    Raises:
        InputError: A file has no header, or a name is in it twice.
    """

    typed = True
    no_rows = "no record that fits its header"
    advice = "check the delimiter, the quotes and the header"

    def __init__(self, parts: Sequence[Part], *, asked: Asked, lenient: bool) -> None:
        self._headers: dict[Location, tuple[str, ...]] = {}
        self._own: set[str] = set()  # names in any of them
        super().__init__(parts, asked=asked, lenient=lenient)

    @property
    def column_names(self) -> list[str]:
        """Columns of all files, in order of appearance."""
        names = [name for part in self._parts for name in self._headers.get(part.path, ())]
        return list(dict.fromkeys([*names, *self._partition]))

    def partition(self, part: Part) -> dict[str, Any]:
        """See `TextSource.partition`: text if other files have a column of that name."""
        values = super().partition(part)
        for name in self._own & values.keys():
            values[name] = None if values[name] is None else str(values[name])
        return values

    def schema(self) -> pa.Schema:
        """Text, except for columns from folder names."""
        said = {field.name: field.type for field in partition_fields(self._parts)}
        kinds = {**said, **dict.fromkeys(self._own, pa.string())}
        return pa.schema([(name, kinds[name]) for name in self.column_names])

    def records(self, part: Part) -> Iterator[Record]:
        """See `TextSource.records`."""
        with text_of(part.path, part.size) as file:
            skipped = skip(file, _BLANK_OF_ANY_END)
            head = file.peek(1 << 16)
            if head.lstrip().startswith((b'{"', b'[{"')):
                raise InputError(
                    f"{part.path} holds JSON", hint="give it a name that ends in .jsonl"
                )
            bare = _QUOTED.sub("", head.decode("utf-8", "replace"))
            end = _LINE_END.search(bare)
            delimiter = _delimiter(part.path, bare[: end.start()] if end else bare)
            lines = _Lines(part.path, file, skipped, any_end=end is not None and end[0] == "\r")
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            header = Header(self._header(part.path, reader), delimiter)
            while True:
                first, error = lines.begin(), None
                try:
                    cells = next(reader, None)
                except csv.Error as problem:
                    if lines.ended:
                        raise InputError(
                            f"{part.path}: the quote that opens on line {first} is never closed",
                            hint='a quote inside quotes is written twice: ""',
                        ) from problem
                    cells, error = [str(problem)], f"is not valid CSV: {problem}"
                if cells is None:
                    return
                if cells:
                    yield Record(first, lines.taken(), part, header, cells, error)
                else:  # a blank line is not a row
                    lines.skip_blank()

    def _header(self, path: Location, reader: Iterator[list[str]]) -> tuple[str, ...]:
        try:
            found = next((cells for cells in reader if cells), [])
            header = tuple(cell.replace(_RETURN, "\r") for cell in found)
            "".join(header).encode()
        except csv.Error as error:
            raise InputError(f"{path}: its header can't be read: {error}") from error
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path}: its header can't be read: it is not valid UTF-8",
                hint=f"if it is Latin-1: iconv -f WINDOWS-1252 -t UTF-8 '{path}' > "
                f"utf8-{path.name}",
            ) from error
        check_names(path, header, "give its columns different names; the first line is the header")
        self._headers[path] = header
        self._own.update(header)
        return header

    def parse(self, record: Record) -> dict[str, Any]:
        """See `TextSource.parse`."""
        assert record.header is not None
        text, names, cells = record.data.decode(), record.header.names, record.cells
        if len(cells) != len(names):
            raise ValueError(f"has {len(cells)} cells, but the header has {len(names)}")
        values: list[str | None] = [cell or None for cell in cells]
        if None in values and '""' in text:
            raw = _raw_cells(text.rstrip("\r\n"), record.header.delimiter)
            values = [
                "" if value is None and cell else value
                for value, cell in zip(values, raw, strict=False)
            ]
        if "\r" in text:
            values = [value and value.replace(_RETURN, "\r") for value in values]
        return dict(zip(names, values, strict=True))

    def cells(
        self, record: Record, names: Sequence[str], delimiter: str
    ) -> str | Sequence[Any] | None:
        """See `TextSource.cells`: the record as it is, if it already has the form asked for."""
        found = super().cells(record, names, delimiter)
        header = record.header
        assert header is not None
        if found is not None and (header.delimiter, [*header.names]) == (delimiter, [*names]):
            text = record.data.decode().rstrip("\r\n")
            if ('"' not in text and "\r" not in text) or _plain(delimiter).fullmatch(text):
                return text
        return found


class CsvFormat(TextFormat):
    """CSV, and TSV if the name says so."""

    source = DelimitedSource
    name, title, stdout = "csv", "CSV", "csv"
    suffixes = (".csv", ".tsv")

    def begins(self, head: bytes) -> bool:
        """See `RowFormat.begins`: with a header."""
        header = head.partition(b"\n")[0].strip()
        return any(d in header for d in _DELIMITERS.encode()) or header in _LONE_COLUMNS

    def records(self, joined: Joined, path: Location) -> Iterator[bytes]:
        """See `TextFormat.records`."""
        delimiter, added = delimiter_of(path), joined.added
        cells_of = [column.cell or column.value for column in added.values()]
        given = joined.input_schema().names
        names = [joined.free(name, given) for name in given]
        first = [ROW] if joined.numbered else []
        yield (record_of([*first, *names, *added], delimiter) + "\n").encode()
        for row, cells, results in joined.rows(lambda chunk: chunk.cells(given, delimiter)):
            record = record_of(cells or [None] * len(given), delimiter)
            before = f"{row}{delimiter}{record}" if first else record
            for result in results:
                more = record_of([of(result) for of in cells_of], delimiter)
                yield f"{before}{delimiter if given else ''}{more}\n".encode()

    def output_suffix(self, first: Location) -> str:
        """See `RowFormat.output_suffix`: TSV stays TSV."""
        return ".tsv" if delimiter_of(first) == "\t" else ".csv"


class _Lines:
    r"""Lines of a file for csv's reader, which takes as many as a record has.

    Args:
        path: The file.
        file: The rest of its text.
        number: Number of lines already read.
        any_end: A lone \r ends a line; else it is text.
    """

    def __init__(
        self, path: Location, file: io.BufferedReader, number: int, *, any_end: bool
    ) -> None:
        self._path, self._file, self._any_end = path, file, any_end
        self.number, self._first = number, number + 1
        self._taken = bytearray()
        self.ended = False

    def begin(self) -> int:
        """Begin a record; return its line number."""
        self._taken.clear()
        self._first = self.number + 1
        return self._first

    def taken(self) -> bytes:
        """The record so far."""
        return bytes(self._taken)

    def skip_blank(self) -> None:
        """Skip blank lines."""
        self.number += skip(self._file, _BLANK_OF_ANY_END if self._any_end else _BLANK)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        most = MAX_RECORD + 1 - len(self._taken)
        line = self._line(most) if self._any_end else self._file.readline(most)
        if not line:
            self.ended = True
            raise StopIteration
        self.number += 1
        self._taken += line
        if len(self._taken) > MAX_RECORD:
            raise InputError(
                f"the record on line {self._first} of {self._path} is longer than "
                f"{MAX_RECORD >> 20} MiB",
                hint="check the quotes: an unclosed quote takes in everything after it",
            )
        text = line.decode(errors="surrogateescape")
        if b"\r" in line:
            cells = text.rstrip("\r\n")
            text = cells.replace("\r", _RETURN) + text[len(cells) :]
        return text

    def _line(self, most: int) -> bytes:
        r"""Like `readline`, but a lone \r ends a line too."""
        pieces: list[bytes] = []
        while most and (head := self._file.peek()):
            end = _ANY_END.search(head)
            pieces.append(self._file.read(min(most, end.end() if end else len(head))))
            most -= len(pieces[-1])
            if (
                end
                and end.end() == len(head)
                and end[0] == b"\r"
                and self._file.peek()[:1] == b"\n"
            ):
                pieces.append(self._file.read(1))
            if end:
                break
        return b"".join(pieces)


def _delimiter(path: Location, header: str) -> str:
    if delimiter_of(path) == "\t":
        return "\t"
    return max(_DELIMITERS, key=header.count)


@cache
def _plain(delimiter: str) -> re.Pattern[str]:
    """Records that every reader accepts: Python's csv allows more quotes and line ends."""
    cell = rf'(?:"(?:[^"]++|"")*+"|[^"\r\n{re.escape(delimiter)}]*+)'
    return re.compile(f"{cell}(?:{re.escape(delimiter)}{cell})*+")


def _raw_cells(text: str, delimiter: str) -> list[str]:
    """The cells of a valid record with their quotes."""
    one = re.escape(delimiter)
    return re.findall(rf'("(?:[^"]++|"")*+"|[^{one}]*+)(?:{one}|\Z)', text)


def delimiter_of(path: Location) -> str:
    """What separates cells in an output of this name: a tab, or a comma."""
    return "\t" if suffixes(path)[0] == ".tsv" else ","


def record_of(cells: str | Iterable[Any], delimiter: str) -> str:
    """Values as a record without a line end; text is a record already.

    Lists and objects become JSON.
    """
    return cells if isinstance(cells, str) else delimiter.join(map(_cell, cells))


def _cell(value: Any) -> str:
    text = as_text(value)
    if text is None:
        return ""
    return '"' + text.replace('"', '""') + '"' if not text or _SPECIAL.search(text) else text
