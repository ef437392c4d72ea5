"""Results beside their input rows, in input order, as a file that appears whole or not at all."""

from __future__ import annotations

import errno
import gzip
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.jobs.errors import OutputError, OutputTaken
from batchrun.jobs.files import MayReplace, atomic_write
from batchrun.jobs.output.joined import Joined, output_columns
from batchrun.jobs.rows.cells import delimiter_of
from batchrun.jobs.rows.row import BATCH_ROWS

_GROUP_BYTES = 32 << 20  # of a Parquet row group before encoding
_GROUP_ROWS = 1 << 17
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_columns(
    column_names: Sequence[str],
    token_ids: bool,
    n: int,
    keep: int | None = None,
    prefix: str = "",
) -> None:
    """Refuse an input that has a column which the output adds.

    Raises:
        OutputError: It has; the message names it.
    """
    added = output_columns(token_ids, n, keep, prefix)
    clash = [name for name in added if name in column_names]
    if clash:
        names = ", ".join(f"'{name}'" for name in clash)
        raise OutputError(
            f"the input has {'columns' if len(clash) > 1 else 'a column'} {names}, "
            "which the output adds",
            hint=f"rename in the input, for example '{clash[0]}' to 'input_{clash[0]}', or name "
            "what is added apart: --output-prefix new_",
        )


def check_destination(path: Path, overwrite: bool) -> None:
    """Prove that a file can be written there, by writing one beside it and removing it.

    Raises:
        OutputError: It can't, or it exists and is not to be replaced.
    """
    # `os.path` because pathlib raises where a folder on the way may not be entered.
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder", hint=f"--output '{path / 'output.parquet'}'")
    if os.path.lexists(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise OutputError(f"{path} is not a regular file", hint="choose another --output")
        if not overwrite:
            raise OutputError(
                f"{path} exists already", hint="--overwrite to replace it, or another --output"
            )
    parent = path.absolute().parent
    if not os.path.exists(parent):
        raise OutputError(f"{path}: there is no folder {parent}", hint=f"mkdir -p '{parent}'")
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=f".{path.name}.", suffix=".tmp"):
            pass
    except OSError as error:
        raise OutputError(
            f"{path} can't be written: {error.strerror or error}",
            hint=f"choose another --output, or see: ls -ld '{parent}'",
        ) from error


def export(
    joined: Joined,
    destination: Path,
    *,
    format: str,  # noqa: A002 - the field's word
    may_replace: MayReplace = lambda _: True,
    private: bool = False,
) -> int:
    """Write an output file.

    A row is there once for each sample. Memory does not grow with the number of rows. An input
    column of an added one's name, which JSON Lines may bring up after the rows that
    `check_columns` saw, is kept as `input_<name>`.

    Args:
        joined: Its rows.
        destination: The file.
        format: `parquet`, `jsonl` or `csv`; a name ending in .gz or .zst compresses the latter two.
        may_replace: Whether it may replace what is there when it is whole; see `atomic_write`.
        private: Nobody else may ever read it.

    Returns:
        The number of rows written.

    Raises:
        OutputTaken: It may not replace what is there, which appeared meanwhile.
        OutputError: The file can't be written. What was there before is as it was.
        InputError: The input can't be read any more.
        JobError: What `joined` raises.
    """
    try:
        with atomic_write(destination, may_replace=may_replace, private=private) as file:
            if format == "parquet":
                count = _write_parquet(file, joined)
            else:
                with _compressed(file, destination.suffix.lower()) as packed:
                    count = _write_text(packed, joined, format, destination)
            joined.finish()
    except FileExistsError as error:
        raise OutputTaken(
            f"{destination} appeared meanwhile, and nobody said that it may be replaced; "
            "the results are safe in the job",
            hint="batchrun export --output OTHER",
        ) from error
    except (OSError, pa.ArrowException) as error:
        code = error.errno if isinstance(error, OSError) else None
        cause = os.strerror(code) if code is not None else str(error)
        advice = "make room on the disk, then" if code in _NO_ROOM else "when that is solved"
        raise OutputError(
            f"{destination} can't be written: {cause}; the results are safe in the job",
            hint=f"{advice}: batchrun export",
        ) from error
    return count


def _write_parquet(file: IO[bytes], joined: Joined) -> int:
    schema = joined.schema()
    # Names inside of list types are part of a column's type: they stay as they are.
    writer = pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        use_compliant_nested_type=False,
        write_page_checksum=True,
    )
    count = size = 0
    group: list[pa.RecordBatch] = []

    def flush() -> None:
        writer.write_table(pa.Table.from_batches(group, schema), row_group_size=_GROUP_ROWS)
        group.clear()

    try:
        for batch in joined.batches():
            group.append(batch)
            count += batch.num_rows
            size += batch.nbytes
            if size >= _GROUP_BYTES or len(group) * BATCH_ROWS >= _GROUP_ROWS:
                flush()
                size = 0
        if group:
            flush()
        writer.close()
    except BaseException:
        writer.is_open = False  # else its finaliser would write a footer into a closed file
        raise
    return count


def _write_text(file: IO[bytes], joined: Joined, format: str, name: Path) -> int:  # noqa: A002
    count = 0
    if format == "csv":
        records = joined.delimited(delimiter_of(name))
        file.write(next(records))
    else:
        records = joined.lines()
    for record in records:
        file.write(record)
        count += 1
    return count


@contextmanager
def _compressed(file: IO[bytes], suffix: str) -> Iterator[IO[bytes]]:
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
