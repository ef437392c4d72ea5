"""JSON as a source: one object per line, an array of objects, or objects over several lines."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows import jsontext
from batchrun.jobs.rows.row import AGAIN
from batchrun.jobs.rows.rowformat import ROW, TextFormat
from batchrun.jobs.rows.store import Part
from batchrun.jobs.rows.stream import MAX_RECORD, skip, text_of
from batchrun.jobs.rows.textsource import Record, TextSource
from batchrun.objectstore.paths import Location

if TYPE_CHECKING:
    from batchrun.jobs.output.joined import Joined

_BOM = b"\xef\xbb\xbf"
_READ = 1 << 18
_BLANK = re.compile(rb"\s++")
# Whole strings; the quote of one that continues beyond what was read; brackets and commas.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["{}\[\],]', re.DOTALL)


class JsonSource(TextSource):
    """JSON files. A blank line is not a row; a value that is not an object is a bad row."""

    no_rows = "no JSON object"
    advice = "write one JSON object per line; jq -c . converts most JSON to that"

    def records(self, part: Part) -> Iterator[Record]:
        """See `TextSource.records`."""
        with text_of(part.path, part.size) as file:
            skipped = skip(file, _BLANK)
            head = file.peek(_READ)
            if _has_lines(head):
                records = _lines(part, file, skipped)
            elif head.startswith(b"["):
                records = _Values(part, file, skipped).of_array()
            else:
                records = _Values(part, file, skipped).in_a_row()
            for line, data in records:
                yield Record(line, data, part)

    def parse(self, record: Record) -> dict[str, Any]:
        """See `TextSource.parse`."""
        return jsontext.parse_object(record.data.decode())

    def carried(self, record: Record, taken: Sequence[str]) -> str | dict[str, Any] | None:
        """See `TextSource.carried`: the record as it is, if every reader accepts that."""
        more = self.partition(record.part)
        if more.keys().isdisjoint(taken):
            with suppress(UnicodeDecodeError):
                text = jsontext.carried(record.data.decode(), (*taken, *more))
                if text is not None:
                    return jsontext.with_more(text, more)
        return super().carried(record, taken)


class JsonFormat(TextFormat):
    """JSON objects, one per line in an output."""

    source = JsonSource
    name, title = "jsonl", "JSON"
    suffixes, input_suffixes = (".jsonl", ".ndjson"), (".json",)

    def begins(self, head: bytes) -> bool:
        """See `RowFormat.begins`."""
        return head.startswith((b"{", b"["))

    def record(self, row: str, result: Mapping[str, Any]) -> str:
        """A result's JSON object: by default its row's object, plus the added values.

        Args:
            row: The row's object; an empty one if the row is bad or unknown.
            result: The added values, by column.
        """
        return jsontext.with_more(row, result)

    def records(self, joined: Joined, path: Location) -> Iterator[bytes]:
        """See `TextFormat.records`."""
        added = joined.added.items()
        for index, row, results in joined.rows(lambda chunk: chunk.objects(joined.taken)):
            fields = {} if row is None else row
            if not isinstance(fields, str):
                fields = jsontext.encode({joined.free(k, fields): v for k, v in fields.items()})
            for result in results:
                line = self.record(fields, {name: column.value(result) for name, column in added})
                if joined.numbered:
                    line = f'{{"{ROW}": {index}, {line[1:].lstrip()}'
                yield (line + "\n").encode()


def _has_lines(head: bytes) -> bool:
    """Whether a file that begins like this has one object per line."""
    if not head.startswith(b"["):
        return head.partition(b"\n")[0].strip() != b"{"
    line, _, rest = head.partition(b"\n")
    if not rest.lstrip().startswith((b"{", b"[")):
        return False
    try:
        json.loads(line)  # an array, and more after it: a bad row
    except (ValueError, RecursionError):
        return False
    return True


def _lines(part: Part, file: io.BufferedReader, number: int) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of all lines that are not blank, after `number` lines."""
    while line := file.readline(MAX_RECORD + 1):
        number += 1
        if len(line) > MAX_RECORD:
            raise InputError(
                f"line {number} of {part.path} is longer than {MAX_RECORD >> 20} MiB",
                hint="check that this is JSON Lines: one object per line",
            )
        line = line.removeprefix(_BOM)  # concatenated files may each have one
        if line and not line.isspace():
            yield number, line
        else:
            number += skip(file, _BLANK)


class _Values:
    """The values of an array, or a sequence of values, cut out of a file's text.

    They are cut by brackets, strings and commas alone, so that a value that is broken inside is
    just one bad row.
    """

    #   data   {"a": 1}, {"b": [2]}, ...
    #              cut ^      ^ at
    def __init__(self, part: Part, file: IO[bytes], skipped: int) -> None:
        self._part, self._file = part, file
        self._data = b""
        self._cut = self._at = 0  # handed out and looked at, up to there
        self._line = skipped + 1  # of the cut

    def of_array(self) -> Iterator[tuple[int, bytes]]:
        """(line number, text) of each value of the one array that the file is."""
        depth = 0
        while (token := self._token()) is not None:
            depth += (token in b"{[") - (token in b"}]")
            if depth == 1 and token == b"[":
                self._take(self._at)
            elif (depth == 1 and token == b",") or depth == 0:
                line, value = self._take(self._at - 1)
                if value or token == b",":  # nothing before the end is not a value
                    yield line, value
            if depth == 0:
                break
        if depth:
            raise self._cut_short("its array")
        while (more := self._data[self._cut :]) or (more := self._file.read(_READ)):
            if more.strip():
                raise InputError(
                    f"{self._part.path} goes on after its array ends on line {self._line}",
                    hint="write one JSON object per line, or one array of objects",
                )
            self._data, self._cut = b"", 0

    def in_a_row(self) -> Iterator[tuple[int, bytes]]:
        """(line number, text) of values that follow each other."""
        depth = 0
        while (token := self._token()) is not None:
            depth = max(0, depth + (token in b"{[") - (token in b"}]"))
            if depth == 0 and token in b"}]":
                yield self._take(self._at)
        if self._data[self._cut :].strip():
            raise self._cut_short("an object")

    def _token(self) -> bytes | None:
        """The next bracket or comma outside strings; None at the end of the file."""
        while True:
            found = _TOKEN.search(self._data, self._at)
            if found is not None and found[0] != b'"':
                self._at = found.end()
                if len(found[0]) == 1:
                    return found[0]
                continue
            self._at = len(self._data) if found is None else found.start()
            rest = self._data[self._cut :]
            if len(rest) > MAX_RECORD:
                raise InputError(
                    f"the value on line {self._line} of {self._part.path} is longer than "
                    f"{MAX_RECORD >> 20} MiB, or never ends",
                    hint=f"check it with: python -m json.tool '{self._part.path}'",
                )
            if rest.isspace():
                self._line += rest.count(b"\n")
                rest, self._at = b"", self._cut
            more = self._file.read(min(max(_READ, len(rest)), MAX_RECORD + 1 - len(rest)))
            if not more:
                return None
            self._data, self._at, self._cut = rest + more, self._at - self._cut, 0

    def _take(self, end: int) -> tuple[int, bytes]:
        """The text before `end`, with the line where it begins; the next one starts at `at`."""
        value = self._data[self._cut : end]
        blank = len(value) - len(value.lstrip())
        line = self._line + self._data.count(b"\n", self._cut, self._cut + blank)
        self._line += self._data.count(b"\n", self._cut, self._at)
        self._cut = self._at
        return line, value.strip()

    def _cut_short(self, what: str) -> InputError:
        return InputError(
            f"{self._part.path} is cut short: it ends inside {what}, on line {self._line} or later",
            hint=AGAIN,
        )
