"""What a job needs from a file format: a class for each, with an entry in `formats.FORMATS`."""

from __future__ import annotations

import gzip
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, cast

import pyarrow as pa

from batchrun.jobs.rows.row import Source
from batchrun.jobs.rows.store import Noted, Part, unnoted
from batchrun.jobs.rows.stream import text_of
from batchrun.jobs.rows.textsource import TextSource
from batchrun.objectstore.paths import Location

if TYPE_CHECKING:  # it is made of sources
    from batchrun.jobs.output.joined import Joined

ROW = "row"  # column with a result's row number, in an output whose input has changed
PACKINGS = (".gz", ".zst", ".bz2", ".xz")  # of text
WRITTEN_PACKINGS = PACKINGS[:2]


class RowFormat(ABC):
    """Files of rows: how they are recognised, read, written and compared.

    Attributes:
        name: In job specifications.
        title: For people.
        suffixes: File suffixes, the one for new files first.
        input_suffixes: Further suffixes of inputs.
        columnar: Values are stored by column, each of one type, compressed by the format. A row's
            digest covers only the columns read, and a file that grew is a different file.
            Otherwise a file is text, which may be compressed, and may grow after the job's rows.
        stdout: Name of the format for stdout if the input has this one.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    input_suffixes: ClassVar[tuple[str, ...]] = ()
    columnar: ClassVar[bool] = False
    stdout: ClassVar[str] = "jsonl"

    @abstractmethod
    def begins(self, head: bytes) -> bool:
        """Whether a file may begin like this: its bytes, or its text without leading blanks."""

    @abstractmethod
    def open(
        self, parts: Sequence[Part], *, lenient: bool = False, noted: Noted = unnoted
    ) -> Source:
        """Files as one sequence of rows. Reads metadata and beginnings only.

        Args:
            parts: The files.
            lenient: End the rows where a file can't be read; there may be none.
            noted: Told what C++ code is reading, as it may crash the process.

        Raises:
            InputError: A file is damaged or can't be read, or there are no rows.
        """

    @abstractmethod
    def write(self, file: IO[bytes], joined: Joined, path: Location) -> None:
        """Write an output's rows; `path` is the file's final name.

        Raises:
            JobError: From `joined`.
            OSError, ArrowException: The file can't be written.
        """

    @abstractmethod
    def differences(self, path: Location, joined: Joined, noted: Noted) -> Iterator[str]:
        """A line for each place where a file differs from what `write` would write.

        Raises:
            JobError, OSError, ArrowException, ValueError, LookupError: It can't be read.
        """

    def output_suffix(self, first: Location) -> str:
        """The suffix of an output that is named after its first input."""
        return self.suffixes[0]


class TextFormat(RowFormat):
    """Text with a record for each row.

    Attributes:
        source: Reads it.
    """

    source: ClassVar[type[TextSource]]

    def open(
        self, parts: Sequence[Part], *, lenient: bool = False, noted: Noted = unnoted
    ) -> Source:
        """See `RowFormat.open`."""
        return self.source(parts, asked=self.fields, lenient=lenient)

    def fields(self, values: dict[str, Any]) -> dict[str, Any]:
        """A record's columns with prompt and parameters; by default all that it holds.

        Raises:
            ValueError: It is a bad row; the message says why.
        """
        return values

    @abstractmethod
    def records(self, joined: Joined, path: Location) -> Iterator[bytes]:
        """The lines of an output with this name."""

    def write(self, file: IO[bytes], joined: Joined, path: Location) -> None:
        """See `RowFormat.write`."""
        with _packed(file, path.suffix.lower()) as packed:
            for record in self.records(joined, path):
                packed.write(record)

    def differences(self, path: Location, joined: Joined, noted: Noted) -> Iterator[str]:
        """See `RowFormat.differences`: compares bytes."""
        with text_of(path) as file:
            for number, want in enumerate(self.records(joined, path)):
                if file.read(len(want)) != want:
                    yield f"the output {path} differs from the job in row {number}"
                    return
            if file.read(1):
                yield f"the output {path} has more rows than the job"


def suffixes(path: Location) -> tuple[str, str]:
    """A name's format suffix and its packing suffix, such as `.jsonl` and `.gz`; "" if absent."""
    suffix = path.suffix.lower()
    if suffix in PACKINGS:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


@contextmanager
def _packed(file: IO[bytes], suffix: str) -> Iterator[IO[bytes]]:
    if suffix == ".gz":  # without name and time, so that the same rows give the same bytes
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
            yield cast(IO[bytes], packed)
    elif suffix == ".zst":
        with pa.CompressedOutputStream(_Unclosed(file), "zstd") as stream:
            yield cast(IO[bytes], stream)
    else:
        yield file


class _Unclosed(io.RawIOBase):
    """A wrapper that stays open inside when pyarrow closes it, as it does after writing."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)
