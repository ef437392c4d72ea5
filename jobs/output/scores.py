"""The columns of an output that hold scores of known text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa

from batchrun.jobs.journal.results import Result, Scores
from batchrun.jobs.options import SamplingSpec
from batchrun.jobs.output.column import Column

_OF_TEXT: dict[str, tuple[pa.DataType, Callable[[Scores], Any]]] = {
    "score_logprobs": (pa.list_(pa.field("element", pa.float32())), lambda s: s.logprobs),
    "score_sum": (pa.float64(), lambda s: s.sum),
    "score_mean": (pa.float64(), lambda s: s.mean),
    "score_tokens": (pa.int64(), lambda s: len(s.logprobs)),
}


def score_columns(sampling: SamplingSpec) -> dict[str, Column]:
    """The columns for what a job scores; null for failed rows."""
    found = dict(_OF_TEXT) if sampling.score is not None else {}
    if sampling.labels:
        labels = sampling.labels
        kind = pa.struct([(label, pa.float64()) for label in labels])
        found["label_probs"] = kind, lambda s: dict(zip(labels, s.label_probs, strict=True))
    if sampling.perplexity:
        found["perplexity"] = pa.float64(), lambda s: s.perplexity
    return {name: Column(kind, partial(_of_result, of)) for name, (kind, of) in found.items()}


def _of_result(of: Callable[[Scores], Any], result: Result) -> Any:
    return None if result.scores is None else of(result.scores)
