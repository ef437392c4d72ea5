"""Results beside their input rows, in input order: what an output file holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import pyarrow as pa

from jobs.errors import JobError
from jobs.results import Result
from jobs.row import Source, valid_text

OUTPUT_COLUMNS = ("completion", "finish_reason", "prompt_tokens", "completion_tokens", "error")

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
    "mean_logprob": (pa.float64(), lambda result: result.mean_logprob),
    "sample": (pa.int64(), lambda result: result.sample),
}
_JSON = json.JSONEncoder(ensure_ascii=False)


def output_columns(token_ids: bool, n: int, keep: int | None = None) -> list[str]:
    """Columns that the export adds after the input's, in order."""
    return [
        *OUTPUT_COLUMNS,
        *(["completion_token_ids"] if token_ids else []),
        *(["mean_logprob"] if keep is not None else []),
        *(["sample"] if (keep or n) > 1 else []),
    ]


class Answers:
    """The results of one row after the other.

    Args:
        results: In (row, sample) order.
        n: Samples a row.
        partial: Whether samples may be missing.
        keep: Of a row's samples only so many, the best first by mean log-probability, numbered
            anew; of a row that lacks samples none, since its best may be among them.
    """

    def __init__(
        self, results: Iterator[Result], n: int, partial: bool, keep: int | None = None
    ) -> None:
        self.n, self._keep = n, keep
        self._results = results
        self._samples = list(range(n))
        self._partial = partial
        self._next = next(results, None)

    def take(self, row: int) -> list[Result]:
        """The results of the next row."""
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
        if self._keep is None:
            return found
        best = sorted(found, key=_rank)[: self._keep if samples == self._samples else 0]
        return [result._replace(sample=i) for i, result in enumerate(best)]

    def finish(self) -> None:
        """Check that no result is left."""
        if self._next is not None:
            raise JobError(
                f"there is a result of row {self._next.row}, which the input does not have",
                hint="was the input replaced? submit the job again",
            )


def _rank(result: Result) -> tuple[bool, float, int]:
    """Sorts the likeliest first and errors last."""
    mean = result.mean_logprob
    return (result.status != "ok", math.inf if mean is None else -mean, result.sample)


def joined_schema(source: Source, names: Sequence[str]) -> pa.Schema:
    """Of the output: the input's columns, those that get in the way renamed, and `names`."""
    schema = source.schema()
    columns = [field.with_name(_free(field.name, names, schema.names)) for field in schema]
    columns += [pa.field(name, _ADDED[name][0]) for name in names]
    return pa.schema(columns).with_metadata(schema.metadata)


def joined_batches(
    source: Source, answers: Answers, names: Sequence[str], schema: pa.Schema, limit: int | None
) -> Iterator[pa.RecordBatch]:
    """The output's rows in the types of `joined_schema`."""
    first = 0
    for batch in source.batches(source.schema(), limit):
        yield from _join(batch, first, answers, names, schema)
        first += batch.num_rows


def _join(
    batch: pa.RecordBatch, first: int, answers: Answers, names: Sequence[str], schema: pa.Schema
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


def joined_lines(
    source: Source, answers: Answers, names: Sequence[str], limit: int | None
) -> Iterator[bytes]:
    """The output's rows as lines of JSON."""
    for row, record in enumerate(source.objects(limit)):
        fields = record or {}
        kept = {_free(name, names, fields): value for name, value in fields.items()}
        for result in answers.take(row):
            yield _encode({**kept, **{name: _ADDED[name][1](result) for name in names}})


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
