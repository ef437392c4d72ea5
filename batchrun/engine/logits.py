"""What a model's generation config does to logits, as transformers' processors and warpers do it.

The order is transformers' own (`GenerationMixin._get_logits_processor`), with our parameters at
their places: biases, penalties, bans (with `min_tokens`), forced tokens, invalid values, the
growing weight of end tokens, suppressed tokens; of rows that are drawn then temperature, top-h,
top-k, top-p, min-p, typical-p, epsilon, eta. Those of beams act on log-probabilities.

What depends on a row's tokens is decided on the host, so those must be known when it is sampled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch

from batchrun.engine.attention import Upload
from batchrun.engine.processors import (
    Bans,
    EndTokens,
    LogitsProcessor,
    Penalties,
    Row,
)

Ids = tuple[int, ...]

_TOP_H = 100  # tokens that top-h looks at
_MOST_DECAY = 1e30  # times an end token's logit: beyond that is no float32


@dataclass(frozen=True)
class LogitsConfig:
    """What a generation config asks of logits, beside what sampling parameters say.

    Args:
        eos_ids: The model's end tokens.
        max_model_len: Tokens of prompt and output together at most.
        sequence_bias: Added to the logit of a sequence's last token where the others precede it.
        bad_words: Sequences whose last token may not follow the others.
        no_repeat_ngram_size: No sequence of so many tokens comes twice; 0 where that is allowed.
        forced_bos: The token that follows a prompt of one token.
        forced_eos: The tokens one of which is the last one where the length ends an answer.
        remove_invalid_values: NaN counts as 0, infinities as the largest numbers there are.
        decay: From so many tokens on, end tokens become likelier by a factor a token.
        suppress: Tokens that never come.
        begin_suppress: Tokens that do not come first.
        renormalize: Beams' log-probabilities are those of what is left.
        top_h, typical_p, epsilon, eta: Filters of drawn rows; None or 0 where off.
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
        """Whether drawn rows are filtered by more than their own parameters."""
        return any((self.top_h, self.typical_p, self.epsilon, self.eta))

    @property
    def reads_tokens(self) -> tuple[str, ...]:
        """What depends on the tokens of a row so far, by the config's names."""
        asked = {
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "bad_words_ids": any(len(word) > 1 for word in self.bad_words),
            "sequence_bias": any(len(ids) > 1 for ids in self.sequence_bias),
        }
        return tuple(name for name, depends in asked.items() if depends)

    def filter_first(self, logits: torch.Tensor) -> torch.Tensor:
        """Top-h, which comes before all filters of a row's own."""
        if self.top_h is None:
            return logits
        head, at = logits.topk(min(_TOP_H, logits.shape[1]), dim=-1)
        logprobs = head.log_softmax(-1)
        terms = -_times(logprobs.exp(), logprobs)
        keep = terms.cumsum(-1) <= terms.sum(-1, keepdim=True) * self.top_h
        keep[:, 0] = True
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, at, keep)
        return logits.masked_fill(~kept, -torch.inf)

    def filter_last(self, logits: torch.Tensor) -> torch.Tensor:
        """Typical-p (arXiv 2202.00666), epsilon and eta (arXiv 2210.15191)."""
        if self.typical_p is not None:
            logprobs = logits.log_softmax(-1)
            entropy = -_times(logprobs.exp(), logprobs).sum(-1, keepdim=True)
            shifted = (-logprobs - entropy).abs()
            ordered, at = shifted.sort(-1)
            mass = logits.gather(-1, at).softmax(-1).cumsum(-1)
            last = (mass < self.typical_p).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
            drop = ordered > ordered.gather(1, last)
            drop[:, 0] = False
            logits = logits.masked_fill(drop.scatter(1, at, drop), -torch.inf)
        if self.epsilon:
            logits = _drop_below(logits, torch.full_like(logits[:, :1], self.epsilon))
        if self.eta:
            logprobs = logits.log_softmax(-1)
            entropy = -_times(logprobs.exp(), logprobs).sum(-1, keepdim=True)
            logits = _drop_below(logits, ((-entropy).exp() * self.eta**0.5).clamp(max=self.eta))
        return logits


def processors(
    config: LogitsConfig, eos_ids: Collection[int], upload: Upload, num_slots: int
) -> list[LogitsProcessor]:
    """All that changes logits before a token is chosen, in its order.

    Args:
        config: What the model asks for; the rest is each row's own.
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


class SequenceBias(LogitsProcessor):
    """Added to the logit of a sequence's last token where its other ones come before."""

    def __init__(self, upload: Upload, config: LogitsConfig) -> None:
        self._upload, self._biases = upload, config.sequence_bias
        self._found: list[tuple[int, int, float]] = []

    def prepare(self, rows: Seq[Row]) -> bool:
        """See `LogitsProcessor.prepare`."""
        self._found = [
            (i, ids[-1], bias)
            for i, row in enumerate(rows)
            for ids, bias in self._biases.items()
            if _ends_with(row, ids[:-1])
        ]
        return bool(self._found)

    def apply(self, logits: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
        """See `LogitsProcessor.apply`."""
        at = self._upload(np.array([f[:2] for f in self._found]).T)
        values = self._upload(np.array([f[2] for f in self._found], np.float32))
        return logits.float().index_put_((at[0], at[1]), values, accumulate=True)


class _ConfigBans(Bans):
    """Bans of the model's config."""

    def __init__(self, upload: Upload, config: LogitsConfig) -> None:
        super().__init__(upload)
        self._config = config


class BadWords(_ConfigBans):
    """No word's last token where its other ones come before."""

    def banned(self, row: Row) -> Iterable[int]:
        """See `Bans.banned`."""
        return [word[-1] for word in self._config.bad_words if _ends_with(row, word[:-1])]


class NoRepeatNgram(_ConfigBans):
    """No sequence of so many tokens twice."""

    def banned(self, row: Row) -> Iterable[int]:
        """See `Bans.banned`."""
        size = self._config.no_repeat_ngram_size
        if row.end < size:
            return []
        tokens = np.array(row.ids_so_far(), np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
        same = (windows[:, :-1] == tokens[len(tokens) + 1 - size :]).all(1)
        found: list[int] = np.unique(windows[same, -1]).tolist()
        return found


class ForcedTokens(LogitsProcessor):
    """One token behind a prompt of one, and some at the end that the length sets."""

    def __init__(self, upload: Upload, config: LogitsConfig) -> None:
        self._upload, self._config = upload, config
        self._pairs: list[tuple[int, int]] = []

    def prepare(self, rows: Seq[Row]) -> bool:
        """See `LogitsProcessor.prepare`."""
        bos, eos = self._config.forced_bos, self._config.forced_eos
        self._pairs = []
        for i, row in enumerate(rows):
            if eos and row.end == min(row.most_tokens, self._config.max_model_len) - 1:
                self._pairs += [(i, token) for token in eos]
            elif bos is not None and row.end == 1:
                self._pairs.append((i, bos))
        return bool(self._pairs)

    def apply(self, logits: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
        """See `LogitsProcessor.apply`."""
        at = self._upload(np.array(self._pairs).T)
        logits[at[0]] = -torch.inf
        logits[at[0], at[1]] = 0.0
        return logits


class InvalidValues(LogitsProcessor):
    """NaN counts as 0, infinities as the largest numbers there are."""

    def apply(self, logits: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
        """See `LogitsProcessor.apply`."""
        return logits.float().nan_to_num(nan=0.0)


class Decay(LogitsProcessor):
    """End tokens become likelier, from so many tokens on, by a factor a token."""

    def __init__(self, upload: Upload, config: LogitsConfig) -> None:
        self._upload, self._eos_ids = upload, config.eos_ids
        self._start, self._factor = config.decay or (0, 1.0)
        self._grown: list[tuple[int, float]] = []  # rows, and by how much

    def prepare(self, rows: Seq[Row]) -> bool:
        """See `LogitsProcessor.prepare`."""
        beyond = [(i, row.num_generated - self._start) for i, row in enumerate(rows)]
        self._grown = [(i, _power(self._factor, count) - 1) for i, count in beyond if count > 0]
        return bool(self._grown)

    def apply(self, logits: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
        """See `LogitsProcessor.apply`."""
        logits, upload = logits.float(), self._upload
        at = (
            upload(np.array([i for i, _ in self._grown]))[:, None],
            upload(np.array(self._eos_ids))[None],
        )
        weight = upload(np.array([weight for _, weight in self._grown], np.float32))[:, None]
        values = logits[at]
        logits[at] = values + torch.where(values.isfinite(), values.abs() * weight, 0.0)
        return logits


class Suppressed(_ConfigBans):
    """Tokens that never come, and some that do not come first."""

    def banned(self, row: Row) -> Iterable[int]:
        """See `Bans.banned`."""
        config = self._config
        forced = row.num_prompt_tokens == 1 and config.forced_bos is not None
        return config.suppress + (config.begin_suppress if row.num_generated == forced else ())


class Renormalized(LogitsProcessor):
    """Beams' log-probabilities are those of what is left."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._beams: list[int] = []

    def prepare(self, rows: Seq[Row]) -> bool:
        """See `LogitsProcessor.prepare`."""
        self._beams = [i for i, row in enumerate(rows) if row.params.beams]
        return bool(self._beams)

    def apply(self, logits: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
        """See `LogitsProcessor.apply`."""
        at = self._upload(np.array(self._beams))
        logits[at] = logits[at].log_softmax(dim=-1)
        return logits


def _ends_with(row: Row, ids: Ids) -> bool:
    count = len(ids)
    return not count or (count <= row.end and row.ids_so_far(count) == list(ids))


def _power(factor: float, exponent: int) -> float:
    try:
        return min(factor**exponent, _MOST_DECAY)
    except OverflowError:
        return _MOST_DECAY


def _times(probabilities: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Their product, 0 where the probability is."""
    return torch.where(probabilities > 0, probabilities * logprobs, 0.0)


def _drop_below(logits: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Without tokens of a probability below `[N, 1]`, but for the likeliest."""
    drop = (logits.softmax(-1) < limit) & (logits < logits.amax(-1, keepdim=True))
    return logits.masked_fill(drop, -torch.inf)
