"""Results beside their input rows, in input order, as a file that appears whole or not at all."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import JobError, OutputError
from jobs.files import atomic_write
from jobs.journal import Result
from jobs.row import BATCH_ROWS, Source, valid_text

OUTPUT_COLUMNS = ("completion", "finish_reason", "prompt_tokens", "completion_tokens", "error")

_GROUP_BYTES = 32 << 20  # of a Parquet row group before encoding
_GROUP_ROWS = 1 << 17
# Type and value of each column that is added.
_ADDED: dict[str, tuple[pa.DataType, Callable[[Result], Any]]] = {
    "completion": (pa.string(), lambda result: _text(result.text)),
    "finish_reason": (pa.string(), lambda result: result.finish_reason),
    "prompt_tokens": (pa.int64(), lambda result: result.prompt_tokens),
    "completion_tokens": (pa.int64(), lambda result: result.completion_tokens),
    "error": (pa.string(), lambda result: _text(result.error)),
    "completion_token_ids": (
        pa.list_(pa.field("element", pa.int32())),
        lambda result: result.token_ids,
    ),
    "sample": (pa.int64(), lambda result: result.sample),
}
_JSON = json.JSONEncoder(ensure_ascii=False)
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def output_columns(token_ids: bool, n: int) -> list[str]:
    """Columns that the export adds after the input's, in order."""
    return [
        *OUTPUT_COLUMNS,
        *(["completion_token_ids"] if token_ids else []),
        *(["sample"] if n > 1 else []),
    ]


def check_columns(column_names: Sequence[str], token_ids: bool, n: int) -> None:
    """Refuse an input that has a column which the output adds.

    Raises:
        OutputError: It has; the message names it.
    """
    clash = [name for name in output_columns(token_ids, n) if name in column_names]
    if clash:
        names = ", ".join(f"'{name}'" for name in clash)
        raise OutputError(
            f"the input has {'columns' if len(clash) > 1 else 'a column'} {names}, "
            "which the output adds",
            hint=f"rename in the input, for example '{clash[0]}' to 'input_{clash[0]}'",
        )


def output_format(path: Path) -> Literal["parquet", "jsonl"]:
    """The format that a file's name asks for.

    Raises:
        OutputError: None that is known.
    """
    suffix = path.suffix.lower()
    if suffix in {".parquet", ".pq"}:
        return "parquet"
    if suffix in {".gz", ".zst"}:
        suffix = Path(path.stem).suffix.lower()
    if suffix in {".jsonl", ".ndjson"}:
        return "jsonl"
    raise OutputError(
        f"{path}: its name does not say which format to write",
        hint="names end in .parquet, .pq, .jsonl or .ndjson, the last two also with .gz or .zst",
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
    source: Source,
    results: Iterator[Result],
    destination: Path,
    *,
    format: str,  # noqa: A002 - the field's word
    token_ids: bool,
    n: int,
    limit: int | None,
    partial: bool = False,
) -> int:
    """Write the output file: every input column as it is, then those of `output_columns`.

    A row with n samples is there n times. Memory does not grow with the number of rows. An input
    column of an added one's name, which JSON Lines may bring up after the rows that
    `check_columns` saw, is kept as `input_<name>`.

    Args:
        source: The input.
        results: In (row, sample) order.
        destination: The file; it is replaced.
        format: `parquet` or `jsonl`; a name ending in .gz or .zst compresses the latter.
        token_ids: Whether to add `completion_token_ids`.
        n: Samples a row.
        limit: Input rows at most.
        partial: Leave out what has no result yet.

    Returns:
        The number of rows written.

    Raises:
        OutputError: The file can't be written. What was there before is as it was.
        InputError: The input can't be read any more.
        JobError: A result is missing and `partial` is not set, or is of no row.
    """
    answers = _Answers(results, n, partial)
    names = output_columns(token_ids, n)
    try:
        with atomic_write(destination) as file:
            if format == "parquet":
                count = _write_parquet(file, source, answers, names, limit)
            else:
                with _compressed(file, destination.suffix.lower()) as packed:
                    count = _write_jsonl(packed, source, answers, names, limit)
            answers.finish()
    except (OSError, pa.ArrowException) as error:
        code = error.errno if isinstance(error, OSError) else None
        cause = os.strerror(code) if code is not None else str(error)
        advice = "make room on the disk, then" if code in _NO_ROOM else "when that is solved"
        raise OutputError(
            f"{destination} can't be written: {cause}; the results are safe in the job",
            hint=f"{advice}: batchrun export",
        ) from error
    return count


class _Answers:
    """The results of one row after the other."""

    def __init__(self, results: Iterator[Result], n: int, partial: bool) -> None:
        self.n = n
        self._results = results
        self._samples = list(range(n))
        self._partial = partial
        self._next = next(results, None)

    def take(self, row: int) -> list[Result]:
        """All results of the next row."""
        found: list[Result] = []
        while self._next is not None and self._next.row <= row:
            found.append(self._next)
            self._next = next(self._results, None)
        samples = [result.sample for result in found if result.row == row]
        if samples != self._samples or len(found) != len(samples):
            ordered = len(found) == len(samples) and samples == sorted(
                set(samples).intersection(self._samples)
            )
            if not (ordered and self._partial):
                raise JobError(
                    f"row {row} has the samples {samples}, not {self._samples}"
                    if ordered
                    else f"results out of order at row {row}",
                    hint="batchrun resume, or batchrun export --partial for the finished rows",
                )
        return found

    def finish(self) -> None:
        """Check that no result is left."""
        if self._next is not None:
            raise JobError(
                f"there is a result of row {self._next.row}, which the input does not have",
                hint="was the input replaced? submit the job again",
            )


def _write_parquet(
    file: IO[bytes], source: Source, answers: _Answers, names: Sequence[str], limit: int | None
) -> int:
    schema = source.schema()
    fields = [field.with_name(_free(field.name, names, schema.names)) for field in schema]
    fields += [pa.field(name, _ADDED[name][0]) for name in names]
    out = pa.schema(fields).with_metadata(schema.metadata)
    # Names inside of list types are part of a column's type: they stay as they are.
    writer = pq.ParquetWriter(file, out, compression="zstd", use_compliant_nested_type=False)
    count = size = first = 0
    group: list[pa.RecordBatch] = []

    def flush() -> None:
        writer.write_table(pa.Table.from_batches(group, out), row_group_size=_GROUP_ROWS)
        group.clear()

    try:
        for batch in source.batches(schema, limit):
            for joined in _join(batch, first, answers, names, out):
                group.append(joined)
                count += joined.num_rows
                size += joined.nbytes
                if size >= _GROUP_BYTES or len(group) * BATCH_ROWS >= _GROUP_ROWS:
                    flush()
                    size = 0
            first += batch.num_rows
        if group:
            flush()
        writer.close()
    except BaseException:
        writer.is_open = False  # else its finaliser would write a footer into a closed file
        raise
    return count


def _join(
    batch: pa.RecordBatch, first: int, answers: _Answers, names: Sequence[str], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """The input rows of a batch beside their results, in pieces about as large as the batch."""
    step = max(1, batch.num_rows // answers.n)
    for low in range(0, batch.num_rows, step):
        piece = batch.slice(low, step)
        found = [answers.take(first + low + i) for i in range(piece.num_rows)]
        if any(len(results) != 1 for results in found):
            indices = [i for i, results in enumerate(found) for _ in results]
            piece = piece.take(pa.array(indices, pa.int64()))
        arrays = list(piece.columns)
        for name in names:
            kind, value = _ADDED[name]
            arrays.append(pa.array([value(r) for results in found for r in results], kind))
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _write_jsonl(
    file: IO[bytes], source: Source, answers: _Answers, names: Sequence[str], limit: int | None
) -> int:
    count = 0
    for row, record in enumerate(source.objects(limit)):
        fields = record or {}
        kept = {_free(name, names, fields): value for name, value in fields.items()}
        for result in answers.take(row):
            file.write(_encode({**kept, **{name: _ADDED[name][1](result) for name in names}}))
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


def _encode(record: dict[str, Any]) -> bytes:
    try:
        return (_JSON.encode(record) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate: JSON can hold it, as an escape
        return (json.dumps(record) + "\n").encode()


def _free(name: str, taken: Sequence[str], used: Container[str]) -> str:
    """The name, or with `input_` before it, as often as it takes, where the output adds it."""
    if name not in taken:
        return name
    while name in taken or name in used:
        name = f"input_{name}"
    return name


def _text(text: str | None) -> str | None:
    return None if text is None else valid_text(text)
