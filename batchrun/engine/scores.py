"""Known tokens whose log-probabilities are wanted, and the pass that computes them. No torch here.

A text behind a prompt is scored by one pass over both: the logits after each token say how likely
the next one was. The last token's logits would say what follows the text, which nobody asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchrun.engine.core import Sequence

Scores = tuple[tuple[float, ...], tuple[float, ...]]
"""Log-probabilities of the scored tokens, in their order, and of the labels, in theirs."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """Tokens whose log-probabilities a request asks for, in the model's own distribution.

    Args:
        text_ids: A text behind the prompt.
        first: The first token, of prompt and text, whose log-probability is wanted: at least 1, as
            nothing precedes token 0, and at most the prompt's length.
        labels: Tokens that may each follow the prompt.
    """

    text_ids: tuple[int, ...] = ()
    first: int = 1
    labels: tuple[int, ...] = ()

    def span(self, prompt_tokens: int, text_tokens: int | None = None) -> tuple[int, int]:
        """The tokens whose logits are wanted, of prompt and text: from where on, and to where.

        Args:
            prompt_tokens: The prompt's length.
            text_tokens: The text's length, if `text_ids` was taken away.

        Returns:
            Begin and end. If they are equal, nothing needs computing; else `end` tokens do.
        """
        text = len(self.text_ids) if text_tokens is None else text_tokens
        end = max(prompt_tokens + text - 1, prompt_tokens if self.labels else 0)
        return self.first - 1, max(self.first - 1, end)


class ScoringPass:
    """What a pass over a prompt, and a text behind it, is to find and has found.

    Args:
        prompt_ids: The prompt.
        scoring: What is wanted; a prompt of one token and no text may leave nothing to compute.

    Attributes:
        token_ids: The tokens to compute.
        begin: The first of them whose logits are still wanted: those of earlier ones were taken in.
        followers: The rows that wait for the scores, the one that the pass was begun for first.
    """

    def __init__(self, prompt_ids: tuple[int, ...], scoring: Scoring) -> None:
        self._ids = prompt_ids + scoring.text_ids
        self._scoring = scoring
        self._last_of_prompt = len(prompt_ids) - 1
        self.begin, end = scoring.span(len(prompt_ids))
        self.token_ids = self._ids[:end]
        self.followers: list[Sequence] = []
        self._logprobs: list[float] = []
        self._labels: tuple[float, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to compute."""
        return self.begin >= len(self.token_ids)

    @property
    def scores(self) -> Scores:
        """What was found."""
        return tuple(self._logprobs), self._labels

    def targets(self, start: int, length: int) -> tuple[tuple[int, ...], ...]:
        """What is wanted of tokens `[start, start + length)`: see `Segment.targets`."""
        return tuple(map(self._wanted, range(max(start, self.begin), start + length)))

    def fitting(self, start: int, length: int, most: int) -> int:
        """How many tokens from `start` on, at most `length`, have at most `most` wanted logits."""
        return min(length, max(0, self.begin - start) + most)

    def take(self, targets: Seq[Seq[int]], found: Iterator[float]) -> bool:
        """Take in log-probabilities of the next targets; False if logits are not finite."""
        for wanted in targets:
            values = [next(found) for _ in wanted]
            if any(map(math.isnan, values)):
                return False
            own = self.begin + 1 < len(self._ids)
            self._logprobs += values[:own]
            if self.begin == self._last_of_prompt:
                self._labels = tuple(values[own:])
            self.begin += 1
        return True

    def _wanted(self, position: int) -> tuple[int, ...]:
        own = self._ids[position + 1 : position + 2]
        return own + self._scoring.labels if position == self._last_of_prompt else own
