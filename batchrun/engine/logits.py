"""What a model's generation config does to logits, matching transformers' processors and warpers.

The order is transformers' own (`GenerationMixin._get_logits_processor`), with our parameters in
their places: biases, penalties, bans (with `min_tokens`), forced tokens, invalid values, the
growing weight of end tokens, suppressed tokens; then, for rows that are drawn, temperature, top-h,
top-k, top-p, min-p, typical-p, epsilon, eta. For beams they act on log-probabilities.

What depends on a row's tokens is decided on the host, so the tokens must be known when the row is
sampled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch

from batchrun.engine.attention import Upload
from batchrun.engine.processors import (
    Edits,
    EndTokens,
    LogitsProcessor,
    LogitsRow,
    Penalties,
    Places,
    bans,
)
from batchrun.engine.sums import fixed_point, log_softmax, total, weights

Ids = tuple[int, ...]

_TOP_H = 100  # tokens that top-h looks at
_MOST_DECAY = 1e30  # factor on an end token's logit: a larger one would overflow float32


@dataclass(frozen=True)
class LogitsConfig:
    """What a generation config asks of logits, beyond the sampling parameters.

    Args:
        eos_ids: The model's end tokens.
        max_model_len: Maximum number of tokens of prompt and output together.
        sequence_bias: Added to the logit of a sequence's last token if the others precede it.
        bad_words: Sequences whose last token may not follow the others.
        no_repeat_ngram_size: No n-gram of this size may repeat; 0 for no limit.
        forced_bos: The token that follows a prompt of one token.
        forced_eos: One of these tokens ends an answer that reaches its maximum length.
        remove_invalid_values: NaN counts as 0, infinities as the largest finite numbers.
        decay: A start and a factor: from that many tokens on, each token makes end tokens likelier
            by the factor.
        suppress: Tokens that are never chosen.
        begin_suppress: Tokens that are never chosen first.
        renormalize: Renormalize beams' log-probabilities over the tokens that are left.
        top_h, typical_p, epsilon, eta: Filters for drawn rows; None or 0 for off.
    """

    eos_ids: Ids = ()
    max_model_len: int = 1 << 62
    sequence_bias: Mapping[Ids, float] = field(default_factory=dict)
    bad_words: tuple[Ids, ...] = ()
    no_repeat_ngram_size: int = 0
    forced_bos: int | None = None
    forced_eos: Ids = ()
    remove_invalid_values: bool = False
    decay: tuple[int, float] | None = None
    suppress: Ids = ()
    begin_suppress: Ids = ()
    renormalize: bool = False
    top_h: float | None = None
    typical_p: float | None = None
    epsilon: float = 0.0
    eta: float = 0.0

    @property
    def filters(self) -> bool:
        """Whether drawn rows have filters beyond their own parameters."""
        return any((self.top_h, self.typical_p, self.epsilon, self.eta))

    @property
    def reads_tokens(self) -> tuple[str, ...]:
        """The config's settings that depend on a row's tokens so far, by name."""
        asked = {
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "bad_words_ids": any(len(word) > 1 for word in self.bad_words),
            "sequence_bias": any(len(ids) > 1 for ids in self.sequence_bias),
        }
        return tuple(name for name, depends in asked.items() if depends)

    def filter_first(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply top-h, which comes before all filters of a row's own."""
        if self.top_h is None:
            return logits
        head, at = logits.topk(min(_TOP_H, logits.shape[1]), dim=-1)
        logprobs = log_softmax(head)
        terms = fixed_point(-_times(logprobs.exp(), logprobs)).cumsum(-1).double()
        keep = terms <= terms[:, -1:] * self.top_h
        keep[:, 0] = True
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, at, keep)
        return logits.masked_fill(~kept, -torch.inf)

    def filter_last(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply typical-p (arXiv 2202.00666), epsilon and eta (arXiv 2210.15191)."""
        if self.typical_p is not None:
            logprobs = log_softmax(logits)
            entropy = -total(_times(logprobs.exp(), logprobs))
            shifted = (-logprobs - entropy).abs()
            ordered, at = shifted.sort(dim=-1, stable=True)
            mass = weights(logits.gather(-1, at)).cumsum(-1).double()
            enough = self.typical_p * mass[:, -1:]
            last = (mass < enough).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
            drop = ordered > ordered.gather(1, last)
            drop[:, 0] = False
            logits = logits.masked_fill(drop.scatter(1, at, drop), -torch.inf)
        if self.epsilon:
            logits = _drop_below(logits, torch.full_like(logits[:, :1], self.epsilon))
        if self.eta:
            logprobs = log_softmax(logits)
            entropy = -total(_times(logprobs.exp(), logprobs))
            logits = _drop_below(logits, ((-entropy).exp() * self.eta**0.5).clamp(max=self.eta))
        return logits


def processors(
    config: LogitsConfig, eos_ids: Collection[int], upload: Upload, num_slots: int
) -> list[LogitsProcessor]:
    """All processors that change logits before a token is chosen, in order.

    Args:
        config: What the model asks for; the rest comes from each row.
        eos_ids: The model's end tokens, which rows may ignore.
        upload: Copies an array to the device without waiting.
        num_slots: Slots that sequences can be in.
    """
    made: list[tuple[object, LogitsProcessor]] = [
        (config.sequence_bias, SequenceBias(upload, config)),
        (True, Penalties(upload, num_slots)),
        (True, EndTokens(upload, eos_ids)),
        (config.bad_words, BadWords(upload, config)),
        (config.no_repeat_ngram_size, NoRepeatNgram(upload, config)),
        (config.forced_bos is not None or config.forced_eos, ForcedTokens(upload, config)),
        (config.remove_invalid_values, InvalidValues()),
        (config.decay and config.eos_ids, Decay(upload, config)),
        (config.suppress or config.begin_suppress, Suppressed(upload, config)),
        (config.renormalize, Renormalized(upload)),
    ]
    return [processor for asked, processor in made if asked]


class _ConfigEdits(Edits):
    """Edits that the model's config asks for in each row."""

    def __init__(self, upload: Upload, config: LogitsConfig) -> None:
        super().__init__(upload)
        self._config = config


class SequenceBias(_ConfigEdits):
    """Adds to the logit of a sequence's last token if its other tokens precede."""

    def edits(self, row: LogitsRow) -> Iterable[tuple[int, float]]:
        """See `Edits.edits`."""
        biases = self._config.sequence_bias.items()
        return [(ids[-1], bias) for ids, bias in biases if _ends_with(row, ids[:-1])]

    def write(self, logits: torch.Tensor, at: Places, numbers: torch.Tensor) -> torch.Tensor:
        """See `Edits.write`."""
        return logits.float().index_put_(at, numbers.float(), accumulate=True)


class BadWords(_ConfigEdits):
    """Bans a word's last token if its other tokens precede."""

    def edits(self, row: LogitsRow) -> Iterable[tuple[int, float]]:
        """See `Edits.edits`."""
        return bans(word[-1] for word in self._config.bad_words if _ends_with(row, word[:-1]))


class NoRepeatNgram(_ConfigEdits):
    """Bans tokens that would repeat an n-gram."""

    def edits(self, row: LogitsRow) -> Iterable[tuple[int, float]]:
        """See `Edits.edits`."""
        size = self._config.no_repeat_ngram_size
        if row.end < size:
            return []
        tokens = np.array(row.ids_so_far(), np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
        same = (windows[:, :-1] == tokens[len(tokens) + 1 - size :]).all(1)
        return bans(np.unique(windows[same, -1]).tolist())


class ForcedTokens(_ConfigEdits):
    """Forces the token after a one-token prompt, and end tokens at the maximum length."""

    def edits(self, row: LogitsRow) -> Iterable[tuple[int, float]]:
        """See `Edits.edits`."""
        bos, eos = self._config.forced_bos, self._config.forced_eos
        if eos and row.end == min(row.most_tokens, self._config.max_model_len) - 1:
            return [(token, 0.0) for token in eos]
        return [(bos, 0.0)] if bos is not None and row.end == 1 else []

    def write(self, logits: torch.Tensor, at: Places, numbers: torch.Tensor) -> torch.Tensor:
        """See `Edits.write`; bans all other tokens of the row."""
        logits[at[0]] = -torch.inf
        return super().write(logits, at, numbers)


class InvalidValues(LogitsProcessor):
    """Replaces NaN by 0, and infinities by the largest finite numbers."""

    def apply(self, logits: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
        """See `LogitsProcessor.apply`."""
        return logits.float().nan_to_num(nan=0.0)


class Decay(_ConfigEdits):
    """Makes end tokens likelier by a factor per token, from a given length on."""

    def edits(self, row: LogitsRow) -> Iterable[tuple[int, float]]:
        """See `Edits.edits`."""
        start, factor = self._config.decay or (0, 1.0)
        beyond = row.num_generated - start
        if beyond <= 0:
            return []
        return [(token, _power(factor, beyond) - 1) for token in self._config.eos_ids]

    def write(self, logits: torch.Tensor, at: Places, numbers: torch.Tensor) -> torch.Tensor:
        """See `Edits.write`."""
        logits = logits.float()
        values = logits[at]
        grown = values.abs() * numbers.float()
        logits[at] = values + torch.where(values.isfinite(), grown, 0.0)
        return logits


class Suppressed(_ConfigEdits):
    """Bans tokens that may never come, and some that may not come first."""

    def edits(self, row: LogitsRow) -> Iterable[tuple[int, float]]:
        """See `Edits.edits`."""
        config = self._config
        forced = row.num_prompt_tokens == 1 and config.forced_bos is not None
        first = row.num_generated == forced
        return bans(config.suppress + (config.begin_suppress if first else ()))


class Renormalized(Edits):
    """Renormalizes beams' log-probabilities over the tokens that are left."""

    def edits(self, row: LogitsRow) -> Iterable[tuple[int, float]]:
        """See `Edits.edits`; `write` changes the whole row of a beam."""
        return [(0, 0.0)] * row.params.beams

    def write(self, logits: torch.Tensor, at: Places, numbers: torch.Tensor) -> torch.Tensor:
        """See `Edits.write`."""
        logits[at[0]] = log_softmax(logits[at[0]])
        return logits


def _ends_with(row: LogitsRow, ids: Ids) -> bool:
    count = len(ids)
    return not count or (count <= row.end and row.ids_so_far(count) == list(ids))


def _power(factor: float, exponent: int) -> float:
    try:
        return min(factor**exponent, _MOST_DECAY)
    except OverflowError:
        return _MOST_DECAY


def _times(probabilities: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Their product, 0 where the probability is 0."""
    return torch.where(probabilities > 0, probabilities * logprobs, 0.0)


def _drop_below(logits: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Drop tokens with a probability below `limit` `[N, 1]`, except the likeliest."""
    drop = (log_softmax(logits).exp() < limit) & (logits < logits.amax(-1, keepdim=True))
    return logits.masked_fill(drop, -torch.inf)
