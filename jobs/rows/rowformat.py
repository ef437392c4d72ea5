"""What a job asks of a file format: a class for each, with an entry in `formats.FORMATS`."""

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

if TYPE_CHECKING:  # it is made of sources
    from batchrun.jobs.output.joined import Joined

ROW = "row"  # of an output whose input is not what it was: which row of it a result is of
PACKINGS = (".gz", ".zst", ".bz2", ".xz")  # of text
WRITTEN_PACKINGS = PACKINGS[:2]


class RowFormat(ABC):
    """Files of rows: how they are known, read, written and compared.

    Attributes:
        name: In specifications of jobs.
        title: For people.
        suffixes: How names end, those of new files first.
        input_suffixes: How names of inputs end beside those.
        columnar: Values lie by column, of one type each, packed by the format itself. A row is
            proven by the columns that were read of it, and what was appended made another file.
            Else a file is text, which may be packed, and may grow behind the rows of a job.
        stdout: Name of the format that rows of such an input are piped out in.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    input_suffixes: ClassVar[tuple[str, ...]] = ()
    columnar: ClassVar[bool] = False
    stdout: ClassVar[str] = "jsonl"

    @abstractmethod
    def begins(self, head: bytes) -> bool:
        """Whether files begin like this: their bytes, or their text without blanks before it."""

    @abstractmethod
    def open(
        self, parts: Sequence[Part], *, lenient: bool = False, noted: Noted = unnoted
    ) -> Source:
        """Files as one sequence of rows. Reads metadata and beginnings only.

        Args:
            parts: The files.
            lenient: What can't be read is the end of the rows, of which there may be none.
            noted: Told what is read by C++, which may end the process.

        Raises:
            InputError: A file is damaged or can't be read, or there are no rows.
        """

    @abstractmethod
    def write(self, file: IO[bytes], joined: Joined, path: Path) -> None:
        """Write an output's rows; `path` is the name that the file is to have.

        Raises:
            JobError: From `joined`.
            OSError, ArrowException: The file can't be written.
        """

    @abstractmethod
    def differences(self, path: Path, joined: Joined, noted: Noted) -> Iterator[str]:
        """Where a file is not what `write` would make of the same rows, a line each.

        Raises:
            JobError, OSError, ArrowException, ValueError, LookupError: It can't be read.
        """

    def output_suffix(self, first: Path) -> str:
        """How the name of an output ends that is named after its first input."""
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
        """What a record asks: columns with prompt and parameters. All that it holds, by default.

        Raises:
            ValueError: It is a bad row; the message says why.
        """
        return values

    @abstractmethod
    def records(self, joined: Joined, path: Path) -> Iterator[bytes]:
        """The lines of an output of this name."""

    def write(self, file: IO[bytes], joined: Joined, path: Path) -> None:
        """See `RowFormat.write`."""
        with _packed(file, path.suffix.lower()) as packed:
            for record in self.records(joined, path):
                packed.write(record)

    def differences(self, path: Path, joined: Joined, noted: Noted) -> Iterator[str]:
        """See `RowFormat.differences`: there is none in any byte."""
        with text_of(path) as file:
            for number, want in enumerate(self.records(joined, path)):
                if file.read(len(want)) != want:
                    yield f"the output {path} differs from the job in row {number}"
                    return
            if file.read(1):
                yield f"the output {path} has more rows than the job"


def suffixes(path: Path) -> tuple[str, str]:
    """What a name says of a format, and of a packing behind it: `.jsonl` and `.gz`, or nothing."""
    suffix = path.suffix.lower()
    if suffix in PACKINGS:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


@contextmanager
def _packed(file: IO[bytes], suffix: str) -> Iterator[IO[bytes]]:
    if suffix == ".gz":  # without name and time: the same rows give the same bytes
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
            yield cast(IO[bytes], packed)
    elif suffix == ".zst":
        with pa.CompressedOutputStream(_Unclosed(file), "zstd") as stream:
            yield cast(IO[bytes], stream)
    else:
        yield file


class _Unclosed(io.RawIOBase):
    """A file for pyarrow, which closes what it writes to, that leaves the real one open."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)
