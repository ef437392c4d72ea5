"""What a job scores of each row: a column's text, the prompt itself, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from batchrun.engine.scores import Scoring
from batchrun.jobs.errors import InputError
from batchrun.jobs.options import SamplingSpec
from batchrun.prompts.messages import PromptError, kind_of, wrong_type

if TYPE_CHECKING:  # imports torch
    from batchrun.engine.settings import EncodeText


class Scorer:
    """Says what to score of a row.

    Args:
        sampling: What the user asked for.
        encode: Turns a text behind a row's prompt into tokens; without a row, the user's own text.

    Attributes:
        columns: The columns that it reads.

    Raises:
        InputError: A label has no token of its own.
    """

    def __init__(self, sampling: SamplingSpec, encode: EncodeText) -> None:
        self.columns = [] if sampling.score is None else [sampling.score]
        self._column, self._encode = sampling.score, encode
        self._of_prompt = sampling.perplexity and sampling.score is None
        self._labels = first_tokens(sampling.labels or (), encode)

    def scoring(self, fields: Mapping[str, Any], prompt_tokens: int) -> Scoring:
        """What to score of a row with a prompt of so many tokens.

        Raises:
            PromptError: Its text is missing, or can't be encoded.
        """
        text = (
            () if self._column is None else self._encode(self._text(self._column, fields), fields)
        )
        return Scoring(text, 1 if self._of_prompt else prompt_tokens, self._labels)

    def _text(self, column: str, fields: Mapping[str, Any]) -> str:
        if column not in fields:
            raise PromptError("missing_field", f"the row has no field {column!r}")
        text = fields[column]
        if text is None:
            raise PromptError("null_score", f"the text to score is null: the field {column!r}")
        if not isinstance(text, str):
            raise wrong_type(f"the text to score is {kind_of(text)}, not text")
        return text


def first_tokens(labels: Sequence[str], encode: EncodeText) -> tuple[int, ...]:
    """The token that stands for each label: its first one behind a prompt.

    Raises:
        InputError: A label has none, or the same as another.
    """
    found: dict[int, str] = {}
    for label in labels:
        try:
            ids = encode(label, None)
        except PromptError as error:
            raise InputError(f"the label {label!r} can't be used: {error}") from None
        if not ids:
            raise InputError(f"the label {label!r} has no tokens")
        if (other := found.get(ids[0])) is not None:
            raise InputError(
                f"the labels {other!r} and {label!r} begin with the same token, {ids[0]}, so they "
                "can't be told apart",
                hint="use labels that begin differently, such as A and B; with --score each text "
                "is scored as a whole",
            )
        found[ids[0]] = label
    return tuple(found)
