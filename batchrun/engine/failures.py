"""Why a row fails in the engine, in the words of its error."""

from __future__ import annotations

from batchrun.engine.core import Sequence
from batchrun.errors import said_by

NOT_FINITE = "not_finite"


def without_text(sequence: Sequence, error: BaseException) -> None:
    """Fail a sequence whose tokens can't be decoded."""
    sequence.fail("internal", f"its tokens can't be decoded to text: {said_by(error)}")


def without_shape(sequence: Sequence, reason: str) -> None:
    """Fail a sequence whose answer can't go on under its constraint."""
    sequence.fail("constraint", f"no answer of the requested shape can be found: {reason}")


def not_finite(sequence: Sequence, generated: int | None = None) -> None:
    """Fail a sequence for its logits, after so many generated tokens; default: all that it has."""
    count = len(sequence.output_ids) if generated is None else generated
    after = f"{sequence.num_prompt_tokens:,} tokens of the prompt and {count:,} of the answer"
    if sequence.scoring is not None:
        after = f"{sequence.scoring.begin + 1:,} tokens of the prompt and the text to score"
    sequence.fail(
        NOT_FINITE, f"the model's logits are not finite after {after}; try --dtype float32"
    )
