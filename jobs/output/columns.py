"""The columns that an output adds to the input's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from batchrun.jobs.journal.results import Result
from batchrun.jobs.output.answers import choice_parser, json_parser
from batchrun.jobs.output.column import Column
from batchrun.jobs.output.schematypes import type_of
from batchrun.jobs.output.scores import score_columns
from batchrun.jobs.output.typed import JsonText, ValueType
from batchrun.jobs.rows.row import valid_text
from batchrun.jobs.spec import JobSpec

_SHAPES = {"json_schema", "regex", "choices"}  # what a row may ask for instead of the job
_PAIR = ("token_id", "logprob")
_TOKEN = pa.struct([(_PAIR[0], pa.int32()), (_PAIR[1], pa.float32())])


Added = Mapping[str, Column]

_ALWAYS: Added = {
    "completion": Column(pa.string(), lambda result: _text(result.text)),
    "finish_reason": Column(pa.string(), lambda result: result.finish_reason),
    "prompt_tokens": Column(pa.int64(), lambda result: result.prompt_tokens),
    "completion_tokens": Column(pa.int64(), lambda result: result.completion_tokens),
    "error": Column(pa.string(), lambda result: _text(result.error)),
}
_OPTIONAL: Added = {
    "completion_token_ids": Column(
        pa.list_(pa.field("element", pa.int32())), lambda result: result.token_ids
    ),
    "logprobs": Column(
        pa.list_(pa.field("element", pa.float32())),
        lambda result: result.logprobs and [own for own, _ in result.logprobs],
    ),
    "top_logprobs": Column(
        pa.list_(pa.field("element", pa.list_(pa.field("element", _TOKEN)))),
        lambda result: (
            result.logprobs
            and [
                [dict(zip(_PAIR, pair, strict=True)) for pair in each]
                for _, each in result.logprobs
            ]
        ),
    ),
    "mean_logprob": Column(pa.float64(), lambda result: result.mean_logprob),
    "sample": Column(pa.int64(), lambda result: result.sample),
}


def output_columns(spec: JobSpec) -> Added:
    """The columns that a job's output has after the input's, by name, in order."""
    sampling, prefix = spec.sampling, spec.output.prefix
    found = dict(_ALWAYS)
    if sampling.choices is not None:
        found |= _choice_columns(spec, sampling.choices)
    elif sampling.json_schema is not None:
        found |= _json_columns(type_of(sampling.json_schema), prefix)
    elif sampling.json_object:
        found |= _json_columns(JsonText(only=dict), prefix)
    wanted = {
        "completion_token_ids": spec.output.token_ids,
        "logprobs": sampling.logprobs is not None,
        "top_logprobs": sampling.logprobs is not None,
        "mean_logprob": spec.keep is not None,
        "sample": (spec.keep or spec.n) > 1,
    }
    found |= {name: column for name, column in _OPTIONAL.items() if wanted[name]}
    found |= score_columns(sampling)
    return {prefix + name: column for name, column in found.items()}


def _json_columns(kind: ValueType, prefix: str) -> Added:
    parse = json_parser(kind, f"{prefix}parsed")

    def value(result: Result) -> Any:
        return parse(result).value

    def stored(result: Result) -> Any:
        return parse(result).stored

    return {
        # In CSV too, JSON of any type is JSON.
        "parsed": Column(
            kind.arrow, value, stored, stored if isinstance(kind, JsonText) else value
        ),
        "parse_error": Column(pa.string(), lambda result: parse(result).error),
    }


def _choice_columns(spec: JobSpec, choices: Sequence[str]) -> Added:
    choices = list(dict.fromkeys(map(valid_text, choices)))
    own = _SHAPES.intersection(spec.runtime.param_columns)
    parse = choice_parser(choices, own=bool(own))

    def logprob(result: Result) -> float | None:
        value = parse(result).value
        chosen = value in choices or (value is not None and "choices" in own)
        return result.logprob if chosen else None

    found = {
        "parsed": Column(
            pa.string() if own else pa.dictionary(pa.int32(), pa.string()),
            lambda result: parse(result).value,
            lambda result: parse(result).stored,
            categories=None if own else choices,
        ),
        "parse_error": Column(pa.string(), lambda result: parse(result).error),
    }
    if spec.sampling.choice_logprob:
        found["choice_logprob"] = Column(pa.float64(), logprob)
    return found


def _text(text: str | None) -> str | None:
    return None if text is None else valid_text(text)
